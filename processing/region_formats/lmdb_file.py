"""What the formats in LMDB have in common: read-only access to one file, from several readers and forked processes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .reader import RegionFormatError, missing_extra

# Of the first page: 16 bytes of page header, then the magic number.
MAGIC_OFFSET, MAGIC = 16, b"\xde\xc0\xef\xbe"


def import_lmdb():
    try:
        import lmdb
    except ImportError as error:
        raise missing_extra("lmdb", "LMDB") from error
    return lmdb


def data_file(path: Path) -> Path:
    """The file with the data: LMDB makes a folder with `data.mdb` in it, or, when asked for it, a single file."""
    return path / "data.mdb" if path.is_dir() else path


def is_lmdb(path: Path) -> bool:
    if path.is_dir():
        return data_file(path).is_file()
    with open(path, "rb") as file:
        return file.read(MAGIC_OFFSET + len(MAGIC))[MAGIC_OFFSET:] == MAGIC


class LMDBFile:
    """
    A read-only LMDB. Get one from [`open_lmdb`]: a process may open each only once.

    LMDB maps the file into memory and trusts what it finds there. A file that is shorter than it says, where reading
    would end the process, is refused; its inner structure is not examined. (Where entries have been deleted, LMDB
    itself can leave a file short; `mdb_copy -c` rewrites it.)
    """

    def __init__(self, path: Path):
        self.path = path
        self._environment, self._process = self._open(), os.getpid()

    @property
    def environment(self):
        if self._process != os.getpid():
            self._environment.close()  # that of the process which this one was forked from
            self._environment, self._process = self._open(), os.getpid()
        return self._environment

    def _open(self):
        lmdb = import_lmdb()
        try:
            environment = lmdb.open(
                str(self.path), subdir=self.path.is_dir(), readonly=True, lock=False, readahead=False, create=False
            )
        except lmdb.Error as error:
            raise RegionFormatError(f"{self.path}: expected an LMDB, {error}.") from error
        expected = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
        got = data_file(self.path).stat().st_size
        if got < expected:
            environment.close()
            raise RegionFormatError(f"{self.path}: expected an LMDB of {expected} bytes, got {got}: it is truncated.")
        return environment

    @contextmanager
    def _transaction(self, **kwargs) -> Iterator:
        try:
            with self.environment.begin(**kwargs) as transaction:
                yield transaction
        except import_lmdb().Error as error:
            raise RegionFormatError(f"{self.path}: damaged LMDB, {error}.") from error

    def get(self, key: bytes) -> bytes | None:
        with self._transaction() as transaction:
            return transaction.get(key)

    @contextmanager
    def view(self, key: bytes) -> Iterator[memoryview | None]:
        """The value in the mapped memory: only those of its pages are read from the disk that are looked at."""
        with self._transaction(buffers=True) as transaction:
            yield transaction.get(key)

    def close(self):
        """Nothing: other readers may use the file. It is closed when the last of them forgets it."""


_open_files: weakref.WeakValueDictionary[tuple[int, int], LMDBFile] = weakref.WeakValueDictionary()


def open_lmdb(path: Path) -> LMDBFile:
    """
    Raises:
        `RegionFormatError`: there is no LMDB, or it is truncated.
    """
    try:
        status = data_file(path).stat()
    except OSError as error:
        raise RegionFormatError(f"{path}: expected an LMDB, {error}.") from error
    key = (status.st_dev, status.st_ino)
    file = _open_files.get(key)
    if file is None:
        file = _open_files[key] = LMDBFile(path)
    return file
