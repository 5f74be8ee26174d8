"""Structures as named host arrays, and back with every array checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr.arrays import FLOATS
from gpu_hodlr.devices import to_host
from gpu_hodlr.distributed import Halo, Ownership
from gpu_hodlr.errors import FileFormatError
from gpu_hodlr.files.archive import Source
from gpu_hodlr.interactions import interaction_lists
from gpu_hodlr.structures import HODLR, Level, LowRank, Multipole, NestedBases, Structure, Telescope
from gpu_hodlr.tree import rows_tree

Ranks = list[tuple[int, ...]]


@dataclass(frozen=True)
class Stack:
    """What the first axis of an array goes over: the nodes of a level, or pairs of them.

    Attributes:
        level: of the nodes.
        each: rows of a node.
        pairs: (p, 2) nodes of the level, sorted, the smaller first; None for the nodes themselves.
        siblings: see `Halo`, of pairs.
    """

    level: int
    each: int = 1
    pairs: Any = None
    siblings: bool = True

    def held(self, owners: Ownership) -> Any:
        """The rows that a rank has: of the nodes it works on, or of the pairs in its `Halo`."""
        if self.pairs is not None:
            return Halo(owners, self.pairs, self.level, self.siblings).chosen
        nodes = owners.mine(self.level)
        return slice(nodes.start * self.each, nodes.stop * self.each)

    def saved(self, owners: Ownership) -> Any:
        """Of the rows that a rank has, those that it saves; a pair is saved where its first is."""
        counted = owners.counted(self.level)
        if self.pairs is None:
            first = owners.mine(self.level).start
            return slice((counted.start - first) * self.each, (counted.stop - first) * self.each)
        nodes = self.pairs[self.held(owners), 0]
        return (nodes >= counted.start) & (nodes < counted.stop)

    def count(self, owners: Ownership) -> int:
        """Rows that a rank has."""
        every = self.each << self.level if self.pairs is None else len(self.pairs)
        return len(np.arange(every)[self.held(owners)])


def stacks_of(name: str, leaves: Any, levels: int, near_pairs: Any = None) -> dict[str, Stack]:
    """The stacks among the arrays of a structure; every rank has all of the others.

    Args:
        name: of the structure's class.
        leaves: of the whole tree; they are no stack: every rank needs those of all.
        levels: how many the structure has.
        near_pairs: of a Multipole.
    """
    if name == LowRank.__name__:
        return {}
    depth = len(leaves).bit_length() - 1
    stacks = {"D": Stack(depth)}
    if name == HODLR.__name__:
        return stacks | {"U": Stack(depth, leaves.shape[1])}
    far: Any = None
    if near_pairs is not None:
        stacks["near"] = Stack(depth, pairs=near_pairs, siblings=False)
        far = interaction_lists(depth, near_pairs).far
    for i in range(min(levels, depth)):
        level = depth - i
        stacks[f"T{i}"] = stacks[f"order{i}"] = Stack(level)
        siblings = Stack(level - 1)  # one coupling a parent
        stacks[f"B{i}"] = siblings if far is None else Stack(level, pairs=far[level])
    return stacks


def pack(structure: Structure) -> tuple[dict[str, Any], Ranks]:
    """The arrays of a structure by name, on this rank, and its ranks; `leaves` are of all ranks."""
    if isinstance(structure, LowRank):
        arrays = {"U": to_host(structure.U), "eigenvalues": to_host(structure.eigenvalues)}
        if structure.D is not None:
            arrays["D"] = to_host(structure.D)
        if not structure.owners.alone:  # rank by rank
            arrays["rows"] = np.concatenate(structure.owners.rows.of)
    elif isinstance(structure, HODLR):
        arrays = _pack_hodlr(structure)
    else:
        assert isinstance(structure, NestedBases)
        arrays = _pack_nested(structure)
    return arrays, list(structure.ranks)


def parted(
    structure: Structure, arrays: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `pack` gave in two: what every rank has all of, and what this one saves of the rest."""
    owners = structure.owners
    if isinstance(structure, LowRank):
        of_rows = {name: a for name, a in arrays.items() if name in ("U", "D")}
        return {name: a for name, a in arrays.items() if name not in of_rows}, of_rows
    stacks = stacks_of(
        type(structure).__name__, owners.leaves, len(structure.ranks), arrays.get("near_pairs")
    )
    own = {
        name: arrays[name][stack.saved(owners)] for name, stack in stacks.items() if name in arrays
    }
    return {name: a for name, a in arrays.items() if name not in own}, own


def leaves_in(name: str, source: Source, ranks: int) -> Any:
    """The leaves of a saved structure, by which it is spread; None where nothing needs them.

    Raises:
        FileFormatError: no structure has this name.
        KeyError, ValueError: they are missing, or not those of a tree.
    """
    if name not in _UNPACK:
        raise FileFormatError(f"unknown structure {name!r}")
    if name == LowRank.__name__:
        return None if ranks == 1 else rows_tree(source.length("U"), ranks).leaves
    leaves = source.read("leaves")
    _check_leaves(leaves)
    return leaves


