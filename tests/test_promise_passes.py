"""Passes until the promise is kept, and what is warned of where it is not."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_promise import options, zero

import gpu_hodlr as gh
from gpu_hodlr.compression import probe as probe_module
from gpu_hodlr.compression import promise
from gpu_hodlr.errors import AccuracyWarning, RankCapWarning
from gpu_hodlr.schemes import SCHEMES
from gpu_hodlr.schemes import scheme as real


class Probe:
    """Tells errors that were thought of before."""

    norm = 40.0

    def __init__(self, *errors: float) -> None:
        self._errors = list(errors)

    def measure(self, structure: Any) -> probe_module.Measured:
        error = self._errors.pop(0)
        return probe_module.Measured(error, error)


class Scheme:
    """Notes what is aimed at."""

    products_only = needs_eigenbasis = False
    promised = SCHEMES["hss"].promised
    keeps = real.Scheme.keeps

    def __init__(self, capped: tuple[int, ...] = (), accepted: float = 2.0) -> None:
        self.aims: list[float] = []
        self.firsts: list[bool] = []
        self._capped, self.accepted = capped, accepted

    def share(self, sampling: Any) -> float:
        return 0.5

    def build(self, job: Any) -> Any:
        return self

    def run(self, tolerance: float, first: bool) -> tuple[Any, tuple[int, ...]]:
        self.aims.append(tolerance)
        self.firsts.append(first)
        return zero(4), self._capped


def passes(scheme: Scheme, *errors: float) -> promise.Made:
    sampling = options(sampler="entries").sampling(gh.DenseOperator(np.eye(4)))
    job = SimpleNamespace(max_rank=256, sketch=None, having=lambda grows: job)
    return promise.until_promise(
        scheme, job, sampling, 1e-3, np.dtype(np.float64), Probe(*errors), False
    )


@pytest.mark.parametrize(
    ("errors", "made"),
    [
        ([1.9e-3], 1),
        ([2.1e-3, 1e-3], 2),
        ([15e-3, 1e-3], 2),
        ([5e-3, 4e-3, 1e-3], 3),
        ([5e-3, 4e-3, 3.5e-3], 3),
    ],
)
def test_passes_until_twice_rtol(errors: list[float], made: int):
    scheme = Scheme()
    found = passes(scheme, *errors)
    assert found.passes == made == len(scheme.aims)
    assert found.measured.error == errors[-1]
    assert scheme.aims[0] == pytest.approx(0.5 * 1e-3 * 40.0)
    assert scheme.firsts == [True, *[False] * (made - 1)]
    for i, error in enumerate(errors[:-1]):
        assert scheme.aims[i + 1] == pytest.approx(scheme.aims[i] * 1e-3 / error)


def test_a_scheme_may_accept_no_more_than_rtol():
    scheme = Scheme(accepted=1.0)
    assert passes(scheme, 1.1e-3, 0.9e-3).passes == 2
    assert scheme.aims[1] < scheme.aims[0] / 1.1  # or the next error would be about rtol
    assert passes(Scheme(accepted=1.0), 1e-3).passes == 1


def test_no_pass_after_a_cap():
    assert passes(Scheme(capped=(1,)), 0.5).passes == 1


@pytest.mark.parametrize(
    ("capped", "error", "kept"),
    [((), 3e-3, True), ((), 3.1e-3, False), ((2,), 1e-3, True), ((2,), 1.1e-3, False)],
)
def test_what_keeps_the_promise(capped: tuple[int, ...], error: float, kept: bool):
    made = passes(Scheme(capped), error, error, error)
    assert made.keeps(1e-3) == kept
    assert not made.keeps(1e-4)
    less = passes(Scheme(), 1e-4)  # of those that keep it what stores least, else what errs least
    assert promise._better(made, less, 1e-3) is (made if kept else less)
    assert promise._better(less, made, 1e-9) is less


@pytest.mark.parametrize("error", [1.1e-3, 2e-3, 2.9e-3, 0.5])
def test_a_cap_is_warned_of_beyond_rtol(error: float):
    report = gh.compress(np.eye(8), rtol=1e-3).report
    capped = gh.CompressionReport(
        **{**vars(report), "error": error, "rank_cap_hit": True, "capped_levels": (2, 1)}
    )
    with pytest.warns(RankCapWarning, match=r"max_rank 7 was hit on level 2, 1"):
        promise.warn(capped, 7, "float64")


@pytest.mark.parametrize(("error", "capped"), [(2.9e-3, False), (0.9e-3, True), (0.0, False)])
def test_a_kept_promise_is_not_warned_of(error: float, capped: bool):
    report = gh.compress(np.eye(8), rtol=1e-3).report
    kept = gh.CompressionReport(
        **{**vars(report), "error": error, "rank_cap_hit": capped, "capped_levels": (1,)}
    )
    promise.warn(kept, 7, "float64")  # warnings are errors


@pytest.mark.parametrize("error", [1.1e-3, 2.9e-3])
def test_a_form_without_slack_is_warned_of_beyond_rtol(error: float):
    report = gh.compress(np.eye(8), rtol=1e-3).report
    missed = gh.CompressionReport(**{**vars(report), "error": error, "scheme": "kfe"})
    with pytest.warns(AccuracyWarning, match="exceeds rtol"):
        promise.warn(missed, 7, "float64")


def for_a_damping(spectral_error: float, **changed: object) -> gh.CompressionReport:
    report = gh.compress(np.eye(8), damping=0.1).report
    changed = {"error": 0.5, "spectral_error": spectral_error, **changed}
    return gh.CompressionReport(**{**vars(report), **changed})


def test_of_a_damping_alone_the_spectral_error_decides():
    """What it came to in the Frobenius norm was a guess, and none of the user's."""
    cap = {"rank_cap_hit": True, "capped_levels": (2, 1)}
    promise.warn(for_a_damping(0.01, **cap), 7, "float64", rtol_asked=False)
    with pytest.warns(RankCapWarning, match="rtol .*; raise max_rank or rtol, or try scheme"):
        promise.warn(for_a_damping(0.01, **cap), 7, "float64", rtol_asked=True)
    with pytest.warns(RankCapWarning, match="damping 0.1: max_rank 7 was hit on level 2, 1 .* try"):
        promise.warn(for_a_damping(0.02, **cap), 7, "float64", rtol_asked=False)
    chosen = for_a_damping(0.02, **cap, choice="of all the one that stores least")
    with pytest.warns(RankCapWarning, match="raise max_rank$"):
        promise.warn(chosen, 7, "float64", rtol_asked=False)
    with pytest.warns(
        AccuracyWarning, match="rounding of float32.* is the floor; use dtype float64"
    ):
        promise.warn(for_a_damping(0.02, error=1e-6), 7, "float32", rtol_asked=False)
