"""scheme="auto": the storage of every scheme, predicted from the ranks of sampled blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gpu_hodlr.schemes import SCHEMES, BlockSampler, Job


@dataclass(frozen=True)
class Choice:
    """What to build and why.

    Attributes:
        schemes: one; or more, of which the smallest is to be kept.
        reason: a sentence, with all predictions; None where there was no choice.
    """

    schemes: tuple[str, ...]
    reason: str | None


def choose(job: Job, aims: Mapping[str, float]) -> Choice:
    """Predict storage / N^2 of the schemes that come into question, and take the least.

    HSS needs the rank of K(t, outside t), FMM that of K(t, far field of t), HODLR that of
    K(t, sibling of t), the low-rank form that of K: see `schemes.prediction`. A rank beyond half a
    sample's side is not seen. Without entries there is nothing to sample.

    Args:
        job: the matrix and its tree.
        aims: absolute Frobenius error aimed at by each scheme.
    """
    considered = [scheme for scheme in SCHEMES.values() if scheme.considered(job)]
    if not job.entries:
        names = tuple(scheme.name for scheme in considered)
        return Choice(
            names,
            f"without entries there is nothing to sample: the smaller of {' and '.join(names)}, "
            "built",
        )
    sampler = BlockSampler(job)
    stored = {scheme.name: scheme.predict(sampler, aims[scheme.name]) for scheme in considered}
    known = {scheme: fraction for scheme, fraction in stored.items() if fraction is not None}
    if not known:
        first = next(iter(stored))
        return Choice((first,), f"{first}: no sampled rank reaches rtol within max_rank")
    best = min(known, key=lambda scheme: known[scheme])
    said = [
        f"{scheme} " + (f"{100 * known[scheme]:.3g} %" if scheme in known else "out of reach")
        for scheme in stored
    ]
    return Choice(
        (best,), f"{best}: least storage predicted from sampled ranks ({', '.join(said)})"
    )