def unpack(
    name: str, source: Source, ranks: list[list[int]], leaves: Any, owners: Ownership
) -> Structure:
    """The structure that `pack` took apart, or this rank's part of it.

    Args:
        name: of its class.
        source: of its arrays.
        ranks: see `pack`.
        leaves: see `leaves_in`.
        owners: who gets what.

    Raises:
        KeyError, ValueError: arrays are missing or do not fit together.
    """
    near_pairs = None
    if name == Multipole.__name__:
        near_pairs = source.read("near_pairs")
        _check_near_pairs(near_pairs, len(leaves))
    stacks = stacks_of(name, leaves, len(ranks), near_pairs)
    return _UNPACK[name](_Part(source, stacks, leaves, owners), [tuple(r) for r in ranks])


class _Part:
    """What a rank gets of saved arrays.

    Args:
        source: of all arrays.
        stacks: see `stacks_of`.
        leaves: of the whole tree.
        owners: who gets what.
    """

    def __init__(
        self, source: Source, stacks: Mapping[str, Stack], leaves: Any, owners: Ownership
    ) -> None:
        self._source, self.stacks, self.leaves, self.owners = source, stacks, leaves, owners
        self.depth = 0 if leaves is None else len(leaves).bit_length() - 1

    def __getitem__(self, name: str) -> Any:
        stack = self.stacks.get(name)
        if stack is None or self.owners.alone:
            return self._source.read(name)
        return self._source.read(name, stack.held(self.owners))

    def has(self, name: str) -> bool:
        """Whether there is such an array."""
        return name in self._source

    def get(self, name: str) -> Any:
        """None where there is no such array."""
        return self[name] if self.has(name) else None

    def own_rows(self, name: str) -> Any:
        """This rank's rows, ascending, of an array whose rows are those of vectors.

        Raises:
            ValueError: what the file says of their order is no order.
        """
        source, owners = self._source, self.owners
        order = source.read("rows") if "rows" in source else np.arange(source.length(name))
        if not np.array_equal(np.sort(order), np.arange(source.length(name))):
            raise ValueError(f"the rows of {name} are not in an order")
        wanted = np.arange(len(order)) if owners.alone else owners.rows.mine
        place = np.nonzero(np.isin(order, wanted))[0]
        return source.read(name, place)[np.argsort(order[place])]

    def count(self, name: str) -> int:
        """Rows that a stack has here."""
        return self.stacks[name].count(self.owners)

    def own_leaves(self) -> Any:
        """The leaves of a structure of this rank."""
        return self.owners.local(self.leaves[self.owners.mine(self.depth)])


def _pack_nested(structure: NestedBases) -> dict[str, Any]:
    arrays = {"leaves": structure.all_leaves, "D": to_host(structure.D)}
    for i, level in enumerate(structure.levels):
        arrays[f"T{i}"], arrays[f"B{i}"] = to_host(level.T), to_host(level.B)
        if level.order is not None:
            arrays[f"order{i}"] = to_host(level.order)
    if isinstance(structure, Multipole):
        arrays["near"], arrays["near_pairs"] = to_host(structure.near), structure.near_pairs
    return arrays


def _unpack_levels(part: _Part, D: Any, ranks: Ranks) -> tuple[Level, ...]:
    levels = tuple(
        Level(part.get(f"order{i}"), part[f"T{i}"], part[f"B{i}"], level_ranks)
        for i, level_ranks in enumerate(ranks)
    )
    _check_levels(part, D, levels)
    return levels


def _unpack_telescope(part: _Part, ranks: Ranks) -> Telescope:
    D = _diagonal_blocks(part)
    if len(ranks) != part.depth:
        raise ValueError(f"{len(part.leaves)} leaves do not fit {len(ranks)} levels")
    levels = _unpack_levels(part, D, ranks)
    return Telescope(part.own_leaves(), D, levels, owners=part.owners)


def _unpack_multipole(part: _Part, ranks: Ranks) -> Multipole:
    D, near, pairs = _diagonal_blocks(part), part["near"], part["near_pairs"]
    if near.shape != (part.count("near"), *D.shape[1:]):
        raise ValueError(f"{pairs.shape} near pairs do not fit blocks of shape {near.shape}")
    if near.dtype != D.dtype:
        raise ValueError("the near blocks have another type than the diagonal blocks")
    if len(ranks) != part.depth + 1 - interaction_lists(part.depth, pairs).top:
        raise ValueError(f"{len(ranks)} levels do not fit the near pairs")
    levels = _unpack_levels(part, D, ranks)
    far_pairs = tuple(part.stacks[f"B{i}"].pairs for i in range(len(levels)))
    return Multipole(part.own_leaves(), D, levels, near, pairs, far_pairs, owners=part.owners)


