"""The founding tables on the networks that travel along: a row for each product and inverse."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from network_data import load, operator

from gpu_hodlr.cli import Progress
from gpu_hodlr.cli.measure import Preset, Settings, measure_inverse, measure_product
from gpu_hodlr.cli.table import FMM_PRESETS, FOUNDING, PRESETS
from gpu_steps.report import Report

# What is quick comes first: whatever the time allows is then known of every matrix.
ORDER = (("mnist", "low"), ("enco", "low"), ("mnist", "high"), ("enco", "high"))
MAXITER = {"full": 500, "small": 20}
# In a trial: a few pixels and units of the same networks.
CUT = {"side": 4, "hidden": 4, "samples": 60}
CUT_LEAF, CUT_BUDGET = 40, 0.5
_FOR_PICTURES = ("leaf_sizes", "block_ranks", "far_pairs", "near_pairs")


def run(report: Report) -> None:
    operators: dict[str, Any] = {}
    for name, accuracy in ORDER:
        with report.case("network", name=name) as found:
            if name not in operators:
                net = load(name, **(CUT if report.small else {}))
                operators[name] = operator(net, device="cuda")
                found["network"] = net.describe()
        if name not in operators:
            continue
        settings = Settings(
            name=name, accuracy=accuracy, preset=_preset(PRESETS[name, accuracy], report),
            seed=0, maxiter=MAXITER[report.size], device="cuda",
        )  # fmt: skip
        _inverse(report, operators[name], settings)
        if (name, accuracy) in FMM_PRESETS:
            preset = _preset(FMM_PRESETS[name, accuracy], report)
            _product(report, operators[name], replace(settings, scheme="fmm", preset=preset))


def _preset(preset: Preset, report: Report) -> Preset:
    if not report.small:
        return preset
    return replace(preset, leaf_size=CUT_LEAF, budget=CUT_BUDGET if preset.budget else 0.0)


def _product(report: Report, op: Any, settings: Settings) -> Any:
    """Compress and multiply; the matrix and its result, None where that failed."""
    made = None
    about = {"name": settings.name, "accuracy": settings.accuracy, "scheme": settings.scheme}
    with report.case("product", **about) as found:
        made = measure_product(op, settings, Progress(0))
        found.update(_numbers(made[1]), founding=asdict(FOUNDING[settings.name, settings.accuracy]))
    return made


def _inverse(report: Report, op: Any, settings: Settings) -> None:
    made = _product(report, op, settings)
    if made is None:
        return
    K, result = made
    with report.case("inverse", name=settings.name, accuracy=settings.accuracy) as found:
        measure_inverse(op, K, result, settings, Progress(0))
        found.update(
            (key, getattr(result, key))
            for key in ("damping", "factor_seconds", "solve_seconds", "logdet", "inverse_error",
                        "true_residual", "cg_with", "cg_without", "notes")
        )  # fmt: skip


def _numbers(result: Any) -> dict[str, Any]:
    """A result without what only a picture needs, and what the case says already."""
    left_out = {*_FOR_PICTURES, "name", "accuracy", "scheme"}
    return {
        key: value
        for key, value in asdict(result).items()
        if key not in left_out and value is not None
    }
