"""Saving and loading: one uncompressed .npz file with a format version, never pickle."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from gpu_hodlr.arrays import to_host
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.formats.report import CompressionReport
from gpu_hodlr.telescope import Level, Telescope

FORMAT_VERSION = 1


def save_telescope(
    path: str | os.PathLike[str], telescope: Telescope, report: CompressionReport
) -> None:
    """Write to a temporary file beside `path` and move it there when it is complete."""
    header = {
        "format": "gpu_hodlr",
        "version": FORMAT_VERSION,
        "report": asdict(report),
        "ranks": [level.ranks for level in telescope.levels],
    }
    arrays: dict[str, Any] = {
        "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
        "leaves": telescope.leaves,
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


def load_telescope(path: str | os.PathLike[str]) -> tuple[Telescope, CompressionReport]:
    """Read what `save_telescope` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: not such a file, damaged, or of a newer format version.
    """
    try:
        # Opened here: np.load would leave a damaged file open.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as f:
            header = json.loads(f["header"].tobytes())
            if header.get("format") != "gpu_hodlr":
                raise FileFormatError(f"{path} is not a gpu_hodlr file")
            if header["version"] > FORMAT_VERSION:
                raise FileFormatError(
                    f"{path} has format version {header['version']}, "
                    f"this package reads up to {FORMAT_VERSION}"
                )
            levels = tuple(
                Level(f.get(f"order{i}"), f[f"T{i}"], f[f"B{i}"],
                      tuple(ranks))
                for i, ranks in enumerate(header["ranks"])
            )  # fmt: skip
            telescope = Telescope(f["leaves"], f["D"], levels)
        report = header["report"]
        report["capped_levels"] = tuple(report["capped_levels"])
        return telescope, CompressionReport(**report)
    except FileFormatError:
        raise
    except (zipfile.BadZipFile, KeyError, ValueError, TypeError, EOFError, AttributeError) as e:
        raise FileFormatError(f"{path} is not a readable gpu_hodlr file: {e}") from e
