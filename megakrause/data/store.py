"""Where a corpus lies: on this machine, or anywhere that fsspec reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megakrause.data.blob import BLOCK, Blob, LocalBlob
from megakrause.data.remote import BlockCache, RemoteBlob, default_folder, is_missing
from megakrause.errors import UserError


class Store:
    """The files beside a path or URL. Everything raises UserError with the file's name and what is wrong."""

    def __init__(self, url: str, cache: BlockCache | None = None) -> None:
        """Raises UserError for a kind of URL that nothing installed here reads."""
        self.is_local = "://" not in url
        self._cache = cache or BlockCache(default_folder())
        if not self.is_local:
            import fsspec

            try:
                self._fs, inner = fsspec.core.url_to_fs(url)
            except (ImportError, ValueError) as error:
                raise UserError(f"cannot read {url}: {error}") from error
            self._outer = url[: len(url) - len(inner)] if url.endswith(inner) else f"{url.partition('://')[0]}://"

    def size(self, path: str) -> int:
        """Bytes. Raises UserError when it is not there."""
        if self.is_local:
            try:
                return os.stat(path).st_size
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error
        size = self._ask(path, lambda: self._fs.info(self._inner(path))["size"])
        if size is None:
            raise UserError(f"cannot read {path}: the server does not say how large it is")
        return int(size)

    def exists(self, path: str) -> bool:
        if self.is_local:
            return os.path.exists(path)

        def is_file() -> bool:
            try:
                return bool(self._fs.info(self._inner(path))["type"] == "file")
            except FileNotFoundError as error:
                if is_missing(error):
                    return False
                raise

        return bool(self._ask(path, is_file))

    def read(self, path: str) -> bytes:
        """All of a small file."""
        if self.is_local:
            try:
                return Path(path).read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {path}: {error.strerror}") from error
        return bytes(self._ask(path, lambda: self._fs.cat_file(self._inner(path))))

    def files(self, folder: str) -> list[str]:
        """The files in a folder, by name; none where it is no folder."""
        if self.is_local:
            return sorted(str(path) for path in Path(folder).iterdir()) if os.path.isdir(folder) else []
        try:
            found = self._ask(folder, lambda: self._fs.ls(self._inner(folder), detail=False))
        except UserError:
            return []
        return sorted(self._outer + path if not path.startswith(self._outer) else path for path in found)

    def blob(self, path: str, size: int | None = None, hashes: Sequence[str] = (), block_size: int = BLOCK) -> Blob:
        """A file to be read. size: what it must be; None: what it is."""
        size = self.size(path) if size is None else size
        if self.is_local:
            return LocalBlob(path, size, hashes, block_size)
        return RemoteBlob(self._fs, path, self._inner(path), self._cache, size, hashes, block_size)

    def _inner(self, path: str) -> str:
        return str(self._fs._strip_protocol(path))

    def _ask(self, path: str, work: Any) -> Any:
        return self._cache.patience.ask(path, work)
