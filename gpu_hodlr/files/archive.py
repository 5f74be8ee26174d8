"""Arrays in .npz files: written whole or not at all, read in full or some rows, never unpickled."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpu_hodlr.devices import HostArray, HostIndex
from gpu_hodlr.errors import FileFormatError

DAMAGE = (  # what reading a damaged or foreign file has been seen to raise
    zipfile.BadZipFile, zlib.error, struct.error, KeyError, ValueError, TypeError, EOFError,
    AttributeError, IndexError, RuntimeError, MemoryError, OverflowError, OSError,
)  # fmt: skip
_CHUNK = 1 << 22  # bytes read at once of an array of which some rows are wanted
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Archive:
    """An open .npz file.

    Args:
        file: its path, or a stream of it.

    Raises:
        Any of DAMAGE: it is no such file; so do the methods.
    """

    def __init__(self, file: Path | IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file)
        self._names = frozenset(self._zip.namelist())

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._names

    def close(self) -> None:
        """Close the file, if it was given by its path."""
        self._zip.close()

    def header(self) -> dict[str, Any]:
        """What the array "header" says."""
        header: dict[str, Any] = json.loads(self.read("header").tobytes())
        return header

    def length(self, name: str) -> int:
        """See `Source`."""
        return self.shape(name)[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Of an array."""
        with self._zip.open(f"{name}.npy") as f:
            return _layout(f)[0]

    def read(self, name: str, rows: slice | HostIndex | None = None) -> HostArray:
        """See `Source`; memory is taken for the rows wanted, but all are read: for the checksum."""
        with self._zip.open(f"{name}.npy") as f:
            if rows is None:
                return np.lib.format.read_array(f, allow_pickle=False)
            shape, by_columns, dtype = _layout(f)
            if dtype.hasobject:
                raise ValueError(f"{name} is pickled")
            if by_columns:
                return self.read(name)[rows]
            return _rows(f, shape, dtype, rows)


def _layout(f: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it is stored by columns, and type of the array that a stream begins with."""
    layout: tuple[tuple[int, ...], bool, np.dtype[Any]]
    layout = _HEADERS[np.lib.format.read_magic(f)](f)
    return layout


def _rows(
    f: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], rows: slice | HostIndex
) -> Any:
    wanted = np.arange(shape[0])[rows]
    out = np.empty((len(wanted), *shape[1:]), dtype)
    size = dtype.itemsize * int(np.prod(shape[1:], dtype=object))
    step = max(1, _CHUNK // max(1, size))
    for start in range(0, shape[0] if size else 0, step):
        stop = min(start + step, shape[0])
        chunk = np.frombuffer(f.read((stop - start) * size), dtype)
        chunk = chunk.reshape(stop - start, *shape[1:])
        first, last = np.searchsorted(wanted, [start, stop])
        out[first:last] = chunk[wanted[first:last] - start]
    return out


@contextmanager
def damage_named(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what reading a damaged file raises into a FileFormatError that names the file."""
    try:
        yield
    except FileFormatError as e:
        raise FileFormatError(f"{path}: {e}") from None
    except DAMAGE as e:
        raise FileFormatError(f"{path} is not a readable gpu_hodlr file: {e}") from e


def write_new(path: Path, header: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write a file that is not there yet; if that fails, it is not there either.

    Raises:
        OSError: it is there, or cannot be written.
    """
    with open(path, "xb") as f:
        try:
            _write(f, header, arrays)
        except BaseException:
            path.unlink(missing_ok=True)
            raise


def write_over(path: Path, header: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write to a temporary file beside `path` and move it there when it is complete.

    Raises:
        OSError: it cannot be written; an old file is whole.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as f:
            _write(f, header, arrays)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private; a saved file is not
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _write(f: IO[bytes], header: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    np.savez(f, **arrays, header=np.frombuffer(json.dumps(header).encode(), np.uint8))
    f.flush()
    os.fsync(f.fileno())
