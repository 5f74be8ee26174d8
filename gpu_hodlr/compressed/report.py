"""What a compression did and what it reached."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class CompressionReport:
    """What a compression did and what it reached; `print` tells it in a few lines.

    Attributes:
        error: norm(K - K~)_F / norm(K)_F, measured on fresh random vectors or exact sampled rows.
        rtol: what was asked for: with `atol` or `damping`, what these came to.
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
        spectral_error: norm(K - K~)_2, measured with a few products of K: from below, mostly within
            10 %. None in old files.
        spectral_sampled: whether it was estimated from columns of K alone, as products would have
            cost more than the compression: 0.7 to 2 of what it is. What is certain is then that
            it does not exceed norm(K - K~)_F = error * frobenius_norm.
        nugget: K - nugget I is positive semi-definite, as the operator declares; None where it
            declares nothing.
        atol: absolute Frobenius error that was asked for; None where none was.
        damping: for which the compression was made, so that `spectral_error` is a tenth of it at
            most; None where none was given.
        error_bound: what norm(K - K~)_F / norm(K)_F does not exceed with a confidence of 95 %.
            Measured with products, 1.6 times `error`; with all rows, `error`; with some rows, how
            much unseen rows may hold, about sqrt(3 / rows) where none misses anything: no unseen
            row is assumed to be heavier than the heaviest seen (see `SpreadRows.measure`). None in
            old files.
        measured_by: with what the error was measured, in words.

    Example:
        >>> report = gh.compress(np.eye(8) + 1.0, rtol=1e-6).report
        >>> report.scheme, report.rank_cap_hit, report.error <= 3e-6
        ('hss', False, True)
        >>> print(str(report).splitlines()[0])
        hss, natural ordering, sampled by products+entries: 16 columns, 1 pass
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
    spectral_error: float | None = None
    spectral_sampled: bool = False
    nugget: float | None = None
    atol: float | None = None
    damping: float | None = None
    error_bound: float | None = None
    measured_by: str = ""

    def __str__(self) -> str:
        passes = f"{self.passes} pass" + ("es" if self.passes != 1 else "")
        lines = [
            f"{self.scheme}, {self.ordering} ordering, sampled by {self.sampler}: "
            f"{self.num_samples} columns, {passes}",
            f"error {self.error:.2g} of norm(K)_F = {self.frobenius_norm:.4g}, wanted "
            f"{self.rtol:.2g}",
        ]
        if self.measured_by:
            lines[-1] += f", measured with {self.measured_by}"
        if self.error_bound is not None:
            lines.append(f"at most {self.error_bound:.2g} with a confidence of 95 %")
        if self.spectral_error is not None:
            how = "estimated from columns of K" if self.spectral_sampled else "measured"
            wanted = "" if self.damping is None else f", for a damping of {self.damping:.4g}"
            lines.append(f"spectral error {self.spectral_error:.2g}, {how}{wanted}")
        if self.rank_cap_hit:
            levels = ", ".join(map(str, self.capped_levels))
            lines.append(f"max_rank was hit on levels {levels} (root = 0)")
        if self.choice:
            lines.append(self.choice)
        least = 0.01 * sum(self.seconds.values())
        spent = ", ".join(f"{name} {x:.2g}" for name, x in self.seconds.items() if x >= least)
        lines.append(f"{self.cpu_seconds:.2g} CPU seconds; seconds by phase: {spent}")
        return "\n".join(lines)


def report_of(said: Mapping[str, Any]) -> CompressionReport:
    """The report that a file tells of; what a later version may say besides is left out.

    Raises:
        ValueError, TypeError: a field is missing, or has a value that it cannot have.
    """
    hints = get_type_hints(CompressionReport)
    known = {name: value for name, value in said.items() if name in hints}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    for name, value in values.items():
        if not _can_be(value, hints[name]):
            raise ValueError(f"the report has {name} = {value!r}")
    return CompressionReport(**values)


def _can_be(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type, and a number >= 0."""
    if get_origin(hint) is UnionType:
        return any(_can_be(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_can_be(v, get_args(hint)[0]) for v in value)
    if get_origin(hint) is Mapping:
        return isinstance(value, dict) and all(
            _can_be(v, get_args(hint)[1]) for v in value.values()
        )
    if hint is float or hint is int:
        numbers = (int, float) if hint is float else (int,)
        return type(value) in numbers and value >= 0  # type: ignore[operator]
    return isinstance(value, hint)
