"""Saving and loading: uncompressed .npz files with a format version, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from gpu_hodlr.arrays import FLOATS
from gpu_hodlr.distributed import ALONE, Communicator, Ownership
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.files.archive import Archive, damage_named, write_over
from gpu_hodlr.files.spread_storage import (
    INDEX_VERSION,
    PART,
    SpreadArchive,
    part_files,
    remove,
    save_spread,
)
from gpu_hodlr.structures import Structure
from gpu_hodlr.structures.stored import Source

FORMAT_VERSION = INDEX_VERSION  # the newest that can be read
_FILE_VERSION = 2  # of one file that has it all; 1: telescoping forms only, their name left out


def save_structure(
    path: str | os.PathLike[str],
    structure: Structure,
    report: Mapping[str, Any],
    dtype: np.dtype[Any],
) -> None:
    """Write one file; on many ranks, which all call, a file a rank and an index of them.

    Args:
        path: of the file.
        structure: the arrays.
        report: what is to be known of them, for JSON.
        dtype: of the matrix they are.

    Raises:
        OSError: a file cannot be written; what was saved at `path` before is whole.
        ArgumentError: the ranks have different paths.
    """
    comm = structure.owners.comm
    comm.same(path=os.fspath(path))
    with comm.agreed():
        header = {
            "format": "gpu_hodlr",
            "version": _FILE_VERSION,
            "structure": type(structure).__name__,
            "report": dict(report),
            "dtype": dtype.name,
            "ranks": list(structure.ranks),
        }
        if structure.owners.alone:
            old = part_files(path)
            write_over(Path(path), header, structure.pack())
            remove(old)
            return
        whole, own = structure.parted()
    save_spread(path, comm, header, whole, own)


def load_structure(
    path: str | os.PathLike[str],
    kinds: Mapping[str, type[Structure]],
    comm: Communicator = ALONE.comm,
) -> tuple[Structure, dict[str, Any], np.dtype[Any]]:
    """Read what `save_structure` wrote; on many ranks, which all call, this rank's part of it.

    Args:
        path: of the file.
        kinds: the structures there are, by the names of their classes.
        comm: the ranks.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: not such a file, damaged, or of a newer format version.
        ArgumentError: the matrix cannot be spread over so many ranks, or they see different files.
    """
    with comm.agreed(), open(path, "rb") as stream, ExitStack() as opened:
        with damage_named(path):
            archive = Archive(stream)
            text = archive.read("header")
            header = json.loads(text.tobytes())
            _check_format(header)
            source: Source = archive
            if header["version"] >= INDEX_VERSION:
                source = SpreadArchive(path, archive, header, opened)
            name = header.get("structure", "Telescope")
            if name not in kinds:
                raise FileFormatError(f"unknown structure {name!r}")
            leaves = kinds[name].read_leaves(source, comm.size)
        owners = ALONE if comm.size == 1 else Ownership(comm, leaves)
        with damage_named(path):
            structure = kinds[name].unpack(source, header["ranks"], leaves, owners)
            report: dict[str, Any] = header["report"]
            dtype = np.dtype(header.get("dtype", structure.dtype.name))  # older files have none
            if dtype not in FLOATS or dtype.itemsize < structure.dtype.itemsize:
                raise ValueError(f"{structure.dtype} blocks do not fit a matrix of {dtype}")
            result = structure, report, dtype
    comm.same(header=text)
    return result


def _check_format(header: dict[str, Any]) -> None:
    """Refuse what is not the header of a matrix that can be read.

    Raises:
        FileFormatError: it is not.
    """
    if header.get("format") == PART:
        raise FileFormatError("a rank's part of a matrix; load the file that names it")
    if header.get("format") != "gpu_hodlr":
        raise FileFormatError("not a gpu_hodlr file")
    if header["version"] > FORMAT_VERSION:
        raise FileFormatError(
            f"format version {header['version']}, this package reads up to {FORMAT_VERSION}"
        )
