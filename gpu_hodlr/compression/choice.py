"""scheme="auto": the storage of every scheme, predicted from the ranks of sampled blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gpu_hodlr.schemes import SCHEMES, BlockSampler, Job


@dataclass(frozen=True)
class Choice:
    """What to build and why.

    Attributes:
        schemes: in the order in which they are to be built, until one keeps the promise.
        reason: with all predictions; None where there was no choice.
        every: of how many, from the first, the smallest is to be kept: all these are built.
        within_reach: those whose sampled ranks reach rtol.
    """

    schemes: tuple[str, ...]
    reason: str | None
    every: int = 0
    within_reach: tuple[str, ...] = ()


def choose(job: Job, aims: Mapping[str, float]) -> Choice:
    """Predict storage / N^2 of the schemes that come into question, and sort them by it.

    HSS needs the rank of K(t, outside t), FMM that of K(t, far field of t), HODLR that of
    K(t, sibling of t), the low-rank form that of K: see `schemes.prediction`. A rank beyond half a
    sample's side is not seen: such schemes come last. Without entries there is nothing to
    sample: the cheap schemes are built, and HODLR, with products of its own for every level, if
    none keeps rtol.

    Args:
        job: the matrix and its tree.
        aims: absolute Frobenius error aimed at by each scheme.
    """
    considered = [scheme for scheme in SCHEMES.values() if scheme.considered(job)]
    if not job.entries:
        cheap = [s for s in considered if s.cheap_without_entries or s.needs_eigenbasis]
        dear = [scheme for scheme in considered if scheme not in cheap]
        names = tuple(scheme.name for scheme in (*cheap, *dear))
        reason = "without entries there is nothing to sample, and all that are cheap are built"
        return Choice(names, reason, every=len(cheap))
    sampler = BlockSampler(job)
    stored = {scheme.name: scheme.predict(sampler, aims[scheme.name]) for scheme in considered}
    known = {scheme: fraction for scheme, fraction in stored.items() if fraction is not None}
    order = tuple(sorted(stored, key=lambda scheme: known.get(scheme, math.inf)))
    if not known:
        return Choice(order, "no sampled rank reaches rtol within max_rank")
    said = [
        f"{scheme} " + (f"{100 * known[scheme]:.3g} %" if scheme in known else "out of reach")
        for scheme in order
    ]
    reason = f"least storage first, predicted from sampled ranks: {', '.join(said)}"
    return Choice(order, reason, within_reach=tuple(known))
