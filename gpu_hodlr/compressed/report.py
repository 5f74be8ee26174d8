"""What a compression did and what it reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did and what it reached.

    Attributes:
        error: norm(K - K~)_F / norm(K)_F, measured on fresh random vectors or exact sampled rows.
        rtol: what was asked for.
        frobenius_norm: norm(K)_F, estimated from the same vectors or rows.
        rank_cap_hit: whether `max_rank` stopped a level before its share of rtol was reached.
        capped_levels: those levels, root = 0.
        scheme: the one used ("auto" resolved).
        ordering: the ordering used ("auto" resolved).
        sampler: "products+entries", "entries" or "products".
        num_samples: columns of the sample at the end.
        passes: sweeps made; more than one when the first missed rtol.
        seconds: wall seconds by phase.
        cpu_seconds: CPU seconds of the process over the whole compression, all threads.
        seed: of every random choice.
        neighbour_recall: share of the nearest neighbours that the search for a near field found,
            estimated; None where none were searched.
        choice: why "auto" chose the scheme, and what was built; None where it was given.
        error_bound: what norm(K - K~)_F / norm(K)_F does not exceed with a confidence of 95 %.
            Measured with products, 1.6 times `error`; with all rows, `error`; with some rows, how
            much unseen rows may hold, about sqrt(3 / rows) where none misses anything: no unseen
            row is assumed to be heavier than the heaviest seen (see `SpreadRows.measure`). None in
            files of before.
        measured_by: with what the error was measured, in words.

    Example:
        >>> report = gh.compress(np.eye(8) + 1.0, rtol=1e-6).report
        >>> report.scheme, report.rank_cap_hit, report.error <= 3e-6
        ('hss', False, True)
    """

    error: float
    rtol: float
    frobenius_norm: float
    rank_cap_hit: bool
    capped_levels: tuple[int, ...]
    scheme: str
    ordering: str
    sampler: str
    num_samples: int
    passes: int
    cpu_seconds: float
    seed: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    neighbour_recall: float | None = None
    choice: str | None = None
    error_bound: float | None = None
    measured_by: str = ""
