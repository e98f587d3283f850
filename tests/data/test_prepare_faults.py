"""Preparation that is stopped: killed, interrupted, out of disk, out of patience; and what goes on from there."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

from megakrause.data import prepare, sources, writer
from megakrause.data.check import verify_corpus
from megakrause.data.prepare import Summary, tokenize_corpus
from megakrause.data.shards import Corpus
from megakrause.data.tokenizer import Tokenizer
from megakrause.data.writer import CorpusWriter
from megakrause.errors import UserError
from tests import disks
from tests.disks import needs_root

pytestmark = pytest.mark.faults

ROOT = Path(__file__).parents[2]

# The command, which saves at every group and takes small ones, so that there are many moments to stop it at.
COMMAND = f"""
import runpy, sys
from megakrause.data import prepare, sources

if __name__ == "__main__":
    prepare.SAVE_SECONDS, sources.CHUNK = 0.0, 1 << 16
    runpy.run_path({str(ROOT / "data_prep" / "tokenize_text.py")!r}, run_name="__main__")
"""


def texts(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    words = ["self", "return", "x", "=", "0\n", "    ", "def", "é", "\u2581", "中"]
    return [" ".join(draw.choices(words, k=draw.randrange(1, 300))) for _ in range(count)]


def lines(count: int, seed: int) -> bytes:
    made = [json.dumps({"text": text}) for text in texts(count, seed)]
    for bad in range(7, count, 100):
        made[bad] = '{"text": 5}'
    return "\n".join(made).encode()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs of every kind, about 4 MB."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "a.jsonl").write_bytes(lines(1500, 1))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(1500, 2), 1))
    truncated = gzip.compress(lines(300, 3), 1)[:-3000]
    (folder / "c.jsonl.gz").write_bytes(truncated)
    table = pa.table({"text": [None if number % 99 == 98 else text for number, text in enumerate(texts(1500, 4))]})
    parquet.write_table(table, folder / "d.parquet", row_group_size=111)
    (folder / "e.txt").write_text("\n=\n".join(texts(1000, 5)))
    for number, text in enumerate(texts(50, 6)):
        (folder / f"f{number}.md").write_text(text)
    return folder


@pytest.fixture(scope="module")
def undisturbed(mixed: Path, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    options: dict[str, Any] = {"shard_bytes": 1 << 20, "document_separator": "=", "skip_damaged": True}
    tokenize_corpus([str(mixed)], tokenizer, folder / "corpus", **options)
    made = contents(folder)
    assert len(made) > 4 and "corpus.quarantine.jsonl" in made
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Command:
    """The command, run and stopped."""

    def __init__(self, mixed: Path, folder: Path, tokenizer: Tokenizer) -> None:
        (folder / "run.py").write_text(COMMAND)
        self.out = folder / "out"
        self.journal = self.out / "corpus.journal.json"
        self._arguments = [
            sys.executable, str(folder / "run.py"), "--input", str(mixed), "--tokenizer", tokenizer.path,
            "--output", str(self.out / "corpus"), "--shard-mb", "1", "--document-separator", "=",
            "--max-rejected", "10%", "--skip-damaged",
        ]  # fmt: skip

    def start(self, *more: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([*self._arguments, *more], env=environment, stderr=subprocess.PIPE, text=True)

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """(exit code, standard error)"""
        _, errors = process.communicate(timeout=100)
        return process.returncode, "\n".join(re.split("[\r\n]+", errors))

    def documents(self) -> int:
        """What the journal says is done."""
        return json.loads(self.journal.read_bytes())["documents"] if self.journal.exists() else 0

    def wait_for(self, process: subprocess.Popen[str], documents: int) -> None:
        deadline = time.monotonic() + 100
        while self.documents() < documents:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def command(mixed: Path, tmp_path: Path, tokenizer: Tokenizer) -> Command:
    return Command(mixed, tmp_path, tokenizer)


def test_killed_it_goes_on_and_redoes_nothing(command: Command, undisturbed: dict[str, bytes]) -> None:
    """Killed twice and interrupted once, with another number of workers each time."""
    done = 0
    for number, documents in enumerate((1, 2000, 4300)):
        process = command.start("--workers", str(1 + number % 3))
        command.wait_for(process, documents)
        children = psutil.Process(process.pid).children(recursive=True)
        how = signal.SIGINT if number == 1 else signal.SIGKILL
        process.send_signal(how)
        code, errors = command.end(process)
        assert code == (130 if how == signal.SIGINT else -9), errors
        assert ("interrupted: run the same again; it goes on where it was" in errors) == (how == signal.SIGINT)
        assert not psutil.wait_procs(children, timeout=10)[1]
        assert (f"going on after {done} documents" in errors) == (done > 0), errors
        with pytest.raises(UserError, match="is unfinished"):
            Corpus.open(command.out / "corpus")
        assert command.documents() >= max(done, documents)
        done = command.documents()
    code, errors = command.end(command.start("--workers", "2"))
    assert code == 0 and f"going on after {done} documents" in errors
    assert contents(command.out) == undisturbed
    assert verify_corpus(command.out / "corpus")["hashed"]


@pytest.fixture
def make(mixed: Path, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Summary]:
    """The same as a call of `tokenize_corpus`; stop=n interrupts it at its n-th save."""
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(sources, "CHUNK", 1 << 16)

    def run(stop: int | None = None, **options: Any) -> Summary:
        saves = iter(range(stop or 0))

        def save(self: CorpusWriter, progress: dict[str, Any]) -> None:
            if stop and next(saves, None) is None:
                raise KeyboardInterrupt
            plain(self, progress)

        plain = CorpusWriter.save
        with monkeypatch.context() as patch:
            patch.setattr(CorpusWriter, "save", save)
            options = {"shard_bytes": 1 << 20, "document_separator": "=", "skip_damaged": True, **options}
            return tokenize_corpus([str(mixed)], tokenizer, tmp_path / "out" / "corpus", **options)

    return run


def journal_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "corpus.journal.json").read_bytes())


def test_other_settings_or_inputs_start_anew(
    make: Callable[..., Summary], mixed: Path, tmp_path: Path, undisturbed: dict[str, bytes], capfd
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(stop=20, min_chars=50)
    with pytest.raises(KeyboardInterrupt):
        make(stop=30)
    assert "starting anew: min_chars changed" in (errors := capfd.readouterr().err) and "going on" not in errors
    table = mixed / "d.parquet"
    os.utime(table, ns=(table.stat().st_atime_ns, table.stat().st_mtime_ns + 1))
    make()
    assert "starting anew: inputs changed" in (errors := capfd.readouterr().err) and "going on" not in errors
    assert contents(tmp_path / "out") == undisturbed


def test_a_journal_whose_files_are_gone_is_not_followed(
    make: Callable[..., Summary], tmp_path: Path, undisturbed: dict[str, bytes], capfd
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(stop=30)
    last = max((tmp_path / "out").glob("corpus-*.bin.tmp"))
    os.truncate(last, last.stat().st_size // 2)
    make()
    assert f"starting anew: {last.with_suffix('').with_suffix('')}" in capfd.readouterr().err
    assert contents(tmp_path / "out") == undisturbed


def test_a_changed_quarantine_is_refused(make: Callable[..., Summary], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(stop=30)
    (tmp_path / "out" / "corpus.quarantine.jsonl").unlink()
    with pytest.raises(UserError, match="put it back, or remove [^\n]*corpus.journal.json to start anew$"):
        make()


def test_too_many_bad_documents_stop_it(
    make: Callable[..., Summary], tmp_path: Path, undisturbed: dict[str, bytes], capfd
) -> None:
    with pytest.raises(UserError, match=r"^2\d of \d+ documents were rejected, more than 20: the first is [^\n]*$"):
        make(max_rejected=20)
    done = journal_of(tmp_path / "out")["documents"]
    assert 1000 < done < 4000
    with pytest.raises(UserError, match=r"more than 0\.9 %: the first is \S+/a.jsonl, line 8 \(field 'text' is no "):
        make(max_rejected=0.009)
    assert f"going on after {done} documents" in capfd.readouterr().err
    make(max_rejected=0.1)
    assert contents(tmp_path / "out") == undisturbed


def test_a_damaged_file_stops_it_unless_it_may_be_skipped(
    make: Callable[..., Summary], mixed: Path, tmp_path: Path, undisturbed: dict[str, bytes], capfd
) -> None:
    said = f"^{mixed}/c.jsonl.gz cannot be read to its end: Truncated [^\n]* with --skip-damaged$"
    with pytest.raises(UserError, match=said):
        make(skip_damaged=False)
    done = journal_of(tmp_path / "out")["documents"]
    assert done > 2500  # all before it
    with pytest.raises(UserError, match=said):  # as often as it is tried
        make(skip_damaged=False)
    with pytest.raises(KeyboardInterrupt):
        make(stop=10)
    with pytest.raises(UserError, match=f"^{mixed}/c.jsonl.gz could not be read to its end and was skipped before: "):
        make(skip_damaged=False)
    assert f"going on after {done} documents" in capfd.readouterr().err
    summary = make()
    assert summary.damaged == 1 and summary.quarantine is not None
    listed = [json.loads(line) for line in summary.quarantine.read_text().splitlines()]
    assert [Path(entry["source"]).name for entry in listed if entry["damaged"]] == ["c.jsonl.gz"]
    assert len(listed) == summary.rejected + 1
    assert contents(tmp_path / "out") == undisturbed


def test_a_file_that_is_mended_is_read(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time and size may be what they were: nothing of it was counted."""
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_bytes(json.dumps({"text": name * 50}).encode())
    plain = sources.file_records

    def refused(file: Any, source: Any, *rest: Any) -> Any:
        if source.path.endswith("b.jsonl"):
            raise PermissionError(13, "Permission denied")
        return plain(file, source, *rest)

    def make(**options: Any) -> Summary:
        return tokenize_corpus([str(tmp_path / "*.jsonl")], tokenizer, tmp_path / "c", **options)

    with monkeypatch.context() as patch:
        patch.setattr(sources, "file_records", refused)
        with pytest.raises(UserError, match=f"^{tmp_path}/b.jsonl cannot be read to its end: Permission denied; mend"):
            make()
        skipped = tokenize_corpus([str(tmp_path / "*.jsonl")], tokenizer, tmp_path / "d", skip_damaged=True)
        assert (skipped.documents, skipped.rejected, skipped.damaged) == (2, 0, 1)
    assert (made := make()).documents == 3 and made.quarantine is None


