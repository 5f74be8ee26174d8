"""The real algorithm's jobs, recorded: compress, product, factor, solve."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
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
    Case("mnist", "high", "fmm"), Case("enco", "low", "hss"), Case("enco", "high", "kfe"),
    Case("kernel", "", "hss", 16_384),
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
    jobs["compress"], K = recorder.of(lambda: gh.compress(op, case.scheme, **options))
    report = K.report
    about = {
        "N": K.shape[0], "dtype": str(K.dtype), "compress": options, "error": report.error,
        "stored_bytes": K.nbytes, "ranks": [max(level) for level in K.ranks if len(level)],
    }  # fmt: skip
    for k in PRODUCT_COLUMNS:
        jobs[_job("product", k)] = _replayed(recorder, K.matmat, _columns(recorder, K, k))
    if not isinstance(K.structure, Multipole) and case.scheme != "kfe":  # solved by iterations
        damping = report.error * report.frobenius_norm
        jobs["factor"], F = recorder.of(lambda: K.factorize(damping))
        for k in SOLVE_COLUMNS:
            jobs[_job("solve", k)] = _replayed(recorder, F.solve, _columns(recorder, K, k))
    return Recorded(case, about, jobs)


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
