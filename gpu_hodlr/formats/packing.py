"""Structures as named host arrays, and back with every array checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpu_hodlr.arrays import FLOATS
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.interactions import interaction_lists
from gpu_hodlr.structures import HODLR, Level, LowRank, Multipole, NestedBases, Structure, Telescope

Arrays = Mapping[str, Any]


def pack(structure: Structure) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """The arrays of a structure by name, and its ranks."""
    if isinstance(structure, LowRank):
        arrays = {"U": to_host(structure.U), "eigenvalues": to_host(structure.eigenvalues)}
    elif isinstance(structure, HODLR):
        arrays = _pack_hodlr(structure)
    else:
        assert isinstance(structure, NestedBases)
        arrays = _pack_nested(structure)
    return arrays, list(structure.ranks)


def unpack(name: str, arrays: Arrays, ranks: list[list[int]]) -> Structure:
    """The structure that `pack` took apart, by the name of its class.

    Raises:
        FileFormatError: no structure has this name.
        KeyError, ValueError: arrays are missing or do not fit together.
    """
    if name not in _UNPACK:
        raise FileFormatError(f"unknown structure {name!r}")
    return _UNPACK[name](arrays, [tuple(level) for level in ranks])


def _pack_nested(structure: NestedBases) -> dict[str, Any]:
    arrays = {"leaves": to_host(structure.leaves), "D": to_host(structure.D)}
    for i, level in enumerate(structure.levels):
        arrays[f"T{i}"], arrays[f"B{i}"] = to_host(level.T), to_host(level.B)
        if level.order is not None:
            arrays[f"order{i}"] = to_host(level.order)
    if isinstance(structure, Multipole):
        arrays["near"], arrays["near_pairs"] = to_host(structure.near), structure.near_pairs
    return arrays


def _unpack_levels(arrays: Arrays, ranks: list[tuple[int, ...]]) -> tuple[Level, ...]:
    return tuple(
        Level(arrays.get(f"order{i}"), arrays[f"T{i}"], arrays[f"B{i}"], level_ranks)
        for i, level_ranks in enumerate(ranks)
    )


def _unpack_telescope(arrays: Arrays, ranks: list[tuple[int, ...]]) -> Telescope:
    leaves, D = arrays["leaves"], arrays["D"]
    _check_leaves(leaves, D)
    levels = _unpack_levels(arrays, ranks)
    depth = len(leaves).bit_length() - 1
    if len(levels) != depth:
        raise ValueError(f"{len(leaves)} leaves do not fit {len(levels)} levels")
    _check_levels(leaves, D, levels, [len(leaves) >> (i + 1) for i in range(depth)])
    return Telescope(leaves, D, levels)


def _unpack_multipole(arrays: Arrays, ranks: list[tuple[int, ...]]) -> Multipole:
    leaves, D, near, pairs = (arrays[name] for name in ("leaves", "D", "near", "near_pairs"))
    _check_leaves(leaves, D)
    nodes, m = leaves.shape
    depth = nodes.bit_length() - 1
    if pairs.ndim != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"the near pairs have shape {pairs.shape} and type {pairs.dtype}")
    if pairs.size and (pairs.min() < 0 or pairs.max() >= nodes):
        raise ValueError(f"a near pair is not of {nodes} leaves")
    lists = interaction_lists(depth, pairs)
    if not np.array_equal(lists.near, pairs) or near.shape != (len(pairs), m, m):
        raise ValueError(f"{pairs.shape} near pairs do not fit blocks of shape {near.shape}")
    if near.dtype != D.dtype:
        raise ValueError("the near blocks have another type than the diagonal blocks")
    levels = _unpack_levels(arrays, ranks)
    if len(levels) != depth + 1 - lists.top:
        raise ValueError(f"{len(levels)} levels do not fit the near pairs")
    far_pairs = tuple(lists.far[depth - i] for i in range(len(levels)))
    _check_levels(leaves, D, levels, [len(far) for far in far_pairs])
    return Multipole(leaves, D, levels, near, pairs, far_pairs)


def _unpack_low_rank(arrays: Arrays, ranks: list[tuple[int, ...]]) -> LowRank:
    U, eigenvalues = arrays["U"], arrays["eigenvalues"]
    if U.ndim != 2 or U.dtype not in FLOATS or ranks != [(U.shape[1],)]:
        raise ValueError(f"the eigenvectors have shape {U.shape} and type {U.dtype}")
    if eigenvalues.shape != U.shape[1:] or eigenvalues.dtype != U.dtype:
        raise ValueError(f"{eigenvalues.shape} eigenvalues do not fit the eigenvectors")
    if not (eigenvalues >= 0).all():
        raise ValueError("an eigenvalue is negative or not a number")
    return LowRank(U, eigenvalues)


def _pack_hodlr(form: HODLR) -> dict[str, Any]:
    arrays = {"leaves": form.leaves, "D": form.D, "U": form.U}
    return {name: to_host(a) for name, a in arrays.items()} | {"widths": np.array(form.widths, int)}


def _unpack_hodlr(arrays: Arrays, ranks: list[tuple[int, ...]]) -> HODLR:
    leaves, D, U, widths = (arrays[name] for name in ("leaves", "D", "U", "widths"))
    _check_leaves(leaves, D)
    nodes, depth = len(leaves), len(leaves).bit_length() - 1
    if widths.shape != (depth,) or not np.issubdtype(widths.dtype, np.integer):
        raise ValueError(f"widths of shape {widths.shape} do not fit {nodes} leaves")
    if U.shape != (leaves.size, widths.sum()) or U.dtype != D.dtype or (widths < 0).any():
        raise ValueError(f"the bases have shape {U.shape} and type {U.dtype}")
    if U[leaves.ravel() < 0].any():
        raise ValueError("the bases are not zero on the padding")
    if [len(level) for level in ranks] != [nodes >> i for i in range(depth)]:
        raise ValueError("the ranks do not fit the levels")
    blocks = tuple(level[::2] for level in ranks[::-1])
    return HODLR(leaves, D, U, tuple(int(r) for r in widths), blocks)


def _check_leaves(leaves: Any, D: Any) -> None:
    """Refuse leaves that are not those of a tree, and diagonal blocks that do not fit them.

    Raises:
        ValueError: what does not fit.
    """
    nodes, m = leaves.shape
    if nodes & (nodes - 1):
        raise ValueError(f"{nodes} leaves are not those of a binary tree")
    real = np.sort(leaves[leaves >= 0])
    if not np.array_equal(real, np.arange(real.size)) or leaves.min() < -1:
        raise ValueError("the leaves are not a permutation")
    if D.shape != (nodes, m, m) or D.dtype not in FLOATS:
        raise ValueError(f"the diagonal blocks have shape {D.shape} and type {D.dtype}")


def _check_levels(leaves: Any, D: Any, levels: tuple[Level, ...], couplings: list[int]) -> None:
    """Refuse levels that do not fit the leaves, each other, or their numbers of couplings.

    Raises:
        ValueError: what does not fit.
    """
    nodes, rows = leaves.shape
    for i, (level, pairs) in enumerate(zip(levels, couplings, strict=True)):
        r = level.T.shape[2]
        shapes = (level.T.shape, level.B.shape, len(level.ranks))
        if shapes != ((nodes, rows - r, r), (pairs, r, r), nodes):
            raise ValueError(f"level {i} has shapes {shapes}")
        if level.T.dtype != D.dtype or level.B.dtype != D.dtype:
            raise ValueError(f"level {i} has another type than the diagonal blocks")
        every = np.tile(np.arange(rows), (nodes, 1))
        if (level.order is None) != (i == 0) or (
            level.order is not None and not np.array_equal(np.sort(level.order, axis=1), every)
        ):
            raise ValueError(f"the order of level {i} is not a permutation")
        nodes, rows = nodes // 2, 2 * r


_UNPACK = {
    Telescope.__name__: _unpack_telescope,
    Multipole.__name__: _unpack_multipole,
    LowRank.__name__: _unpack_low_rank,
    HODLR.__name__: _unpack_hodlr,
}