def test_tables_that_are_lost_are_counted_as_files(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, other = (pa.table({name: [str(n) for n in range(40)]}) for name in ("text", "words"))
    parquet.write_table(other, tmp_path / "a.parquet", row_group_size=10)
    parquet.write_table(good, tmp_path / "b.parquet", row_group_size=10, compression="none", use_dictionary=False)
    content = (tmp_path / "b.parquet").read_bytes()
    groups = parquet.ParquetFile(tmp_path / "b.parquet").metadata
    for start in (groups.row_group(number).column(0).data_page_offset for number in (1, 3)):
        content = content[:start] + bytes(20) + content[start + 20 :]
    (tmp_path / "b.parquet").write_bytes(content)
    (tmp_path / "c.parquet").write_bytes(b"PAR1")
    (tmp_path / "d.txt").write_bytes(b"caf\xe9")  # a bad document, no damage
    for workers in (1, 2):
        made = tokenize_corpus([str(tmp_path)], tokenizer, tmp_path / "x", workers=workers, skip_damaged=True)
        assert (made.documents, made.rejected, made.damaged) == (20, 1, 3)
    with pytest.raises(UserError, match="a.parquet cannot be read to its end: no column 'text' but 'words'; "):
        tokenize_corpus([str(tmp_path)], tokenizer, tmp_path / "y")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disks.small_disk(tmp_path / "out", "1500k") as folder:
        yield folder


@needs_root
def test_a_full_disk_is_one_line_and_room_lets_it_go_on(
    make: Callable[..., Summary], small_disk: Path, undisturbed: dict[str, bytes], capfd
) -> None:
    said = f"^the disk of {small_disk}/corpus is full: make room and run the same again; it goes on where it was$"
    done = 300
    for _ in range(2):
        with pytest.raises(UserError, match=said):
            make()
        assert journal_of(small_disk)["documents"] >= done
        done = journal_of(small_disk)["documents"]
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    capfd.readouterr()
    make()
    assert f"going on after {done} documents" in capfd.readouterr().err
    assert contents(small_disk) == undisturbed


class Death(BaseException):
    pass


@pytest.mark.parametrize("old", [False, True])
def test_death_at_any_moment(old: bool, tmp_path_factory, monkeypatch, tokenizer: Tokenizer) -> None:
    """Whatever call was the last, the same call again gives the files of an undisturbed run, or they are there."""
    source = tmp_path_factory.mktemp("source")
    (source / "a.jsonl").write_bytes(lines(30, 1))
    (source / "b.jsonl.gz").write_bytes(gzip.compress(lines(30, 2)))
    monkeypatch.setattr(sources, "CHUNK", 3000)
    monkeypatch.setattr(prepare, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(writer, "BLOCK", 1000)  # bytes, of shards of 4000

    def make(folder: Path, max_chars: int | None = None) -> None:
        tokenize_corpus([str(source)], tokenizer, folder / "c", shard_bytes=4000, max_chars=max_chars)

    undisturbed = tmp_path_factory.mktemp("undisturbed")
    make(undisturbed)
    expected = contents(undisturbed)
    assert len(expected) > 6
    for moment in range(0, 1000, 7):
        folder = tmp_path_factory.mktemp("death")
        if old:
            make(folder, max_chars=1000)
        calls = iter(range(moment))

        def mortal(function: Callable, calls: Iterator[int] = calls) -> Callable:
            def call(*args, **options):
                if next(calls, None) is None:
                    raise Death
                return function(*args, **options)

            return call

        with monkeypatch.context() as patch:
            patch.setattr(CorpusWriter, "_leave", lambda self: None)  # the dead do not tidy up
            for owner, name in ((os, "replace"), (os, "fsync"), (os, "truncate"), (Path, "unlink")):
                patch.setattr(owner, name, mortal(getattr(owner, name)))
            try:
                make(folder)
                died = False
            except Death:
                died = True
        try:
            assert Corpus.open(folder / "c").num_documents and verify_corpus(folder / "c")["hashed"]
        except UserError as error:
            assert "is unfinished" in str(error) or "there is no corpus" in str(error)
        make(folder)
        assert contents(folder) == expected
        if not died:
            break
    assert not died and moment > 60


def test_a_run_that_died_at_its_very_end_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(30, 1))

    def make() -> int:
        return tokenize_corpus([str(tmp_path / "a.jsonl")], tokenizer, tmp_path / "c", overwrite=False).documents

    def die(prefix: Path) -> None:
        raise Death

    with monkeypatch.context() as patch:
        patch.setattr(writer, "remove_journal", lambda prefix: die(prefix) if (tmp_path / "c.bin").exists() else None)
        with pytest.raises(Death):
            make()
    assert (tmp_path / "c.journal.json").exists()
    before = (tmp_path / "c.bin").read_bytes()
    assert make() == 29 and "going on after 29 documents" in capsys.readouterr().err
    assert (tmp_path / "c.bin").read_bytes() == before and verify_corpus(tmp_path / "c")["hashed"]
    assert not (tmp_path / "c.journal.json").exists()
    with pytest.raises(UserError, match="^the corpus [^\n]* is there and finished: [^\n]*$"):
        make()


def peak_memory(process: subprocess.Popen[str]) -> int:
    """Peak resident memory of a process and its children, each at its own time, in bytes."""
    peaks: dict[int, list[int]] = {}
    while process.poll() is None:
        try:
            tree = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            break
        for pid in tree:
            try:
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:
                continue
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                peaks.setdefault(pid, []).append(int(found[1]) << 10)
        time.sleep(0.02)
    # One that has just been forked counts as its parent does, until it becomes another program.
    return sum(seen[-1] for seen in peaks.values() if len(seen) > 10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_memory_does_not_grow_with_the_corpus(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    peaks = []
    for size in (3, 12):  # 40 and 160 MB unpacked: smaller ones end before buffers and caches have their size
        block = lines(4000, 1) + b"\n" + b'{"text": "x"}\n' * 100_000  # 4 MB
        with (gzip.open if kind.endswith("gz") else open)(tmp_path / f"{size}.{kind}", "wb") as file:
            for _ in range(3 * size):
                file.write(block)
        arguments = ["--workers", "2", "--max-rejected", "5%", "--output", str(tmp_path / f"out{size}")]
        arguments += ["--input", str(tmp_path / f"{size}.{kind}"), "--tokenizer", tokenizer.path]
        script = str(ROOT / "data_prep" / "tokenize_text.py")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen([sys.executable, script, *arguments], env=environment, stderr=subprocess.DEVNULL)
        peaks.append(peak_memory(process))
        assert process.returncode == 0
    assert Corpus.open(tmp_path / "out12").num_documents > 3_600_000
    assert peaks[1] - peaks[0] < 8 << 20, peaks
