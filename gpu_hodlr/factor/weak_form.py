"""From the FMM form to the telescoping (HSS) form of about the same matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gpu_hodlr import batched
from gpu_hodlr.bases import ProductSampler, samples_for, sweep
from gpu_hodlr.devices import Array, namespace, to_host
from gpu_hodlr.operators import Operator, Sketch
from gpu_hodlr.profiling import PhaseTimer
from gpu_hodlr.structures import Multipole, Telescope
from gpu_hodlr.tree import ClusterTree

_START = 160  # columns sampled at first


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
    operator = _MultipoleOperator(form)
    tree = ClusterTree(to_host(form.leaves))
    limit = samples_for(min(max_rank, max(1, form.n // 2)))
    sketch = Sketch(operator, min(_START, limit), seed)
    sampler = ProductSampler(sketch, tree, form.D, limit)
    return sweep(
        operator, tree, form.D, sampler, tolerance * tree.depth**0.5, max_rank,
        PhaseTimer(), lambda: None, worst_node=True,
    )[0]  # fmt: skip


class _MultipoleOperator(Operator):
    """An FMM form with products, and with the entries the sweep asks for: those of siblings."""

    def __init__(self, form: Multipole) -> None:
        super().__init__(form.n, form.D.dtype, form.device)
        self._form = form

    def _matmat(self, v: Array) -> Array:
        return self._form.matmat(v)

    def _diagonal(self) -> Array:
        return self._form.diagonal()

    def _entries(self, rows: Array, cols: Array) -> Array:
        """K[rows[t], cols[t]] for rows in node 2t and columns in node 2t + 1 of a level.

        One product with the form restricted to pairs between siblings: column c holds the c-th
        unit vector of every node 2t + 1, and no pair leads from one such node to another.
        """
        unit = batched.identities(len(cols), cols.shape[1], self._form.D)
        unit = batched.scatter_rows(unit, cols, self._form.n)
        between = _between_siblings(self._form, len(rows).bit_length())
        return batched.gather_rows(between.matmat(unit), rows)


def _between_siblings(form: Multipole, level: int) -> Multipole:
    """The pairs of the form whose nodes of `level` are siblings."""
    depth = (len(form.leaves) - 1).bit_length()

    def chosen(pairs: Any, pair_level: int) -> Any:
        ancestors = pairs >> (pair_level - level)
        return ancestors[:, 0] ^ ancestors[:, 1] == 1

    xp = namespace(form.D)
    near = chosen(form.near_pairs, depth)
    kept, far_pairs = [], []
    for i, (part, pairs) in enumerate(zip(form.levels, form.far_pairs, strict=True)):
        if depth - i >= level:
            mask = chosen(pairs, depth - i)
            kept.append(replace(part, B=part.B[xp.asarray(mask)]))
            far_pairs.append(pairs[mask])
    return replace(
        form, levels=tuple(kept), near=form.near[xp.asarray(near)],
        near_pairs=form.near_pairs[near], far_pairs=tuple(far_pairs),
    )  # fmt: skip
