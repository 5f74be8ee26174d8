"""Saving and loading: uncompressed .npz files with a format version, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpu_hodlr.arrays import FLOATS, power_of_two
from gpu_hodlr.batched.stored import WIDTHS
from gpu_hodlr.checks import check_number
from gpu_hodlr.distributed import ALONE, Communicator, Ownership
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.files.archive import Archive, damage_named
from gpu_hodlr.files.spread_storage import (
    PART,
    SpreadArchive,
    part_files,
    remove,
    save_spread,
)
from gpu_hodlr.files.writing import AnyPath, clear_abandoned, target_of, write_over
from gpu_hodlr.structures import Structure
from gpu_hodlr.structures.stored import Source, Stored

FORMAT_VERSION = 9  # the newest that can be read
_MATRIX = 2  # one file that has it all; 1: telescoping forms only, their name left out
_MATRIX_INDEX = 3  # names ranks' files
_FACTOR, _FACTOR_INDEX = 4, 5  # the same of a factor
_SCALED, _SCALED_INDEX = 6, 7  # of a matrix that is its structure times a number
_REDUCED, _REDUCED_INDEX = 8, 9  # the same with a far field in fewer bits than float32
_INDICES = _MATRIX_INDEX, _FACTOR_INDEX, _SCALED_INDEX, _REDUCED_INDEX


@dataclass(frozen=True)
class Saved:
    """What a file has.

    Attributes:
        content: a structure, on the host, or a factor.
        report: what is known of a structure; empty for a factor.
        dtype: of the matrix.
        scale: what the structure is to be multiplied by.
        more: what else was saved with it.
    """

    content: Stored
    report: dict[str, Any]
    dtype: np.dtype[Any]
    scale: float = 1.0
    more: Mapping[str, Any] = field(default_factory=dict)


def save_structure(
    path: AnyPath,
    structure: Structure,
    report: Mapping[str, Any],
    dtype: np.dtype[Any],
    scale: float = 1.0,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write one file; on many ranks, which all call, a file a rank and an index of them.

    Args:
        path: of the file.
        structure: the arrays.
        report: what is to be known of them, for JSON.
        dtype: of the matrix they are.
        scale: what the structure is to be multiplied by.
        more: what else is to be known, for JSON; older versions of the package pass over it.

    Raises:
        OSError: a file cannot be written; what was saved at `path` before is whole.
        DtypeError, ArgumentError: no path, or the ranks have different ones.
    """
    versions = _MATRIX, _MATRIX_INDEX
    about: dict[str, Any] = {
        "structure": type(structure).__name__,
        "report": dict(report),
        "dtype": dtype.name,
    }
    if more:
        about["more"] = dict(more)
    if scale != 1.0:
        versions, about["scale"] = (_SCALED, _SCALED_INDEX), scale
    if structure.kept_in in WIDTHS:
        versions, about["scale"] = (_REDUCED, _REDUCED_INDEX), scale
    _save(path, structure, versions, about)


def save_factor(path: AnyPath, factor: Stored) -> None:
    """The same of a factor.

    Raises:
        OSError: a file cannot be written; what was saved at `path` before is whole.
        DtypeError, ArgumentError: no path, or the ranks have different ones.
    """
    _save(path, factor, (_FACTOR, _FACTOR_INDEX), {"factor": type(factor).__name__})


def _save(
    path: AnyPath,
    content: Stored,
    versions: tuple[int, int],
    about: Mapping[str, Any],
) -> None:
    """Write a file of the first version, or an index of the second."""
    comm = content.owners.comm
    with comm.agreed():
        target = target_of(path)
    comm.same(path=os.fspath(target))
    alone = comm.size == 1
    with comm.agreed():
        version = versions[0] if alone else versions[1]
        header = {"format": "gpu_hodlr", "version": version, **about, **content.about()}
        if comm.rank == 0:
            clear_abandoned(target)
        if alone:
            old = part_files(target)
            write_over(target, header, content.pack())
            remove(old)
            return
        whole, own = content.parted()
    save_spread(target, comm, header, whole, own)


