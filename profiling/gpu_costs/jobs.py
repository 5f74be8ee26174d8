"""The real algorithm's jobs, recorded: compress, product, factor, solve."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from network_data import load, operator

import gpu_hodlr as gh
from gpu_costs.record import Recorder
from gpu_costs.steps import HOST, Step
from gpu_costs.twins import blocks_by
from gpu_hodlr.cli.table import FMM_PRESETS, KFE_PRESETS, PRESETS
from gpu_hodlr.structures import Multipole

PRODUCT_COLUMNS, SOLVE_COLUMNS = (1, 16, 256), (1, 64)  # as roofline.py measures
SMALL = {"side": 4, "hidden": 4, "samples": 60}  # of a network, for a trial
SMALL_LEAF = 40
KERNEL = {"rtol": 1e-2, "max_rank": 512, "leaf_size": 128}


@dataclass(frozen=True)
class Case:
    """A matrix and how it is compressed.

    Attributes:
        matrix: "mnist", "enco" or "kernel".
        accuracy: of the founding tables; "" of the kernel.
        scheme: as `gh.compress` takes it.
        n: rows of the kernel matrix.
    """

    matrix: str
    accuracy: str
    scheme: str
    n: int | None = None

    @property
    def name(self) -> str:
        """Such as mnist low fmm."""
        return " ".join(filter(None, (self.matrix, self.accuracy, self.scheme)))

    def options(self, small: bool) -> dict[str, Any]:
        """For `gh.compress`."""
        if self.matrix == "kernel":
            return {**KERNEL, **({"leaf_size": SMALL_LEAF} if small else {})}
        key = self.matrix, self.accuracy
        preset = {"fmm": FMM_PRESETS, "kfe": KFE_PRESETS}.get(self.scheme, PRESETS)[key]
        found: dict[str, Any] = {"rtol": preset.rtol, "max_rank": preset.max_rank}
        if self.scheme != "kfe":
            found["leaf_size"] = SMALL_LEAF if small else preset.leaf_size
        if self.scheme == "fmm":
            found["budget"] = 0.5 if small else preset.budget
        return found


CASES = (
    Case("mnist", "low", "hss"), Case("mnist", "low", "fmm"), Case("mnist", "high", "hss"),
    Case("mnist", "high", "fmm"), Case("mnist", "low", "hodlr"), Case("enco", "low", "hss"),
    Case("enco", "high", "kfe"), Case("kernel", "", "hss", 16_384),
)  # fmt: skip


@dataclass
class Recorded:
    """What was recorded of a case.

    Attributes:
        case: which.
        about: N, error, ranks, stored bytes.
        jobs: steps by job.
    """

    case: Case
    about: dict[str, Any]
    jobs: dict[str, list[Step]] = field(default_factory=dict)


def _operators(case: Case, small: bool, recorder: Recorder) -> tuple[Any, Any]:
    """The matrix on the stand-in's device, and the same on the CPU."""
    if case.matrix == "kernel":
        points = np.random.default_rng(0).random((case.n, 3))
        on_device = recorder.host.cupy.asarray(points)
        return tuple(gh.KernelOperator(p, "laplace", 0.2) for p in (on_device, points))
    net = load(case.matrix, **(SMALL if small else {}))
    return tuple(operator(net, device=device) for device in ("cuda", "cpu"))


def record(recorder: Recorder, case: Case, *, small: bool = False) -> Recorded:
    """Compress, multiply, factorize and solve on the stand-in.

    Args:
        recorder: installed.
        case: what.
        small: a few pixels and units of the networks, for a trial.
    """
    op, twin = _operators(case, small, recorder)
    blocks_by(recorder, op, twin)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return record_matrix(recorder, case, op, case.options(small))


def record_matrix(recorder: Recorder, case: Case, op: Any, options: dict[str, Any]) -> Recorded:
    """As `record`, of a given operator on the stand-in's device."""
    jobs: dict[str, list[Step]] = {}
    jobs["compress"], K = _second(recorder, lambda: gh.compress(op, case.scheme, **options))
    report = K.report
    about = {
        "N": K.shape[0], "dtype": str(K.dtype), "compress": options, "error": report.error,
        "stored_bytes": K.nbytes, "ranks": [max(level) for level in K.ranks if len(level)],
    }  # fmt: skip
    for k in PRODUCT_COLUMNS:
        jobs[_job("product", k)] = _replayed(recorder, K.matmat, _columns(recorder, K, k))
    if not isinstance(K.structure, Multipole) and case.scheme != "kfe":  # solved by iterations
        damping = report.error * report.frobenius_norm
        jobs["factor"], F = _second(recorder, lambda: K.factorize(damping))
        for k in SOLVE_COLUMNS:
            jobs[_job("solve", k)] = _replayed(recorder, F.solve, _columns(recorder, K, k))
    return Recorded(case, about, jobs)


def _second(recorder: Recorder, job: Callable[[], Any]) -> tuple[list[Step], Any]:
    """The steps of a second run, and what it gave."""
    first = recorder.of(job)[0]
    second, result = recorder.of(job)
    return quieter(first, second), result


def quieter(first: list[Step], second: list[Step]) -> list[Step]:
    """The second run's steps with the less of two times of the host's own work between them.

    It is measured, on cores that others use as well. Where the runs asked for something else, the
    second's stand as they are.
    """
    (before, asked), (_, again) = (_by_place(steps) for steps in (first, second))
    if asked != again:
        return second
    result, place = [], 0
    for step in second:
        if step.kind != HOST:
            place += 1
            result.append(step)
        elif place in before:
            result.append(replace(step, seconds=min(step.seconds, before[place])))
    return result


def _by_place(steps: list[Step]) -> tuple[dict[int, float], list[tuple[str, str]]]:
    """Seconds of the host's own work by how many other steps came before, and these."""
    seconds: dict[int, float] = {}
    others: list[tuple[str, str]] = []
    for step in steps:
        if step.kind == HOST:
            seconds[len(others)] = seconds.get(len(others), 0.0) + step.seconds
        else:
            others.append((step.kind, step.name))
    return seconds, others


def _job(name: str, columns: int) -> str:
    return f"{name}, {columns} column{'s' * (columns > 1)}"


def _columns(recorder: Recorder, K: Any, k: int) -> Any:
    return recorder.host.cupy.zeros((K.shape[0], k), K.dtype)


def _replayed(recorder: Recorder, call: Callable[[Any], Any], v: Any) -> list[Step]:
    """The steps of a second call: its numbers do not matter, and are not computed.

    The host launches a graph, if there is one, and does nothing else worth a step.
    """
    with recorder.hollow():
        call(v)
        return [step for step in recorder.of(lambda: call(v))[0] if step.kind != HOST]
