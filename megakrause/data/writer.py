"""The writer of corpora: hashes while it writes, publishes all files or none, and goes on where a dead one stopped."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from megakrause.data.blob import BLOCK
from megakrause.data.formats import Cuts
from megakrause.data.journal import (
    Journal,
    journal_path,
    read_journal,
    remove_journal,
    sync_folder,
    write_journal,
)
from megakrause.data.layout import (
    FileInfo,
    ImagesInfo,
    Manifest,
    TokenizerInfo,
    check_output,
    manifest_path,
    token_dtype,
    unfinished_path,
)
from megakrause.data.shard_files import ShardFiles, size_of, temporary_path
from megakrause.errors import UserError

SHARD_BYTES = 4 << 30


class CorpusWriter:
    """Writes a corpus, as a context: leaving it commits, an exception inside leaves what stood there before.

    Everything is written under temporary names in the corpus's folder, synced, renamed, the manifest last; killed at
    any moment, it leaves the old corpus or nothing that opens. Memory does not grow with the corpus.

    Given `settings`, what was added up to the last `save` outlives an exception and a kill: a writer with the same
    settings goes on there, and `progress` is what that `save` was given. `anew` says why it does not, if it could have.
    """

    def __init__(
        self,
        prefix: str | Path,
        content: TokenizerInfo | ImagesInfo,
        *,
        shard_bytes: int = SHARD_BYTES,
        block_size: int | None = None,
        settings: dict[str, Any] | None = None,
        prompts: bool = False,
    ) -> None:
        """content: what the documents are. block_size: bytes that are hashed together, and so read together at first.
        prompts: some tokens are only read (layout.py). settings: JSON that determines every document that will be
        added. Raises UserError when the folder cannot be written, `prefix` is no name for a corpus, or another process
        is writing this corpus."""
        check_output(prefix)
        self.prefix = Path(prefix)
        self.content, self.prompts, self._block_size = content, prompts, block_size or BLOCK
        if isinstance(content, ImagesInfo):
            self.dtype, self._known = np.dtype(np.uint8), range(256)
        else:
            self.dtype = token_dtype(content.vocab_size, prompts=prompts)
            self._known = range(-content.vocab_size if prompts else 0, content.vocab_size)
        self.num_tokens = self.num_documents = self.text_bytes = 0
        self.progress: dict[str, Any] | None = None
        self.anew: str | None = None
        self._settings = settings
        self._shard_tokens = max(1, shard_bytes // self.dtype.itemsize)
        self._files: list[FileInfo] = []  # of finished shards
        self._blocks: list[Cuts] = []  # of each of them
        self._shard: ShardFiles | None = None
        self._finished = False  # files may have their final names already
        try:
            self.prefix.parent.mkdir(parents=True, exist_ok=True)
            self._lock = unfinished_path(prefix).open("a")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing the corpus {prefix}; wait, or choose another name") from error
        except OSError as error:
            raise UserError(f"cannot write a corpus at {prefix}: {error.strerror}") from error
        journal = read_journal(prefix)
        if journal:
            self.anew = self._why_anew(journal)
        if journal and not self.anew:
            self._restore(journal)
        else:
            remove_journal(prefix)
            for stale in self._paths(temporary=True):
                stale.unlink()

    def add(self, tokens: np.ndarray, lengths: np.ndarray, text_bytes: int) -> None:
        """Appends whole documents: `tokens` [n] of one after the other, their `lengths` [documents], and the size of
        their text as UTF-8."""
        if len(tokens) and not self._known.start <= tokens.min() <= tokens.max() < self._known.stop:
            raise ValueError(f"ids {tokens.min()} to {tokens.max()} in a vocabulary of {self._known.stop}")
        ends = np.cumsum(lengths, dtype=np.int64)
        document, start = 0, 0
        while document < len(ends):
            shard = self._shard or self._next_shard()
            fit = int(np.searchsorted(ends, start + self._shard_tokens - shard.num_tokens, "right"))
            if fit <= document and shard.num_tokens:
                self._finish_shard()
                continue
            stop = max(fit, document + 1)
            end = int(ends[stop - 1])
            shard.add(tokens[start:end].astype(self.dtype, copy=False), lengths[document:stop])
            document, start = stop, end
        self.num_tokens += len(tokens)
        self.num_documents += len(lengths)
        self.text_bytes += text_bytes

    def save(self, progress: dict[str, Any]) -> None:
        """Makes what was added so far outlive this process, with `progress`: JSON that says where to go on."""
        self.progress = progress
        if self._shard:
            self._shard.sync()
        self._write_journal(finished=self._finished)

    def __enter__(self) -> CorpusWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            try:
                if kind is None:
                    self._finish_shard()
                    if not self.num_tokens:
                        remove_journal(self.prefix)
                        what = "no image" if isinstance(self.content, ImagesInfo) else "no document has any text"
                        raise UserError(f"{what}: the corpus {self.prefix} would be empty")
            except BaseException:
                self._leave()
                raise
            if kind is None:
                if self._settings is not None:
                    self._write_journal(finished=True)
                self._publish()
            else:
                self._leave()

    def _why_anew(self, journal: Journal) -> str | None:
        """What forbids to go on from a journal."""
        settings = self._settings or {}
        names = {*settings, *journal.settings}
        if changed := sorted(name for name in names if settings.get(name) != journal.settings.get(name)):
            return f"{', '.join(changed)} changed"
        for info, final in zip(journal.files, self._final_paths(journal.files), strict=True):
            path = temporary_path(self.prefix.with_name(info.name))
            if size_of(path) != info.size and not (journal.finished and size_of(final) == info.size):
                return f"{path} has not the {info.size} bytes that were written"
        if journal.shard:
            path = self._shard_path(len(journal.files) // 2)
            if not ShardFiles.is_whole(path, self.dtype, journal.shard):
                return f"{path} has not the {journal.shard.tokens} tokens that were written"
        return None

    def _restore(self, journal: Journal) -> None:
        self.progress, self._finished = journal.progress, journal.finished
        self.num_tokens, self.num_documents = journal.tokens, journal.documents
        self.text_bytes = journal.text_bytes
        self._files, self._blocks = journal.files, journal.blocks
        if journal.shard:
            self._shard = ShardFiles(
                self._shard_path(len(self._files) // 2), self.dtype, self._block_size, journal.shard
            )

    def _write_journal(self, *, finished: bool) -> None:
        journal = Journal(
            settings=self._settings or {},
            progress=self.progress or {},
            tokens=self.num_tokens,
            documents=self.num_documents,
            text_bytes=self.text_bytes,
            files=self._files,
            blocks=self._blocks,
            shard=self._shard.state() if self._shard else None,
            finished=finished,
        )
        write_journal(self.prefix, journal)

    def _shard_path(self, number: int) -> Path:
        return self.prefix.with_name(f"{self.prefix.name}-{number:05d}")

    def _next_shard(self) -> ShardFiles:
        self._shard = ShardFiles(self._shard_path(len(self._files) // 2), self.dtype, self._block_size)
        return self._shard

    def _finish_shard(self) -> None:
        if self._shard:
            self._files += self._shard.finish()
            self._blocks.append(self._shard.cuts())
            self._shard = None

    def _final_paths(self, files: list[FileInfo]) -> list[Path]:
        """The names of shards when all are there: one alone has no number."""
        if len(files) == 2:
            return [self.prefix.with_name(self.prefix.name + file.name[-4:]) for file in files]
        return [self.prefix.with_name(file.name) for file in files]

    def _publish(self) -> None:
        """Puts the new files in the place of the old, in an order that lets nothing half-done open, and that can begin
        again after any step."""
        final = self._final_paths(self._files)
        manifest = Manifest(
            dtype=self.dtype.name,
            tokens=self.num_tokens,
            documents=self.num_documents,
            text_bytes=None if isinstance(self.content, ImagesInfo) else self.text_bytes,
            block_size=self._block_size,
            tokenizer=None if isinstance(self.content, ImagesInfo) else self.content,
            images=self.content if isinstance(self.content, ImagesInfo) else None,
            prompts=self.prompts,
            files=[
                FileInfo(name=path.name, size=info.size, blocks=info.blocks)
                for path, info in zip(final, self._files, strict=True)
            ],
            blocks=self._blocks,
        )
        with unfinished_path(self.prefix).open("w") as output:
            output.write(manifest.model_dump_json(indent=1) + "\n")
            output.flush()
            os.fsync(output.fileno())
        manifest_path(self.prefix).unlink(missing_ok=True)
        sync_folder(self.prefix.parent)
        for old in set(self._paths(temporary=False)).difference(final):
            old.unlink()
        for path, info in zip(final, self._files, strict=True):
            written = temporary_path(self.prefix.with_name(info.name))
            if written.exists():  # else an earlier attempt came past here
                os.replace(written, path)
        sync_folder(self.prefix.parent)
        os.replace(unfinished_path(self.prefix), manifest_path(self.prefix))
        sync_folder(self.prefix.parent)
        remove_journal(self.prefix)

    def _leave(self) -> None:
        """After an exception: keeps what can go on."""
        if self._shard:
            self._shard.close()
        if not journal_path(self.prefix).exists():
            self._discard()

    def _discard(self) -> None:
        for path in self._paths(temporary=True):
            path.unlink()
        remove_journal(self.prefix)
        unfinished_path(self.prefix).unlink(missing_ok=True)

    def _paths(self, *, temporary: bool) -> list[Path]:
        """This prefix's shards in the folder."""
        pattern = re.compile(re.escape(self.prefix.name) + r"(-\d{5})?\.(bin|idx)" + (r"\.tmp" if temporary else ""))
        return [path for path in self.prefix.parent.iterdir() if pattern.fullmatch(path.name)]
