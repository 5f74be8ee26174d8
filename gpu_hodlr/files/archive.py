"""Reading .npz files: arrays in full or some rows, never unpickled, nothing inflated."""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import numpy as np

from gpu_hodlr.arrays import FLOATS, check_finite
from gpu_hodlr.devices import HostArray, HostIndex
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.files.writing import AnyPath

DAMAGE = (  # what reading a damaged or foreign file has been seen to raise
    zipfile.BadZipFile, zlib.error, struct.error, KeyError, ValueError, TypeError, EOFError,
    AttributeError, IndexError, RuntimeError, MemoryError, OverflowError, OSError,
)  # fmt: skip
_CHUNK = 1 << 22  # bytes read at once of an array of which some rows are wanted
_AST_LOCK = threading.Lock()  # NumPy reads them by `ast`, which threads break in Python 3.11.0 to 7
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Archive:
    """An open .npz file whose arrays are stored as they are.

    Args:
        file: a stream of it.

    Raises:
        Any of DAMAGE: it is no such file; so do the methods.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._zip = zipfile.ZipFile(file)
        entries = self._zip.infolist()
        self._sizes = {entry.filename: entry.file_size for entry in entries}
        if len(self._sizes) != len(entries):
            raise ValueError("an array is there twice")
        # What is inflated, or said to be longer than the file, could take any amount of memory.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its arrays are compressed")
        if sum(self._sizes.values()) > file.seek(0, 2):
            raise ValueError("its arrays are longer than the file")

    def __contains__(self, name: str) -> bool:
        return f"{name}.npy" in self._sizes

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
            return self._layout(f, name)[0]

    def read(self, name: str, rows: slice | HostIndex | None = None) -> HostArray:
        """See `Source`; memory is taken for the rows wanted, but all are read: for the checksum.

        Raises:
            ArgumentError: what is wanted of it is not finite.
        """
        array = self._read(name, rows)
        if array.dtype in FLOATS:
            check_finite(array, name)
        return array

    def _read(self, name: str, rows: slice | HostIndex | None) -> HostArray:
        with self._zip.open(f"{name}.npy") as f:
            shape, by_columns, dtype = self._layout(f, name)
            if not by_columns:
                return _rows(f, shape, dtype, rows)
            array = _rows(f, shape[::-1], dtype, None).T
        return array if rows is None else array[rows]

    def _layout(self, f: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
        """Shape, whether it is stored by columns, and type of the array that a stream begins with.

        Raises:
            ValueError: it is pickled, or has not the bytes that its shape takes.
        """
        layout: tuple[tuple[int, ...], bool, np.dtype[Any]]
        with _AST_LOCK:
            layout = _HEADERS[np.lib.format.read_magic(f)](f)
        shape, _, dtype = layout
        if dtype.hasobject:
            raise ValueError(f"{name} is pickled")
        left = self._sizes[f"{name}.npy"] - f.tell()
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != left:
            raise ValueError(f"{name} has {left} bytes, which are not an array of shape {shape}")
        return layout


def _rows(
    f: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any], rows: slice | HostIndex | None
) -> HostArray:
    if rows is None:
        whole = np.empty(shape, dtype)
        left = whole.reshape(-1).view(np.uint8)
        for start in range(0, len(left), _CHUNK):
            left[start : start + _CHUNK] = np.frombuffer(f.read(_CHUNK), np.uint8)
        return whole
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
def damage_named(path: AnyPath) -> Iterator[None]:
    """Turn what reading a damaged file raises into a FileFormatError that names the file."""
    try:
        yield
    except FileFormatError as e:
        raise FileFormatError(f"{os.fsdecode(path)}: {e}") from None
    except DAMAGE as e:
        raise FileFormatError(f"{os.fsdecode(path)} is not a readable gpu_hodlr file: {e}") from e
