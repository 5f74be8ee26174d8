"""Predictions as rows: seconds by job, phase and GPU, beside what was asked for; never measured."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from types import ModuleType
from typing import Any

import numpy as np

from gpu_costs import steps as kinds
from gpu_costs.clock import Clock, Totals, predicted
from gpu_costs.gpus import GPUS, MODELLED, Gpu
from gpu_costs.growth import grown
from gpu_costs.jobs import Recorded
from gpu_costs.record import Recorder
from gpu_costs.steps import Step
from gpu_costs.twins import ReadsError
from gpu_hodlr.cli.table import FOUNDING

COMPRESS_GOAL, OTHER_GOAL = 20.0, 100.0  # times faster than the founding tables' 192 cores
IN_A_ROW = 10  # calls of a primitive, as gpu_check.py measures them
_ASKED = ("steps", "graphs", "waits", "copies", "bytes", "flops", "depth", "host")


def job_row(steps: Iterable[Step], gpus: Sequence[Gpu]) -> dict[str, Any]:
    """A job on every GPU: seconds, those of work, of the longest chain, and what was asked for."""
    steps = list(steps)
    clocks = {gpu.name: predicted(steps, gpu) for gpu in gpus}
    first = next(iter(clocks.values()))
    row = _totals(first.total, {name: clock.total for name, clock in clocks.items()})
    row["chain"] = {gpu.name: first.total.depth * (gpu.least + gpu.node) for gpu in gpus}
    row["slowest"] = {name: _slowest(clock) for name, clock in clocks.items()}
    if len(first.phases) > 1:
        row["phases"] = {
            phase: _totals(
                first.phases[phase], {name: c.phases[phase] for name, c in clocks.items()}
            )
            for phase in first.phases if phase
        }  # fmt: skip
    return row


def _totals(asked: Totals, by_gpu: dict[str, Totals]) -> dict[str, Any]:
    found = {key: value for key, value in asdict(asked).items() if key in _ASKED}
    return {
        "seconds": {name: totals.seconds for name, totals in by_gpu.items()},
        "busy": {name: totals.busy for name, totals in by_gpu.items()},
        **found,
    }


def _slowest(clock: Clock, count: int = 3) -> dict[str, float]:
    """Seconds of what takes the GPU longest."""
    ranked = sorted(clock.by_name.items(), key=lambda item: -item[1])
    return dict(ranked[:count])


def case_row(recorded: Recorded, gpus: Sequence[Gpu]) -> dict[str, Any]:
    """All jobs of a case, as recorded."""
    return _row(recorded, recorded.about, recorded.jobs, gpus, "recorded at this N")


def grown_row(
    recorded: Recorded, half: Recorded, doublings: int, gpus: Sequence[Gpu]
) -> dict[str, Any]:
    """All jobs of a case at 2^doublings times its N, see growth.py."""
    jobs = {name: grown(steps, half.jobs[name], doublings) for name, steps in recorded.jobs.items()}
    n = recorded.about["N"]
    ranks = recorded.about["ranks"]
    about = recorded.about | {
        "N": n << doublings, "ranks": ranks + [max(ranks, default=0)] * doublings,
        "stored_bytes": recorded.about["stored_bytes"] << doublings, "error": None,
    }  # fmt: skip
    how = f"grown from steps recorded at N = {n:,} and {half.about['N']:,}; ranks do not grow"
    return _row(recorded, about, jobs, gpus, how)


def _row(
    recorded: Recorded, about: dict[str, Any], jobs: dict[str, list[Step]], gpus: Sequence[Gpu],
    how: str,
) -> dict[str, Any]:  # fmt: skip
    case = recorded.case
    return {
        "case": case.name, "matrix": case.matrix, "accuracy": case.accuracy, "scheme": case.scheme,
        "how": how, **about, "jobs": {name: job_row(steps, gpus) for name, steps in jobs.items()},
    }  # fmt: skip


def kernel_rows(
    recorder: Recorder,
    levels: Sequence[tuple[Any, str, bool]],
    gpus: Sequence[Gpu],
    columns: tuple[int, ...] = (1, 8, 64),
) -> list[dict[str, Any]]:
    """The primitives that gpu_check.py measures.

    Args:
        recorder: installed.
        levels: shapes, dtype, and whether their decompositions alone are wanted.
        gpus: to predict for.
        columns: of the products.
    """
    rows, known = [], kernel_calls()
    for level, dtype, decompositions in levels:
        kind = np.dtype(dtype).type
        if decompositions:
            made = known.decompositions(level, known.Inputs(kind))
        else:
            made = known.calls(level, kind, columns)
        for call in made:
            steps = asked(recorder, call.work)
            in_a_row = [step for step in steps if step.kind != kinds.HOST] * IN_A_ROW
            seconds = {gpu.name: predicted(in_a_row, gpu).total.seconds / IN_A_ROW for gpu in gpus}
            shape = {name: getattr(level, name) for name in ("nodes", "m", "s", "r")}
            rows.append({"call": call.name, "dtype": dtype, **shape, "seconds": seconds})
    return rows


def asked(recorder: Recorder, work: Callable[[], Any]) -> list[Step]:
    """The steps of a call whose result is of no interest: not executed, unless it reads its own."""
    try:
        with recorder.hollow():
            return recorder.of(work)[0]
    except ReadsError:
        return recorder.of(work)[0]


def kernel_calls() -> ModuleType:
    """gpu_steps.kernel_calls on the stand-in of now: it holds the CuPy it was imported with."""
    sys.modules.pop("gpu_steps.kernel_calls", None)
    return importlib.import_module("gpu_steps.kernel_calls")


def founding_rows(cases: Sequence[dict[str, Any]], gpus: Sequence[Gpu]) -> list[dict[str, Any]]:
    """The founding tables' jobs: 192 cores, the goal, and what is predicted."""
    by_name = {(row["matrix"], row["accuracy"], row["scheme"]): row for row in cases}
    rows = []
    for (matrix, accuracy), founding in FOUNDING.items():
        theirs = founding.product_scheme.lower()
        for job, seconds, times, schemes in (
            ("compress", founding.compress_seconds, COMPRESS_GOAL, (theirs, "kfe")),
            ("product, 1 column", founding.multiply_seconds, OTHER_GOAL, (theirs, "kfe")),
            ("factor", founding.factor_seconds, OTHER_GOAL, ("hss",)),
        ):
            found = (by_name.get((matrix, accuracy, scheme)) for scheme in schemes)
            row = next((r for r in found if r is not None and job in r["jobs"]), None)
            predictions = row["jobs"][job]["seconds"] if row else {}
            goal = seconds / times if seconds else None
            rows.append({
                "matrix": matrix, "accuracy": accuracy, "job": job, "founding": seconds,
                "goal": goal, "scheme": row["scheme"] if row else None,
                "predicted": {gpu.name: predictions.get(gpu.name) for gpu in gpus},
            })  # fmt: skip
    return rows


def assumptions(gpus: Sequence[Gpu]) -> dict[str, Any]:
    """What is assumed of every GPU, and of the model."""
    return {
        "model": list(MODELLED),
        "gpus": {
            gpu.name: {name: {"value": value, "why": why} for name, value, why in gpu.assumptions()}
            for gpu in gpus
        },
    }


def chosen(names: Sequence[str]) -> list[Gpu]:
    """GPUs by their names."""
    return [GPUS[name] for name in names]
