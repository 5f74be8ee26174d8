"""Predictions beside the measurements of gpu_check.py, with their ratio."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpu_costs.gpus import GPUS
from gpu_costs.libraries import gemm_work

_GEMM_ORDER, _GEMM_STACK = 256, 512  # of roofline.gemm_rate, as gpu_check.py calls it
_TABLE_JOBS = {
    "compress": "compress_seconds", "product, 1 column": "multiply_seconds",
    "factor": "factor_seconds", "solve, 1 column": "solve_seconds",
}  # fmt: skip
Row = Mapping[str, Any]


class ComparisonError(ValueError):
    """Files that cannot be put side by side."""


def check_prediction(document: Any) -> None:
    """Raise where this is not a file of predictions.

    Raises:
        ComparisonError: it is not.
    """
    if not isinstance(document, dict) or document.get("prediction") is not True:
        raise ComparisonError('no prediction of gpu_model.py: "prediction": true is missing')
    if not isinstance(document.get("cases"), list):
        raise ComparisonError("the prediction has no cases")


def rows_of(check: Any) -> list[Row]:
    """All rows of a gpu_check.json.

    Raises:
        ComparisonError: it is not one, or has been made with small matrices.
    """
    steps = check.get("steps") if isinstance(check, dict) else None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ComparisonError("no file of gpu_check.py: it has no steps")
    if check.get("size") != "full":
        raise ComparisonError(f"gpu_check ran with size {check.get('size')!r}, not with 'full'")
    return [row for step in steps for row in step.get("rows", [])]


def gpu_of(rows: Sequence[Row]) -> str:
    """The GPU of the model that the rows were measured on.

    Raises:
        ComparisonError: none is named, or none of the model's.
    """
    named = [row["gpu"] for row in rows if isinstance(row.get("gpu"), str)]
    if not named:
        raise ComparisonError("the measurements do not name their GPU")
    found = next((name for name in GPUS if name in named[0]), None)
    if found is None:
        raise ComparisonError(f"measured on {named[0]!r}; the model knows {', '.join(GPUS)}")
    return found


def compared(document: Any, check: Any) -> tuple[str, list[dict[str, Any]]]:
    """The GPU, and a row for all that is both predicted and measured.

    Args:
        document: JSON of gpu_model.py.
        check: JSON of gpu_check.py.

    Returns:
        Rows with what, predicted, measured and ratio = measured / predicted.

    Raises:
        ComparisonError: one of them is something else, or they have nothing in common.
    """
    check_prediction(document)
    rows = rows_of(check)
    gpu = gpu_of(rows)
    pairs = [*_rates(rows, gpu), *_jobs(document, rows, gpu), *_kernels(document, rows, gpu)]
    if not pairs:
        raise ComparisonError("nothing is both predicted and measured")
    return gpu, [
        {"what": what, "predicted": p, "measured": m, "ratio": m / p} for what, p, m in pairs
    ]


def _measured(rows: Sequence[Row], case: str) -> Iterator[Row]:
    """Of a case, those that succeeded."""
    return (row for row in rows if row.get("case") == case and row.get("verdict") == "passed")


def _rates(rows: Sequence[Row], gpu: str) -> Iterator[tuple[str, float, float]]:
    """What is assumed of copies and of a batched GEMM, as rates."""
    assumed = GPUS[gpu]
    for row in _measured(rows, "rates"):
        itemsize = 4 if row["dtype"] == "float32" else 8
        yield f"copy, {row['dtype']}, GB/s", assumed.copy / 1e9, row["copy_GB_per_s"]
        order = (_GEMM_ORDER,) * 3
        seconds = gemm_work(assumed, *order, _GEMM_STACK, itemsize).seconds(assumed)
        rate = 2 * _GEMM_ORDER**3 * _GEMM_STACK / seconds / 1e9
        yield f"batched GEMM, {row['dtype']}, GF/s", rate, row["gemm_GF_per_s"]


def _predictions(document: Any, gpu: str) -> dict[tuple[Any, ...], dict[str, float]]:
    """Seconds by job, and by phase of compress, of every case."""
    found: dict[tuple[Any, ...], dict[str, float]] = {}
    for case in document["cases"]:
        key = case["matrix"], case["accuracy"], case["scheme"], case["dtype"], case["N"]
        seconds: dict[str, float] = {}
        for job, row in case["jobs"].items():
            if gpu in row["seconds"]:
                seconds[job] = row["seconds"][gpu]
                for phase, part in row.get("phases", {}).items():
                    seconds[f"{job}: {phase}"] = part["seconds"][gpu]
        found[key] = seconds
    return found


def _jobs(document: Any, rows: Sequence[Row], gpu: str) -> Iterator[tuple[str, float, float]]:
    """Of the rooflines and of the founding tables, job by job and phase by phase."""
    known = _predictions(document, gpu)
    for row in _measured(rows, "jobs"):
        accuracy = "" if row["matrix"] == "kernel" else "low"
        key = row["matrix"], accuracy, "hss", row["dtype"], row["N"]
        seconds = {
            f"{job['part_of']}: {job['job']}" if job["part_of"] else job["job"]: job["seconds"]
            for job in row["jobs"]
        }
        yield from _both(f"{row['matrix']}, N = {row['N']:,}", known.get(key, {}), seconds)
    for case in ("product", "inverse"):
        for row in _measured(rows, case):
            scheme = row.get("scheme", "hss").lower()
            name = f"table: {row['name']} {row['accuracy']} {scheme}"
            seconds = {job: row[field] for job, field in _TABLE_JOBS.items() if row.get(field)}
            for phase, spent in row.get("phase_seconds", {}).items():
                seconds[f"compress: {phase}"] = spent
            for key, predicted in known.items():
                if key[:3] == (row["name"], row["accuracy"], scheme):
                    yield from _both(name, predicted, seconds)


def _both(
    name: str, predicted: Mapping[str, float], measured: Mapping[str, float]
) -> Iterator[tuple[str, float, float]]:
    for job, seconds in measured.items():
        if predicted.get(job) and seconds:
            yield f"{name}: {job}", predicted[job], seconds


def _kernels(document: Any, rows: Sequence[Row], gpu: str) -> Iterator[tuple[str, float, float]]:
    """The primitives on level shapes."""
    shape = ("nodes", "m", "s", "r", "dtype")
    known = {
        (row["call"], *(row[name] for name in shape)): row["seconds"].get(gpu)
        for row in document.get("kernels", [])
    }
    for row in rows:
        if row.get("microseconds") and all(name in row for name in shape):
            key = row["case"], *(row[name] for name in shape)
            if known.get(key):
                where = f"{row['nodes']} x {row['m']} x {row['s']}, r = {row['r']}, {row['dtype']}"
                yield f"{row['case']}, {where}", known[key], row["microseconds"] / 1e6
