"""Saving and loading: one uncompressed .npz file with a format version, never pickle."""

from __future__ import annotations

import json
import os
import struct
import tempfile
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from gpu_hodlr.arrays import FLOATS
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.formats.packing import pack, unpack
from gpu_hodlr.formats.report import CompressionReport
from gpu_hodlr.structures import Structure

FORMAT_VERSION = 2  # 1: telescoping forms only, their name left out
_DAMAGE = (  # what reading a damaged or foreign file has been seen to raise
    zipfile.BadZipFile, zlib.error, struct.error, KeyError, ValueError, TypeError, EOFError,
    AttributeError, IndexError, RuntimeError, MemoryError, OverflowError, OSError,
)  # fmt: skip


def save_structure(
    path: str | os.PathLike[str],
    structure: Structure,
    report: CompressionReport,
    dtype: np.dtype[Any],
) -> None:
    """Write to a temporary file beside `path` and move it there when it is complete."""
    arrays, ranks = pack(structure)
    header = {
        "format": "gpu_hodlr",
        "version": FORMAT_VERSION,
        "structure": type(structure).__name__,
        "report": asdict(report),
        "dtype": dtype.name,
        "ranks": ranks,
    }
    arrays["header"] = np.frombuffer(json.dumps(header).encode(), np.uint8)
    target = Path(path)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=target.name + ".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as f:
            np.savez(f, **arrays)
            f.flush()
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp makes it private; a saved file is not
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load_structure(
    path: str | os.PathLike[str],
) -> tuple[Structure, CompressionReport, np.dtype[Any]]:
    """Read what `save_structure` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: not such a file, damaged, or of a newer format version.
    """
    with open(path, "rb") as stream:
        try:
            return _read(stream)
        except FileFormatError as e:
            raise FileFormatError(f"{path}: {e}") from None
        except _DAMAGE as e:
            raise FileFormatError(f"{path} is not a readable gpu_hodlr file: {e}") from e


def _read(stream: IO[bytes]) -> tuple[Structure, CompressionReport, np.dtype[Any]]:
    with np.load(stream, allow_pickle=False) as f:
        header = json.loads(f["header"].tobytes())
        if header.get("format") != "gpu_hodlr":
            raise FileFormatError("not a gpu_hodlr file")
        if header["version"] > FORMAT_VERSION:
            raise FileFormatError(
                f"format version {header['version']}, this package reads up to {FORMAT_VERSION}"
            )
        structure = unpack(header.get("structure", "Telescope"), f, header["ranks"])
    report = header["report"]
    report["capped_levels"] = tuple(report["capped_levels"])
    dtype = np.dtype(header.get("dtype", structure.dtype.name))  # older files have none
    if dtype not in FLOATS or dtype.itemsize < structure.dtype.itemsize:
        raise ValueError(f"{structure.dtype} blocks do not fit a matrix of {dtype}")
    return structure, CompressionReport(**report), dtype
