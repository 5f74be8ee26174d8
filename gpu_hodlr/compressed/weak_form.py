"""From the FMM form to the telescoping (HSS) form of about the same matrix."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from gpu_hodlr import batched, streams
from gpu_hodlr.arrays import power_of_two
from gpu_hodlr.bases import FIRST_COLUMNS, Outside, ProductSampler, samples_for, sweep
from gpu_hodlr.devices import Array, HostArray, HostIndex, namespace, to_host
from gpu_hodlr.operators import Operator, ProductRows, SketchRows, column_share
from gpu_hodlr.structures import Multipole, Telescope
from gpu_hodlr.tree import ClusterTree


def weak_form(form: Multipole, tolerance: float, max_rank: int, seed: int = 0) -> Telescope:
    """The telescoping form of an FMM form on its own tree, by the same bottom-up sweep.

    Samples and couplings come from the FMM form alone, by products.

    Args:
        form: the FMM form.
        tolerance: absolute error aimed at, of every node's basis.
        max_rank: cap of the rank.
        seed: of the samples.
    """
    found = form.telescope()
    if found is not None:
        return found
    size = _size(form)
    if size != 1.0:
        return weak_form(form.scaled(1 / size), tolerance / size, max_rank, seed).scaled(size)
    operator = _MultipoleOperator(form)
    tree = ClusterTree(form.all_leaves)
    limit = samples_for(min(max_rank, max(1, form.n // 2)))
    sketch = _sketch(form, min(FIRST_COLUMNS, limit), seed)
    region = Outside(tree, form.owners, form.D)
    sampler = ProductSampler(sketch, region, limit)
    absolute = tolerance * tree.depth**0.5
    return sweep(operator, region, sampler, absolute, max_rank, worst_node=True)[0]


def _size(form: Multipole) -> float:
    """A power of two that entries are of where their squares would leave the range; else 1."""
    largest = max(form.owners.comm.share(float(abs(form.D).max()) if form.D.size else 0.0))
    size = power_of_two(largest, form.dtype)
    return size if abs(math.log2(size)) > np.finfo(form.dtype).maxexp // 8 else 1.0


def _sketch(form: Multipole, columns: int, seed: int) -> SketchRows:
    """A sketch whose products are made by all ranks together, by rows."""
    normal = batched.normal_source((seed, streams.SKETCH), form.device)
    owners, xp = form.owners, namespace(form.D)

    def put(columns: int, into: tuple[Array, Array]) -> None:
        mine, widths = column_share(columns, owners.comm)
        drawn = normal((form.n, columns), form.dtype, mine)
        owners.from_columns((drawn,), widths, into[:1])
        into[1][:] = form.matmat(xp.ascontiguousarray(into[0]))

    first = ProductRows(*(xp.empty((form.num_rows, columns), form.dtype) for _ in range(2)))
    put(columns, (first.v, first.y))
    return SketchRows(first, put)


class _MultipoleOperator(Operator):
    """An FMM form with products, and with the entries the sweep asks for: those of siblings."""

    def __init__(self, form: Multipole) -> None:
        super().__init__(form.n, form.D.dtype, form.device)
        self._form, leaves = form, form.all_leaves
        self._leaf_of = np.empty(form.n, np.int64)
        self._leaf_of[leaves[leaves >= 0]] = np.nonzero(leaves >= 0)[0]

    def _matmat(self, v: Array) -> Array:
        return self._form.matmat(v)

    def _diagonal(self) -> Array:
        return self._form.diagonal()

    def _blocks(self, rows: Array, cols: Array) -> Array:
        """K[rows[t], cols[t]] for rows in node 2t and columns in node 2t + 1 of a level.

        One product with the form restricted to pairs between siblings: column c holds the c-th
        unit vector of every node 2t + 1, and no pair leads from one such node to another. On many
        ranks they are of the pairs that this rank works on; where a pair spans ranks, each adds
        the rows that are its own.
        """
        form, owners = self._form, self._form.owners
        height = max(owners.comm.share(self._height(to_host(rows[:, :1]), to_host(cols[:, :1]))))
        if not height:
            return namespace(form.D).zeros((*rows.shape, cols.shape[1]), form.D.dtype)
        level = form.depth - height + 1
        rows, cols = (owners.places(index) for index in (rows, cols))
        unit = batched.identities(len(cols), cols.shape[1], form.D)
        unit = batched.scatter_rows(unit, cols, form.num_rows)
        block = batched.gather_rows(_between_siblings(form, level).matmat(unit), rows)
        return owners.sum_shared(block, level - 1)

    def _height(self, row: HostIndex, col: HostIndex) -> int:
        """Levels from the leaves up to where the rows' and columns' nodes meet; 0: all is padding.

        Args:
            row: (t, 1) the first row of every block, -1 where a node has no rows; (t, 0) of rank 0.
            col: the same of the columns.
        """
        real = (row >= 0) & (col >= 0)
        apart = self._leaf_of[row[real]] ^ self._leaf_of[col[real]]
        return int(apart.max(initial=0)).bit_length()


def _between_siblings(form: Multipole, level: int) -> Multipole:
    """The pairs of the form whose nodes of `level` are siblings."""
    depth = form.depth

    def chosen(pairs: HostIndex, pair_level: int) -> HostArray:
        ancestors = pairs >> (pair_level - level)
        return ancestors[:, 0] ^ ancestors[:, 1] == 1

    def those(blocks: Array, mask: HostArray) -> Array:
        # By number: for a mask on the device the host would wait.
        return blocks[namespace(blocks).asarray(np.nonzero(mask)[0])]

    near = chosen(form.near_pairs, depth)
    kept, far_pairs = [], []
    for i, (part, halo) in enumerate(zip(form.levels, form.far_halos, strict=True)):
        if depth - i >= level:
            mask = chosen(halo.every_pair, depth - i)
            kept.append(replace(part, B=those(part.B, mask[halo.chosen])))
            far_pairs.append(halo.every_pair[mask])
    return replace(
        form, levels=tuple(kept), near=those(form.near, near[form.near_halo.chosen]),
        near_pairs=form.near_pairs[near], far_pairs=tuple(far_pairs),
    )  # fmt: skip
