"""Corpora that are read from elsewhere: a real HTTP server that fails in every way, and fsspec's other stores."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from megakrause.data import check, formats
from megakrause.data.check import adopt_corpus, verify_corpus
from megakrause.data.remote import BlockCache, Patience
from megakrause.data.shards import Corpus
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.tokens import TokenWindows
from megakrause.errors import UserError
from tests.data.conftest import write_documents

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
        span = self.headers.get("Range")
        if body and span and path.suffix in (".bin", ".ds"):
            with self.server.lock:
                self.server.requests.append(f"{path.name} {span}")
                fault = self.server.always or (self.server.faults.pop(0) if self.server.faults else None)
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
    damaged = max(
        (path for path in cache.folder.glob("??/*") if path.suffix != ".lock"), key=lambda p: p.stat().st_size
    )
    damaged.write_bytes(bytes(damaged.stat().st_size))
    assert same(batches(Corpus.open(f"{server.url}/c", cache=again)), expected)


def test_the_cache_is_bounded(server: Server, prefix: str, tmp_path: Path) -> None:
    limit = 1000
    cache = BlockCache(tmp_path / "cache", limit, PATIENT)
    assert same(batches(Corpus.open(f"{server.url}/c", cache=cache), 30), batches(Corpus.open(prefix), 30))
    kept = [path.stat().st_size for path in cache.folder.glob("??/*") if path.suffix != ".lock"]
    assert 0 < sum(kept) <= limit


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
    from megakrause.data.store import Store

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
