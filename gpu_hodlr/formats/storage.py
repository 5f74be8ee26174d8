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
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.formats.report import CompressionReport
from gpu_hodlr.telescope import Level, Telescope

FORMAT_VERSION = 1
_DAMAGE = (  # what reading a damaged or foreign file has been seen to raise
    zipfile.BadZipFile, zlib.error, struct.error, KeyError, ValueError, TypeError, EOFError,
    AttributeError, IndexError, RuntimeError, MemoryError, OverflowError, OSError,
)  # fmt: skip


def save_telescope(
    path: str | os.PathLike[str],
    telescope: Telescope,
    report: CompressionReport,
    dtype: np.dtype[Any],
) -> None:
    """Write to a temporary file beside `path` and move it there when it is complete."""
    header = {
        "format": "gpu_hodlr",
        "version": FORMAT_VERSION,
        "report": asdict(report),
        "dtype": dtype.name,
        "ranks": [level.ranks for level in telescope.levels],
    }
    arrays: dict[str, Any] = {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "leaves": to_host(telescope.leaves),
        "D": to_host(telescope.D),
    }
    for i, level in enumerate(telescope.levels):
        arrays[f"T{i}"], arrays[f"B{i}"] = to_host(level.T), to_host(level.B)
        if level.order is not None:
            arrays[f"order{i}"] = to_host(level.order)
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


def load_telescope(
    path: str | os.PathLike[str],
) -> tuple[Telescope, CompressionReport, np.dtype[Any]]:
    """Read what `save_telescope` wrote.

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


def _read(stream: IO[bytes]) -> tuple[Telescope, CompressionReport, np.dtype[Any]]:
    with np.load(stream, allow_pickle=False) as f:
        header = json.loads(f["header"].tobytes())
        if header.get("format") != "gpu_hodlr":
            raise FileFormatError("not a gpu_hodlr file")
        if header["version"] > FORMAT_VERSION:
            raise FileFormatError(
                f"format version {header['version']}, this package reads up to {FORMAT_VERSION}"
            )
        levels = tuple(
            Level(f.get(f"order{i}"), f[f"T{i}"], f[f"B{i}"], tuple(ranks))
            for i, ranks in enumerate(header["ranks"])
        )
        telescope = Telescope(f["leaves"], f["D"], levels)
    _check_consistent(telescope)
    report = header["report"]
    report["capped_levels"] = tuple(report["capped_levels"])
    dtype = np.dtype(header.get("dtype", telescope.D.dtype.name))  # older files have none
    if dtype not in FLOATS or dtype.itemsize < telescope.D.dtype.itemsize:
        raise ValueError(f"{telescope.D.dtype} blocks do not fit a matrix of {dtype}")
    return telescope, CompressionReport(**report), dtype


def _check_consistent(telescope: Telescope) -> None:
    """Refuse arrays that do not fit together.

    Raises:
        ValueError: what does not fit.
    """
    leaves, D = telescope.leaves, telescope.D
    nodes, m = leaves.shape
    if nodes & (nodes - 1) or len(telescope.levels) != nodes.bit_length() - 1:
        raise ValueError(f"{nodes} leaves do not fit {len(telescope.levels)} levels")
    real = np.sort(leaves[leaves >= 0])
    if not np.array_equal(real, np.arange(real.size)) or leaves.min() < -1:
        raise ValueError("the leaves are not a permutation")
    if D.shape != (nodes, m, m) or D.dtype not in FLOATS:
        raise ValueError(f"the diagonal blocks have shape {D.shape} and type {D.dtype}")
    rows = m
    for i, level in enumerate(telescope.levels):
        r = level.T.shape[2]
        shapes = (level.T.shape, level.B.shape, len(level.ranks))
        if shapes != ((nodes, rows - r, r), (nodes // 2, r, r), nodes):
            raise ValueError(f"level {i} has shapes {shapes}")
        if level.T.dtype != D.dtype or level.B.dtype != D.dtype:
            raise ValueError(f"level {i} has another type than the diagonal blocks")
        every = np.tile(np.arange(rows), (nodes, 1))
        if (level.order is None) != (i == 0) or (
            level.order is not None and not np.array_equal(np.sort(level.order, axis=1), every)
        ):
            raise ValueError(f"the order of level {i} is not a permutation")
        nodes, rows = nodes // 2, 2 * r
