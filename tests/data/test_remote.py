"""Corpora that are read from elsewhere: a real HTTP server that fails in every way, and fsspec's other stores."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from fsspec.implementations.http import HTTPFileSystem

from megakrause.data import check, formats, remote
from megakrause.data.check import adopt_corpus, verify_corpus
from megakrause.data.remote import BlockCache, Patience
from megakrause.data.shards import Corpus
from megakrause.data.store import Store
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.tokens import TokenWindows
from megakrause.errors import UserError
from tests import disks
from tests.data.conftest import write_documents
from tests.disks import needs_root

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(3)
DOCUMENTS = [[*RNG.integers(2, 600, RNG.integers(0, 40)).tolist(), 1] for _ in range(60)]
PATIENT = Patience(total=20, first=0.02, longest=0.1, stall=1)


class Server(ThreadingHTTPServer):
    """Serves a folder, with ranges; `faults` are what the next GETs of parts of files meet, then it is well."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: list[str] = []
        self.always: str | None = None
        self.ranges = True
        self.listing = 404
        self.requests: list[str] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        pass  # clients that gave up


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path, fault = self.server.folder / self.path.lstrip("/"), None
        span = self.headers.get("Range") if self.server.ranges else None
        if body and span and path.suffix in (".bin", ".ds"):
            with self.server.lock:
                self.server.requests.append(f"{path.name} {span}")
                fault = self.server.always or (self.server.faults.pop(0) if self.server.faults else None)
        if path.is_dir():
            return self.send_error(self.server.listing)
        if not path.is_file() or fault == "gone":
            return self.send_error(404)
        if fault == "error":
            return self.send_error(503)
        if fault == "reset":
            return self.connection.close()
        content = path.read_bytes()
        total = len(content)
        start, stop = 0, total
        if span:
            first, _, last = span.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(int(last) + 1 if last else total, total)
        content = content[start:stop]
        if fault == "damage":
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault == "short":
            content = content[:-1]
        self.send_response(206 if span else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns:x}"')
        self.send_header("Content-Length", str(len(content)))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        self.end_headers()
        if fault == "stall":
            time.sleep(3)
        if body:
            self.wfile.write(content[: len(content) // 2] if fault == "truncate" else content)
            if fault == "truncate":
                self.connection.close()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def prefix(server: Server, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A corpus with a hash for every 200 bytes and blocks of 7 documents, on the server."""
    monkeypatch.setattr(check, "BLOCK", 200)
    monkeypatch.setattr(formats, "BLOCK_DOCUMENTS", 7)
    prefix = write_documents(server.folder / "c", DOCUMENTS)
    Path(prefix + ".manifest.json").unlink()
    adopt_corpus(prefix, tokenizer)
    return prefix


@pytest.fixture
def cache(tmp_path: Path) -> BlockCache:
    return BlockCache(tmp_path / "cache", 1 << 20, PATIENT)


def batches(corpus: Corpus, count: int = 12) -> list[torch.Tensor]:
    windows = TokenWindows(corpus, 33, eos=1, mask_documents=True, seed=2, group=2)
    found = [windows.batch(np.arange(8) + 8 * number) for number in range(count)]
    return [field for batch in found for field in (batch.tokens, batch.targets, batch.loss_mask, batch.doc_start)]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def kept(cache: BlockCache) -> list[Path]:
    return list(cache.folder.glob("??/*"))


def held(cache: BlockCache) -> int:
    return sum(path.stat().st_size for path in kept(cache))


def test_a_corpus_elsewhere_gives_the_same_batches(server: Server, prefix: str, cache: BlockCache) -> None:
    corpus = Corpus.open(f"{server.url}/c", cache=cache)
    here = Corpus.open(prefix)
    assert same(batches(corpus), batches(here)) and corpus.fingerprint == here.fingerprint
    assert corpus.read(3, 500).tolist() == here.read(3, 500).tolist()
    assert len(server.requests) == len(set(server.requests)) == -(-2 * here.num_tokens // 200)  # each block once
    verified = verify_corpus(f"{server.url}/c.manifest.json")
    assert verified["hashed"] and verified["tokens"] == here.num_tokens


@pytest.mark.parametrize("fault", ["error", "reset", "truncate", "short", "damage", "stall"])
def test_what_passes_is_survived(
    server: Server, prefix: str, cache: BlockCache, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = Corpus.open(f"{server.url}/c", cache=cache)
    server.faults += [fault] * 2 + [None] * 3 + [fault]  # type: ignore[list-item]
    assert same(batches(corpus), batches(Corpus.open(prefix)))
    assert not server.faults
    said = capfd.readouterr().err.splitlines()
    assert len(said) >= 3 and all(f"{server.url}/c.bin: " in line and "asking again in" in line for line in said)


@pytest.mark.parametrize(
    "fault, says",
    [
        ("gone", "cannot read .*/c.bin: "),
        ("damage", r"c.bin: block \d, bytes \d+ to \d+, is damaged: its hash is not the manifest's"),
        ("error", "cannot read .*/c.bin: .*503.*; given up after 1 s"),
        ("short", r"cannot read .*/c.bin: 199 bytes came of 200 from byte \d+ on; given up after 1 s"),
    ],
)
def test_what_stays_is_named(server: Server, prefix: str, tmp_path: Path, fault: str, says: str) -> None:
    cache = BlockCache(tmp_path / "cache", 1 << 20, Patience(total=1, first=0.05, longest=0.2, stall=1))
    corpus = Corpus.open(f"{server.url}/c", cache=cache)
    server.always = fault
    with pytest.raises(UserError, match=says) as raised:
        batches(corpus)
    assert "\n" not in str(raised.value)
    assert not list(cache.folder.glob("??/*.tmp"))
    server.always = None
    assert same(batches(corpus), batches(Corpus.open(prefix)))  # it came back


def test_a_server_that_is_not_there(prefix: str, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", 1 << 20, Patience(total=0.5, first=0.1))
    with pytest.raises(UserError, match=r"cannot read http://127.0.0.1:1/c.manifest.json: .*given up after"):
        Corpus.open("http://127.0.0.1:1/c", cache=cache)
    with pytest.raises(UserError, match="cannot read nonsense://x/c: "):
        Corpus.open("nonsense://x/c", cache=cache)


def test_a_host_that_was_never_there_is_given_up_soon(tmp_path: Path) -> None:
    patience = Patience(total=60, first=0.1, contact=0.5)
    with pytest.raises(UserError, match=r"cannot read http://127.0.0.1:1/c.manifest.json: .*given up after 0 s"):
        Corpus.open("http://127.0.0.1:1/c", cache=BlockCache(tmp_path / "cache", 1 << 20, patience))
    refused = FileNotFoundError("x")  # as fsspec has it
    refused.__cause__ = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")
    answers: list[object] = [OSError("busy"), refused]

    def work() -> None:
        raise answers.pop(0) if len(answers) > 1 else refused

    patience = Patience(total=2, first=0.1, contact=0.5)
    with pytest.raises(UserError, match="refused; given up after 2 s"):  # it was there, it may come back
        patience.ask("http://here/x", work)
    with pytest.raises(UserError, match="refused; given up after 0 s"):
        patience.ask("http://there/x", work)


@pytest.mark.parametrize("large", [False, True])
def test_a_server_without_ranges_is_refused_at_once(
    server: Server, prefix: str, cache: BlockCache, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.ranges = False
    if large:  # not even read once
        monkeypatch.setattr(remote, "BLOCK", 100)
        monkeypatch.setattr("fsspec.implementations.http.HTTPFileSystem.cat_file", only_manifests)
    started = time.monotonic()
    said = r"^cannot read \S+/c.(bin|idx): the server ignores byte ranges; use one that supports them$"
    with pytest.raises(UserError, match=said):
        batches(Corpus.open(f"{server.url}/c", cache=cache))
    assert time.monotonic() - started < 5
    server.ranges = True
    assert same(batches(Corpus.open(f"{server.url}/c", cache=cache)), batches(Corpus.open(prefix)))


def only_manifests(self: HTTPFileSystem, path: str, start: int | None = None, end: int | None = None) -> bytes:
    whole = urllib.request.Request(path, headers={} if start is None else {"Range": f"bytes={start}-{end - 1}"})
    with urllib.request.urlopen(whole) as answer:
        assert start is None or answer.status == 206
        return bytes(answer.read())


def test_a_missing_corpus_is_missing_at_once(server: Server, cache: BlockCache) -> None:
    with pytest.raises(UserError, match="there is no corpus at http"):
        Corpus.open(f"{server.url}/none", cache=cache)


def test_what_was_fetched_is_shared_and_mended(server: Server, prefix: str, cache: BlockCache) -> None:
    expected = batches(Corpus.open(prefix))
    batches(Corpus.open(f"{server.url}/c", cache=cache))
    fetched = len(server.requests)
    again = BlockCache(cache.folder, 1 << 20, PATIENT)
    assert same(batches(Corpus.open(f"{server.url}/c", cache=again)), expected)
    assert len(server.requests) == fetched
    damaged = max(kept(cache), key=lambda p: p.stat().st_size)
    damaged.write_bytes(bytes(damaged.stat().st_size))
    again = BlockCache(cache.folder, 1 << 20, PATIENT)
    assert same(batches(Corpus.open(f"{server.url}/c", cache=again)), expected)


def test_the_cache_is_bounded(server: Server, prefix: str, tmp_path: Path) -> None:
    limit = 1000
    cache = BlockCache(tmp_path / "cache", limit, PATIENT)
    assert same(batches(Corpus.open(f"{server.url}/c", cache=cache)), batches(Corpus.open(prefix)))
    assert 0 < held(cache) <= limit


def test_a_cache_that_was_larger_is_cut(server: Server, prefix: str, cache: BlockCache) -> None:
    expected = batches(Corpus.open(prefix))
    batches(Corpus.open(f"{server.url}/c", cache=cache))
    assert held(cache) > 1000
    old, young = (cache.folder / "00" / f"{name}.tmp" for name in ("old", "young"))
    old.parent.mkdir(exist_ok=True)
    for path in (old, young):
        path.write_bytes(b"part")
    os.utime(old, (0, time.time() - 100_000))
    smaller = BlockCache(cache.folder, 1000, PATIENT)
    path = max((path for path in kept(cache) if path.suffix != ".tmp"), key=lambda path: path.stat().st_mtime)
    os.utime(path, (time.time() + 100,) * 2)
    smaller.get(path.name, path.stat().st_size, lambda: pytest.fail("it is here"), lambda _: True)
    assert young.exists() and not old.exists()  # another process writes the young one
    young.unlink()
    assert 0 < held(smaller) <= 1000
    assert same(batches(Corpus.open(f"{server.url}/c", cache=smaller)), expected)


def test_few_files_are_locks_and_few_blocks_mapped(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", 1 << 20, PATIENT)
    for number in range(300):
        name = f"{number % 256:02x}{number:030x}"
        assert bytes(cache.get(name, 4, lambda: b"abcd", lambda _: True)) == b"abcd"
    assert len(kept(cache)) == 300 and len(list(cache.folder.rglob("*.lock"))) == 257
    assert len([line for line in Path("/proc/self/maps").read_text().splitlines() if str(cache.folder) in line]) == 64
    small = BlockCache(tmp_path / "small", 10, PATIENT)
    for number in range(20):
        small.get(f"{number:032x}", 4, lambda: b"abcd", lambda _: True)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(small.folder) in line]
    assert len(maps) == len(kept(small)) == 2


def test_where_nothing_can_be_locked(
    server: Server, prefix: str, cache: BlockCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert same(batches(Corpus.open(f"{server.url}/c", cache=cache)), batches(Corpus.open(prefix)))


def test_whoever_holds_a_lock_for_ever_is_not_waited_for(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", 1 << 20, Patience(stall=0.2))
    cache.folder.mkdir()
    with (cache.folder / "00.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert bytes(cache.get(32 * "0", 4, lambda: b"abcd", lambda _: True)) == b"abcd"


READER = """
import sys, time
from pathlib import Path
from megakrause.data.remote import BlockCache
from megakrause.data.shards import Corpus
from tests.data.test_remote import PATIENT, batches, same

url, prefix, folder, seconds = sys.argv[1:]
expected = batches(Corpus.open(prefix), 2)
rounds, stop = 0, time.monotonic() + float(seconds)
while rounds < 3 or time.monotonic() < stop:
    corpus = Corpus.open(url, cache=BlockCache(folder, 700, PATIENT))
    assert same(batches(corpus, 2), expected)
    rounds += 1
print(rounds)
"""


def test_processes_share_a_cache_that_is_too_small(server: Server, prefix: str, tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "cache", 700, PATIENT)
    arguments = [sys.executable, "-c", READER, f"{server.url}/c", prefix, str(cache.folder), "4"]
    readers = [
        subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [reader.communicate(timeout=120) for reader in readers]
    assert [reader.returncode for reader in readers] == [0, 0, 0], said
    assert all(int(out) > 0 for out, _ in said)
    assert len(server.requests) > len(set(server.requests))  # they dropped one another's blocks
    assert sum(path.stat().st_size for path in kept(cache) if path.suffix != ".tmp") <= 700


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path / "small", "32k") as folder:
        yield folder


@needs_root
def test_a_full_disk_is_one_line_unless_dropping_makes_room(
    server: Server, prefix: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BlockCache, "ahead", lambda *_: None)  # whose temporary files come and go
    expected = batches(Corpus.open(prefix))
    (small_disk / "others").write_bytes(bytes(32 << 10))
    cache = BlockCache(small_disk / "cache", 1 << 20, PATIENT)
    with pytest.raises(UserError) as raised:
        batches(Corpus.open(f"{server.url}/c", cache=cache))
    assert str(raised.value) == (
        f"the disk of the cache folder {small_disk}/cache is full: make room, or set data.cache to a folder on another "
        "disk"
    )
    assert not kept(cache)
    (small_disk / "others").write_bytes(bytes(16 << 10))  # four pages are left for some twenty blocks
    assert same(batches(Corpus.open(f"{server.url}/c", cache=cache)), expected)
    assert 0 < len(kept(cache)) <= 4


@needs_root
def test_a_folder_that_may_only_be_read(small_disk: Path) -> None:
    cache = BlockCache(small_disk / "cache", 1 << 20, PATIENT)
    cache.get(32 * "1", 4, lambda: b"abcd", lambda _: True)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    again = BlockCache(small_disk / "cache", 1 << 20, PATIENT)
    assert bytes(again.get(32 * "1", 4, lambda: b"", lambda _: True)) == b"abcd"  # what it holds is of use
    with pytest.raises(UserError) as raised:
        again.get(32 * "0", 4, lambda: b"abcd", lambda _: True)
    assert str(raised.value) == (
        f"cannot use the cache folder {small_disk}/cache: Read-only file system; make it writable, or set data.cache "
        "to a folder that is"
    )


def test_a_cache_folder_that_is_a_file(server: Server, prefix: str, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"")
    cache = BlockCache(tmp_path / "cache", 1 << 20, PATIENT)
    with pytest.raises(UserError, match=f"^cannot use the cache folder {tmp_path}/cache: .*set data.cache to a folder"):
        batches(Corpus.open(f"{server.url}/c", cache=cache))


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_a_file_that_was_replaced_is_read_anew(server: Server, cache: BlockCache, scheme: str) -> None:
    file = server.folder / "x.npy"
    url = f"{server.url}/x.npy" if scheme == "http" else f"file://{file}"
    for first in (0, 5000):
        tokens = np.arange(first, first + 2000, dtype=np.int32)
        np.save(file, tokens)
        for _ in range(2):
            blob = Store(url, cache).blob(url, block_size=1000)
            assert (blob.array(np.dtype(np.int32), 128, 2000) == tokens).all()
    assert len(kept(cache)) == 2 * 9  # and each block fetched once


def test_reading_ahead_survives_whatever_is_raised(cache: BlockCache) -> None:
    done = threading.Event()
    cache.ahead(lambda: 1 / 0)
    cache.ahead(done.set)
    assert done.wait(10)


@pytest.mark.parametrize("fault", ["error", "stall"])
def test_closing_ends_all_waiting(server: Server, prefix: str, tmp_path: Path, fault: str) -> None:
    cache = BlockCache(tmp_path / "cache", 1 << 20, Patience(first=60))
    corpus = Corpus.open(f"{server.url}/c", cache=cache)
    server.always = fault
    threading.Timer(0.5, cache.close).start()
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot read .*/c.bin: its reader was closed$"):
        batches(corpus)
    assert time.monotonic() - started < 2


def test_a_folder_that_cannot_be_listed_is_not_taken_for_an_empty_one(server: Server, tmp_path: Path) -> None:
    (server.folder / "d").mkdir()
    store = Store(server.url, BlockCache(tmp_path / "cache", patience=Patience(total=0.3, first=0.1)))
    assert store.files(f"{server.url}/d") == []
    server.listing = 503
    with pytest.raises(UserError, match="cannot read .*/d: .*503.*given up after"):
        store.files(f"{server.url}/d")
    server.listing = 403
    with pytest.raises(UserError, match="cannot read .*/d: (?!.*given up).*403"):
        store.files(f"{server.url}/d")
    here = Store(f"file://{tmp_path}")
    assert here.files(f"file://{tmp_path}/none") == [] and here.files(f"file://{server.folder}") == [
        f"file://{server.folder}/d"
    ]


def test_blocks_are_fetched_ahead(server: Server, prefix: str, cache: BlockCache) -> None:
    corpus = Corpus.open(f"{server.url}/c", cache=cache)
    windows = TokenWindows(corpus, 33, eos=1, mask_documents=True, seed=2, group=2)
    windows.batch(np.array([0]))
    following = windows.order.next_blocks(0)
    wanted = {
        block
        for number in following
        for block in range(
            2 * corpus.shards[0].cuts[number][1] // 200, -(-2 * corpus.shards[0].cuts[number + 1][1] // 200)
        )
    }
    deadline = time.monotonic() + 10

    def there() -> set[int]:
        return {int(request.partition("bytes=")[2].partition("-")[0]) // 200 for request in server.requests}

    while not wanted <= there() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(following) == 2 and wanted <= there()


def test_other_software_and_other_stores(
    server: Server, cache: BlockCache, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = [token for document in DOCUMENTS for token in document]
    ends = np.cumsum([len(document) for document in DOCUMENTS]).astype(np.uint64)
    (server.folder / "x.ds").write_bytes(np.array(stream, np.uint16).tobytes())
    (server.folder / "x.ds.index").write_bytes(ends.tobytes())
    np.save(server.folder / "x.npy", np.array(stream, np.int32))
    write_documents(server.folder / "c", DOCUMENTS)
    Path(server.folder / "c.manifest.json").unlink()
    places: list[Callable[[str], str]] = [lambda n: f"{server.url}/{n}", lambda n: f"file://{server.folder}/{n}"]
    for place in places:
        for name in ("x.ds", "x.npy", "c"):
            corpus = Corpus.open(place(name), tokenizer, cache=cache)
            assert corpus.read(0, len(stream)).tolist() == stream, name
            assert sum(len(corpus.documents_of(b)[1]) - 1 for b in range(len(corpus.block_tokens))) == len(DOCUMENTS)


@pytest.mark.parametrize("block_size", [7, 16, 50, 1000])
@pytest.mark.parametrize("base", [0, 3, 128])
def test_elements_at_the_bounds_of_blocks(server: Server, cache: BlockCache, block_size: int, base: int) -> None:
    values = RNG.integers(0, 2**31, 40).astype(np.int64)
    (server.folder / f"v{base}").write_bytes(bytes(base) + values.tobytes())
    blob = Store(server.url, cache).blob(f"{server.url}/v{base}", block_size=block_size)
    places = RNG.integers(0, 40, 100)
    assert (blob.take(np.dtype(np.int64), places, base) == values[places]).all()
    for start, count in ((0, 40), (3, 5), (39, 1), (7, 0)):
        part = blob.array(np.dtype(np.int64), base + 8 * start, count)
        assert (part == values[start : start + count]).all() and len(part) == count
    with pytest.raises(UserError, match="has no elements 0 to 40, of which its index speaks"):
        blob.take(np.dtype(np.int64), np.array([0, 40]), base)
