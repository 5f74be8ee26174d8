"""What more GPUs and a larger N would give, from a measured run of scaling.py: a prediction.

    python profiling/scaling_model.py profiling/results/scaling.json
    python profiling/scaling_model.py --n 121597 --leaf 256 --rank 256 --samples 320 \
        --product-flops 4000 --entry-flops 2000 --share 0.1

The formulas are those of scaling_formulas.py.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from scaling_formulas import (
    JOBS,
    Machine,
    Matrix,
    bytes_of_rank,
    costs,
    floor_seconds,
    predicted,
    sent_bytes,
)

from gpu_hodlr.errors import ArgumentError

GOFMM = "MPI-GOFMM, measured by its authors (SC18): 6,144 Skylake cores, N = 67M"
GOFMM_SECONDS = {"compress": 180.0, "product": 5.0}  # the product has 512 columns

# ---- From a measurement ---------------------------------------------------------------------


def matrix_of(run: Mapping[str, Any]) -> Matrix:
    """The matrix of a run in the JSON of scaling.py."""
    shape = {f.name: run["matrix"][f.name] for f in fields(Matrix)}
    return Matrix(**shape | {"ranks": tuple(shape["ranks"])})


def shares(
    matrix: Matrix, seconds: Mapping[str, float], flops: float, bandwidth: float, columns: int
) -> dict[str, float]:
    """Floor over seconds measured on one rank."""
    floors = costs(matrix, 1, columns)
    return {job: floor_seconds(floors[job], flops, bandwidth) / seconds[job] for job in JOBS}


def excess(runs: Sequence[Mapping[str, Any]], columns: int) -> float:
    """Counted over formula for what compress sent, at the most ranks."""
    last = max(runs, key=lambda run: run["ranks"])
    formula = sent_bytes(matrix_of(last), last["ranks"], columns)["compress"]
    return last["sent"]["compress"] / formula if formula else 1.0


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Columns side by side, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def sent_table(runs: Sequence[Mapping[str, Any]], columns: int) -> str:
    """Counted bytes beside the formula's."""
    table = [("ranks", *(f"{job}{what}" for job in JOBS for what in (", MB sent", " / formula")))]
    for run in runs:
        if run["ranks"] == 1:
            continue
        formula = sent_bytes(matrix_of(run), run["ranks"], columns)
        cells = [
            cell
            for job in JOBS
            for cell in (f"{run['sent'][job] / 1e6:.4g}", f"{run['sent'][job] / formula[job]:.4g}")
        ]
        table.append((str(run["ranks"]), *cells))
    return aligned(table)


def prediction_table(
    matrix: Matrix, machine: Machine, gpus: Sequence[int], columns: int, memory: float
) -> tuple[str, list[dict[str, Any]]]:
    """Predicted seconds of a matrix on more and more GPUs, as text and as rows."""
    table = [("GPUs", *(f"{job}, s predicted" for job in JOBS), "efficiency", "GB a GPU")]
    rows: list[dict[str, Any]] = []
    for count in gpus:
        if count > 1 << matrix.depth:
            break
        seconds = predicted(matrix, machine, count, columns)
        gigabytes = bytes_of_rank(matrix, count) / 1e9
        rows.append({"gpus": count, "n": matrix.n, "predicted": seconds, "GB": gigabytes})
        total, first = (sum(row["predicted"].values()) for row in (rows[-1], rows[0]))
        table.append((
            f"{count:,}", *(f"{seconds[job]:.3g}" for job in JOBS),
            f"{first / total / count:.0%}",
            f"{gigabytes:.3g}" + ("!" if gigabytes > memory / 1e9 else " "),
        ))  # fmt: skip
    return aligned(table), rows