def load_structure(
    path: AnyPath,
    kinds: Mapping[str, type[Structure]],
    comm: Communicator = ALONE.comm,
) -> tuple[Structure, dict[str, Any], np.dtype[Any]]:
    """`load_stored` of a structure, its report and its matrix's type."""
    saved = load_stored(path, kinds, comm)
    assert isinstance(saved.content, Structure)
    return saved.content, saved.report, saved.dtype


def load_stored(
    path: AnyPath,
    kinds: Mapping[str, type[Stored]],
    comm: Communicator = ALONE.comm,
    device: str = "cpu",
) -> Saved:
    """Read what was saved; on many ranks, which all call, this rank's part of it.

    Args:
        path: of the file.
        kinds: the structures and factors there are, by the names of their classes.
        comm: the ranks.
        device: where a factor is to be; a structure is on the host.

    Raises:
        FileNotFoundError: there is no such file.
        FileFormatError: not such a file, damaged, or of a newer format version.
        ArgumentError: it cannot be spread over so many ranks, or they see different files.
        DtypeError, ArgumentError: no path.
    """
    with comm.agreed(), ExitStack() as opened:
        target = target_of(path)
        stream = opened.enter_context(open(target, "rb"))
        with damage_named(path):
            archive = Archive(stream)
            text = archive.read("header")
            header = json.loads(text.tobytes())
            _check_format(header)
            source: Source = archive
            if header["version"] in _INDICES:
                source = SpreadArchive(target, archive, header, opened)
            kind = _kind(header, kinds)
            leaves = kind.read_leaves(source, comm.size)
        owners = ALONE if comm.size == 1 else Ownership(comm, leaves)
        with damage_named(path):
            saved = _saved(kind.unpack(source, header, leaves, owners, device), header)
    comm.same(header=text)
    return saved


def _kind(header: Mapping[str, Any], kinds: Mapping[str, type[Stored]]) -> type[Stored]:
    """What the file has.

    Raises:
        FileFormatError: nothing that is known.
    """
    if header["version"] in (_FACTOR, _FACTOR_INDEX):
        said, name = "factor", header["factor"]
    else:
        said, name = "structure", header.get("structure", "Telescope")
    if name not in kinds or issubclass(kinds[name], Structure) != (said == "structure"):
        raise FileFormatError(f"unknown {said} {name!r}")
    return kinds[name]


def _saved(content: Stored, header: Mapping[str, Any]) -> Saved:
    """With what the header says of a structure.

    Raises:
        KeyError, ValueError: it says nothing of it, or does not fit it.
    """
    if not isinstance(content, Structure):
        dtype: np.dtype[Any] = content.dtype  # type: ignore[attr-defined]
        return Saved(content, {}, dtype)
    report: dict[str, Any] = header["report"]
    said = header.get("dtype", content.dtype.name)  # older files have none
    fitting = {d.name: d for d in FLOATS if d.itemsize >= content.dtype.itemsize}
    if said not in fitting:
        raise ValueError(f"{content.dtype} blocks do not fit a matrix of {said}")
    scale = 1.0
    if header["version"] >= _SCALED:
        scale = check_number(header["scale"], "scale")
        if scale != power_of_two(scale):
            raise ValueError(f"the scale {scale} is no power of two")
    more = header.get("more", {})
    if not isinstance(more, dict):
        raise ValueError(f"{more!r} is saved with it")
    return Saved(content, report, fitting[said], scale, more)


def _check_format(header: dict[str, Any]) -> None:
    """Refuse what is not the header of a matrix or factor that can be read.

    Raises:
        FileFormatError: it is not.
    """
    if header.get("format") == PART:
        raise FileFormatError("a rank's part; load the file that names it")
    if header.get("format") != "gpu_hodlr":
        raise FileFormatError("not a gpu_hodlr file")
    version = header["version"]
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise FileFormatError(
            f"format version {version!r}, this package reads 1 up to {FORMAT_VERSION}"
        )