def _unpack_low_rank(part: _Part, ranks: Ranks) -> LowRank:
    U, eigenvalues = part.own_rows("U"), part["eigenvalues"]
    if U.ndim != 2 or U.dtype not in FLOATS or ranks != [(U.shape[1],)]:
        raise ValueError(f"the eigenvectors have shape {U.shape} and type {U.dtype}")
    if eigenvalues.shape != U.shape[1:] or eigenvalues.dtype != U.dtype:
        raise ValueError(f"{eigenvalues.shape} eigenvalues do not fit the eigenvectors")
    if not (eigenvalues >= 0).all():
        raise ValueError("an eigenvalue is negative or not a number")
    D = part.own_rows("D") if part.has("D") else None
    if D is not None and (D.shape != U.shape[:1] or D.dtype != U.dtype):
        raise ValueError(f"a diagonal of shape {D.shape} does not fit the eigenvectors")
    return LowRank(U, eigenvalues, D, owners=part.owners)


def _pack_hodlr(form: HODLR) -> dict[str, Any]:
    widths = np.array(form.widths, int)
    arrays = {"leaves": form.all_leaves, "D": to_host(form.D), "U": to_host(form.U)}
    return arrays | {"widths": widths}


def _unpack_hodlr(part: _Part, ranks: Ranks) -> HODLR:
    leaves, D, U, widths = part.own_leaves(), _diagonal_blocks(part), part["U"], part["widths"]
    nodes, depth = len(part.leaves), part.depth
    if widths.shape != (depth,) or not np.issubdtype(widths.dtype, np.integer):
        raise ValueError(f"widths of shape {widths.shape} do not fit {nodes} leaves")
    if U.shape != (leaves.size, widths.sum()) or U.dtype != D.dtype or (widths < 0).any():
        raise ValueError(f"the bases have shape {U.shape} and type {U.dtype}")
    if U[leaves.ravel() < 0].any():
        raise ValueError("the bases are not zero on the padding")
    if [len(level) for level in ranks] != [nodes >> i for i in range(depth)]:
        raise ValueError("the ranks do not fit the levels")
    blocks = tuple(level[::2] for level in ranks[::-1])
    return HODLR(leaves, D, U, tuple(int(r) for r in widths), blocks, owners=part.owners)


def _check_leaves(leaves: Any) -> None:
    """Refuse leaves that are not those of a tree.

    Raises:
        ValueError: they are not.
    """
    nodes, _ = leaves.shape
    if nodes & (nodes - 1):
        raise ValueError(f"{nodes} leaves are not those of a binary tree")
    real = np.sort(leaves[leaves >= 0])
    if not np.array_equal(real, np.arange(real.size)) or leaves.min() < -1:
        raise ValueError("the leaves are not a permutation")


def _check_near_pairs(pairs: Any, nodes: int) -> None:
    """Refuse what is no list of pairs of different leaves, sorted.

    Raises:
        ValueError: it is none.
    """
    if pairs.ndim != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(f"the near pairs have shape {pairs.shape} and type {pairs.dtype}")
    if pairs.size and (pairs.min() < 0 or pairs.max() >= nodes):
        raise ValueError(f"a near pair is not of {nodes} leaves")
    if not np.array_equal(interaction_lists(nodes.bit_length() - 1, pairs).near, pairs):
        raise ValueError("the near pairs are not sorted")


def _diagonal_blocks(part: _Part) -> Any:
    """D.

    Raises:
        ValueError: they do not fit the leaves.
    """
    D, m = part["D"], part.leaves.shape[1]
    if D.shape != (part.count("D"), m, m) or D.dtype not in FLOATS:
        raise ValueError(f"the diagonal blocks have shape {D.shape} and type {D.dtype}")
    return D


def _check_levels(part: _Part, D: Any, levels: tuple[Level, ...]) -> None:
    """Refuse levels that do not fit the leaves, each other, or their numbers of couplings.

    Raises:
        ValueError: what does not fit.
    """
    rows = D.shape[1]
    for i, level in enumerate(levels):
        r = level.T.shape[2]
        nodes = part.count(f"T{i}")
        shapes = (level.T.shape, level.B.shape, len(level.ranks))
        every = len(part.leaves) >> i
        if shapes != ((nodes, rows - r, r), (part.count(f"B{i}"), r, r), every):
            raise ValueError(f"level {i} has shapes {shapes}")
        if level.T.dtype != D.dtype or level.B.dtype != D.dtype:
            raise ValueError(f"level {i} has another type than the diagonal blocks")
        each = np.tile(np.arange(rows), (nodes, 1))
        if (level.order is None) != (i == 0) or (
            level.order is not None and not np.array_equal(np.sort(level.order, axis=1), each)
        ):
            raise ValueError(f"the order of level {i} is not a permutation")
        rows = 2 * r


_UNPACK: dict[str, Callable[[_Part, Ranks], Structure]] = {
    Telescope.__name__: _unpack_telescope,
    Multipole.__name__: _unpack_multipole,
    LowRank.__name__: _unpack_low_rank,
    HODLR.__name__: _unpack_hodlr,
}