# ---- The command ----------------------------------------------------------------------------


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _count(text: str) -> int:
    value = _positive(text)
    if value != int(value):
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}")
    return int(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("results", nargs="?", type=Path, help="JSON file of scaling.py; else give --share and on")
    add("--columns", type=_count, default=512, help="of products and solves, default %(default)s")
    add(
        "--sizes",
        type=_count,
        nargs="+",
        default=[1 << 20, 1 << 23, 1 << 26],
        help="N, default 2^20 2^23 2^26",
    )
    add(
        "--gpus", type=_count, default=1024, help="at most, by doubling from 1, default %(default)s"
    )
    add("--json", type=Path, metavar="FILE", help="write the predictions there")
    gpu = parser.add_argument_group("a GPU; the defaults are an H100's data sheet and a cluster's")
    gpu.add_argument(
        "--flops",
        type=_positive,
        default="60e12",
        help="float64 operations a second, default %(default)s",
    )
    gpu.add_argument(
        "--bandwidth",
        type=_positive,
        default="3.35e12",
        help="memory, bytes a second, default %(default)s",
    )
    gpu.add_argument("--memory", type=_positive, default="80e9", help="bytes, default %(default)s")
    gpu.add_argument(
        "--network",
        type=_positive,
        default="25e9",
        help="bytes a second a GPU, default %(default)s",
    )
    gpu.add_argument(
        "--latency",
        type=_positive,
        default="5e-6",
        help="seconds of a message, default %(default)s",
    )
    gpu.add_argument(
        "--launch",
        type=_positive,
        default="5e-5",
        help="seconds a level, at least, default %(default)s",
    )
    by_hand = parser.add_argument_group(
        "without a measurement (all); --share, --rank and --samples also instead of what it says"
    )
    by_hand.add_argument("--share", type=_positive, help="of a job's floor reached, at most 1")
    by_hand.add_argument("--rank", type=_count, help="of every level")
    by_hand.add_argument("--leaf", type=_count, help="rows of a leaf")
    by_hand.add_argument("--n", type=_count, help="N at which --leaf and --rank hold")
    by_hand.add_argument("--samples", type=_count, help="columns of the sample")
    by_hand.add_argument("--product-flops", type=float, help="of a product, a row and column; or 0")
    by_hand.add_argument("--entry-flops", type=_positive, help="of an entry")
    return parser


def _given(options: argparse.Namespace) -> Matrix:
    """The matrix that options describe.

    Raises:
        ArgumentError: something is missing or cannot be.
    """
    names = ("share", "rank", "leaf", "n", "samples", "product_flops", "entry_flops")
    missing = [f"--{n.replace('_', '-')}" for n in names if getattr(options, n) is None]
    if missing:
        raise ArgumentError(f"without a file of scaling.py give {', '.join(missing)}")
    if not 0 <= options.product_flops < math.inf:
        raise ArgumentError("--product-flops must be 0 or more")
    if options.rank > options.leaf:
        raise ArgumentError("--rank must be at most --leaf")
    depth = max(1, math.ceil(math.log2(options.n / options.leaf)))
    return Matrix(
        options.n, options.leaf, (options.rank,) * depth, options.samples, options.rank,
        options.product_flops, options.entry_flops,
    )  # fmt: skip


def _from_file(options: argparse.Namespace) -> tuple[Matrix, dict[str, Any], str]:
    """The matrix, what is measured of the machine, and text about both."""
    content = json.loads(options.results.read_text(encoding="utf-8"))
    runs, machine = content["runs"], content["machine"]
    first = min(runs, key=lambda run: run["ranks"])
    if first["ranks"] != 1 or first["matrix"] is None:
        raise ArgumentError(f"{options.results} has no HSS run on one rank")
    matrix, columns = matrix_of(first), content["columns"]
    rate, copy = machine["gemm_flops_per_s"], machine["copy_bytes_per_s"]
    reached = shares(matrix, first["seconds"], rate, copy, columns)
    floors = costs(matrix, 1, columns)
    table = [("one rank, measured", "seconds", "GF/s", "GB/s", "share of floor")]
    for job in JOBS:
        s = first["seconds"][job]
        table.append((job, f"{s:.3g}", f"{floors[job].flops / s / 1e9:.3g}",
                      f"{floors[job].bytes / s / 1e9:.3g}", f"{reached[job]:.3f}"))  # fmt: skip
    known = {"share": reached, "excess": excess(runs, columns)}
    last = max(runs, key=lambda run: run["ranks"])
    if last["ranks"] > 1:
        known["collectives"] = last["messages"]
    text = f"{content['name']}, N = {matrix.n:,}\n{aligned(table)}\n\n{sent_table(runs, columns)}"
    return matrix, known, text


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        if options.share is not None and options.share > 1:
            raise ArgumentError("--share must be at most 1")
        if options.results:
            matrix, known, text = _from_file(options)
            print(text, end="\n\n")
            changed = {"ranks": (options.rank,) * matrix.depth} if options.rank else {}
            if options.samples:
                changed["samples"] = options.samples
            matrix = replace(matrix, **changed)
        else:
            matrix, known = _given(options), {}
    except (ArgumentError, OSError, ValueError, KeyError) as error:
        parser.error(" ".join(str(error).split()))
    if options.share is not None:
        known["share"] = dict.fromkeys(JOBS, options.share)
    machine = Machine(
        options.flops, options.bandwidth, options.network, options.latency, options.launch, **known
    )
    shown = ", ".join(f"{job} {machine.share[job]:.3f}" for job in JOBS)
    print(
        f"assumed of a GPU: {machine.flops / 1e12:g} TF/s float64, {machine.bandwidth / 1e12:g}"
        f" TB/s, {options.memory / 1e9:g} GB, network {machine.network / 1e9:g} GB/s,"
        f" {machine.latency * 1e6:g} us a message, {machine.launch * 1e6:g} us a level\n"
        f"assumed: it reaches the same share of its floors ({shown}); more levels of rank"
        f" {max(matrix.ranks)}; {matrix.samples} samples; no overlap of work and messages; compress"
        f" sends {machine.excess:.3g} times its formula; what compress does without a formula"
        " (ordering) scales like the rest; ! is more than the GPU's memory\n"
        "weakest: shares of a CPU core carried over to a GPU (pivoted QR above all), and ranks"
        " that do not grow with N"
    )
    gpus = [1 << i for i in range(options.gpus.bit_length())]
    every: list[dict[str, Any]] = []
    for n in options.sizes:
        text, rows = prediction_table(
            matrix.grown(n), machine, gpus, options.columns, options.memory
        )
        every += rows
        print(f"\nN = {n:,}, {options.columns} columns\n{text}")
    theirs = ", ".join(f"{job} {seconds:g} s" for job, seconds in GOFMM_SECONDS.items())
    print(f"\n{GOFMM}: {theirs} (512 columns)")
    if options.json:
        content = {"matrix": asdict(matrix), "machine": asdict(machine), "rows": every}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
