"""Where a corpus lies: on this machine, or anywhere that fsspec reads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megakrause.data.blob import BLOCK, Blob, LocalBlob
from megakrause.data.remote import BlockCache, RemoteBlob, default_folder, is_missing
from megakrause.errors import UserError

# What fsspec's stores call that by which one version of a file is told from another.
VERSION = (
    *("ETag", "etag", "LastModified", "Last-Modified", "last_modified", "mtime", "updated", "modified"),
    *("version", "VersionId", "version_id", "generation", "blob_id", "sha", "ino"),
)


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
        return int(self._info(path)["size"])

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
        """The files in a folder, by name; none where it is no folder, or the store cannot list."""
        if self.is_local:
            return sorted(str(path) for path in Path(folder).iterdir()) if os.path.isdir(folder) else []

        def found() -> list[str]:
            try:
                return list(self._fs.ls(self._inner(folder), detail=False))
            except (NotImplementedError, NotADirectoryError):
                return []
            except FileNotFoundError as error:
                if is_missing(error):
                    return []
                raise

        paths = self._ask(folder, found)
        return sorted(self._outer + path if not path.startswith(self._outer) else path for path in paths)

    def blob(self, path: str, size: int | None = None, hashes: Sequence[str] = (), block_size: int = BLOCK) -> Blob:
        """A file to be read. size: what it must be; None: what it is."""
        if self.is_local:
            return LocalBlob(path, self.size(path) if size is None else size, hashes, block_size)
        version = ""
        if size is None or not hashes:
            info = self._info(path)
            version = " ".join(f"{name}={info[name]}" for name in VERSION if info.get(name))
            size = int(info["size"]) if size is None else size
        return RemoteBlob(self._fs, path, self._inner(path), self._cache, size, hashes, block_size, version)

    def _info(self, path: str) -> dict[str, Any]:
        """What the store says of a file. Raises UserError when it is not there, or its size is not said."""
        info: dict[str, Any] = self._ask(path, lambda: self._fs.info(self._inner(path)))
        if info.get("size") is None:
            raise UserError(f"cannot read {path}: the server does not say how large it is")
        return info

    def _inner(self, path: str) -> str:
        return str(self._fs._strip_protocol(path))

    def _ask(self, path: str, work: Any) -> Any:
        return self._cache.patience.ask(path, work)
