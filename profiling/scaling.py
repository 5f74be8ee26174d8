"""How compress, product, factor and solve scale with the ranks of MPI.

    mpirun -n 8 python profiling/scaling.py --net enco --json profiling/results/scaling.json
    mpirun -n 4 python profiling/scaling.py --matrix K05 --n 16384
    mpirun -n 4 python profiling/scaling.py --matrix points --n 16384 --weak

On P ranks it runs on sub-communicators of 1, 2, 4, ... and P ranks; the others sleep until those
are done. Strong scaling: the same matrix on all; ranks of the blocks and measured error have to be
the same. Weak scaling: --n rows a rank. Set OMP_NUM_THREADS and OPENBLAS_NUM_THREADS to the threads
a rank may use.

Seconds are the median of the repeats, each the slowest rank's from a common start (product and
solve after one call that is not counted); right-hand sides are spread by rows. Bytes are those that
all ranks hand to the network in one call. The prediction is that of scaling_formulas.py with the
shares of the floors reached on one rank here, and with the network between the ranks measured here.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment
from roofline import copy_bandwidth, gemm_rate
from scaling_formulas import JOBS, Machine, Matrix, predicted, product_bound, sent_bytes
from scaling_model import aligned, excess, matrix_of, sent_table, shares

import gpu_hodlr as gh
from gpu_hodlr.cli import networks
from gpu_hodlr.errors import GpuHodlrError
from gpu_hodlr.matrices import NAMES, matrix
from gpu_hodlr.structures import Telescope

POINTS = "points"  # uniform in the unit square, exp(-r / 0.2)
SCHEMES = ("hss", "fmm", "hodlr", "lowrank")
NAP = 0.01
LARGE, SMALL, PINGS = 1 << 23, 8, 20  # bytes of the network's two measurements, and their number
COPY_BYTES, GEMM_STACK = 1 << 27, 16
SAME_ERROR = 1e-6  # relative difference of the errors that different sums may give


# ---- Ranks ----------------------------------------------------------------------------------


def sizes(ranks: int) -> list[int]:
    """1, 2, 4, ... and all ranks."""
    return sorted({1 << i for i in range(ranks.bit_length())} | {ranks})


def wait(comm: Any) -> None:
    """A barrier that leaves the processor to those who still work."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(NAP)


def timed(comm: Any, job: Callable[[], Any], repeat: int) -> tuple[Any, float]:
    """The last result, and the median over the repeats of the slowest rank's seconds."""
    seconds, result = [], None
    for _ in range(repeat):
        result = None  # one at a time in memory
        comm.Barrier()
        start = time.perf_counter()
        result = job()
        seconds.append(max(comm.allgather(time.perf_counter() - start)))
    return result, float(statistics.median(seconds))


def network(comm: Any) -> tuple[float, float]:
    """Seconds of a message, and bytes a second a rank sends when all gather from all."""
    if comm.size == 1:
        return 0.0, sys.float_info.max
    best = {}
    for size in (SMALL, LARGE):
        own, every = np.zeros(size, np.uint8), np.zeros(size * comm.size, np.uint8)
        times = []
        for _ in range(PINGS if size == SMALL else 3):
            comm.Barrier()
            start = time.perf_counter()
            comm.Allgather(own, every)
            times.append(max(comm.allgather(time.perf_counter() - start)))
        best[size] = min(times)
    steps = (comm.size - 1).bit_length()
    return best[SMALL] / steps, LARGE * (comm.size - 1) / best[LARGE]


# ---- One measurement ------------------------------------------------------------------------


def counted(comm: Any, spread: Any, before: tuple[Counter[str], Counter[str]]) -> tuple[int, int]:
    """Bytes sent by all ranks and messages of the busiest since `before`."""
    sent, messages = (sum((now - then).values()) for now, then in zip(
        counters(spread), before, strict=True))  # fmt: skip
    return sum(comm.allgather(int(sent))), max(comm.allgather(int(messages)))


def counters(spread: Any) -> tuple[Counter[str], Counter[str]]:
    """What a communicator of the package has counted; one rank sends nothing."""
    return tuple(Counter(getattr(spread, name, {})) for name in ("sent", "messages"))


def measure(comm: Any, op: Any, options: argparse.Namespace) -> dict[str, Any]:
    """All jobs on the ranks of `comm`."""

    def compress() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", gh.errors.RankCapWarning)
            warnings.simplefilter("ignore", gh.errors.AccuracyWarning)
            return gh.compress(
                op, options.scheme, rtol=options.rtol, max_rank=options.max_rank,
                leaf_size=options.leaf_size, seed=options.seed, comm=comm,
            )  # fmt: skip

    seconds, sent, messages = {}, {}, {}
    none = (Counter[str](), Counter[str]())
    K, seconds["compress"] = timed(comm, compress, options.repeat)
    owners = K.owners
    total = counted(comm, owners.comm, none)
    sent["compress"], messages["compress"] = (count // options.repeat for count in total)
    phases = {
        name: max(comm.allgather(K.report.seconds.get(name, 0.0))) for name in K.report.seconds
    }
    b = np.random.default_rng(options.seed).standard_normal((op.shape[0], options.nrhs))
    b = b if owners.alone else b[owners.rows.mine]

    def run(name: str, job: Callable[[], Any], warm: bool) -> Any:
        if warm:
            job()
        before = counters(owners.comm)
        result, seconds[name] = timed(comm, job, options.repeat)
        total, messages[name] = counted(comm, owners.comm, before)
        sent[name], messages[name] = total // options.repeat, messages[name] // options.repeat
        return result

    product = run("product", lambda: K @ b, True)
    squares = sum(comm.allgather(float((product * product).sum())))
    del product
    damping = K.report.error * K.report.frobenius_norm
    F = run("factor", lambda: K.factorize(damping), False)
    run("solve", lambda: F.solve(b), True)
    return {
        "ranks": comm.size, "n": op.shape[0], "error": K.report.error,
        "product_norm": squares**0.5, "block_ranks": [list(level) for level in K.ranks],
        "sampler": K.report.sampler, "passes": K.report.passes,
        "ordering": K.report.ordering, "damping": damping,
        "matrix": shape_of(K, op, options.max_rank), "stored_numbers": K.num_stored,
        "seconds": seconds, "compress_seconds": phases, "sent": sent, "messages": messages,
    }  # fmt: skip


def shape_of(K: Any, op: Any, max_rank: int) -> dict[str, Any] | None:
    """What scaling_formulas.py needs to know; None for other forms than HSS."""
    t, report = K.structure, K.report
    if type(t) is not Telescope or not t.levels:
        return None
    products = op.product_cost / op.shape[0] if report.sampler != "entries" else 0.0
    return asdict(Matrix(
        n=t.n, leaf=int(t.D.shape[1]), ranks=tuple(level.rank for level in t.levels),
        samples=report.num_samples, max_rank=max_rank, product_flops=products,
        entry_flops=op.entry_cost, dense=isinstance(op, gh.DenseOperator),
    ))  # fmt: skip


# ---- Tables ---------------------------------------------------------------------------------


def add_predictions(runs: list[dict[str, Any]], machine: dict[str, Any], columns: int) -> None:
    """Add to every run what the formulas say of it, from the one on one rank."""
    if any(run["matrix"] is None for run in runs):
        return
    first, last = runs[0], runs[-1]
    rate, copy = machine["gemm_flops_per_s"], machine["copy_bytes_per_s"]
    share = shares(matrix_of(first), first["seconds"], rate, copy, columns)
    for run in runs:
        here = Machine(
            rate, copy, machine["network_bytes_per_s"], machine["latency_s"], share=share,
            collectives=run["messages"], excess=excess([last], columns),
        )  # fmt: skip
        shape, ranks = matrix_of(run), run["ranks"]
        run["predicted"] = predicted(shape, here, ranks, columns)
        run["sent_formula"] = sent_bytes(shape, ranks, columns)
        run["product_bound"] = product_bound(shape, ranks, columns)


def describe(runs: Sequence[dict[str, Any]], weak: bool) -> str:
    """Seconds, speedups and bytes as tables."""
    modelled = "predicted" in runs[0]
    parts = []
    for job in (*JOBS, "all"):
        head = [*["speedup"] * (not weak), "efficiency", *["s predicted"] * modelled]
        table = [(f"{job}: ranks", "N", "seconds", *head, "MB sent", "error")]
        for run in runs:
            seconds, sent, model = (_of(run.get(k), job) for k in ("seconds", "sent", "predicted"))
            speedup = _of(runs[0]["seconds"], job) / seconds
            table.append((
                str(run["ranks"]), f"{run['n']:,}", f"{seconds:.3g}",
                *[f"{speedup:.2f}"] * (not weak),
                f"{speedup / (1 if weak else run['ranks']):.0%}",
                *[f"{model:.3g}" if run["ranks"] > 1 else "fitted"] * modelled,
                f"{sent / 1e6:.4g}", f"{run['error']:.3g}",
            ))  # fmt: skip
        parts.append(aligned(table))
    names = list(dict.fromkeys(name for run in runs for name in run["compress_seconds"]))
    table = [("compress by phase, s", *(str(run["ranks"]) for run in runs))]
    for name in names:
        table.append((name, *(f"{run['compress_seconds'].get(name, 0):.3g}" for run in runs)))
    parts.append(aligned(table))
    if modelled and len(runs) > 1:
        table = [("product: ranks", "MB sent", "MB, 4 r k v P log2 P", "share of bound")]
        for run in runs[1:]:
            sent, bound = run["sent"]["product"] / 1e6, run["product_bound"] / 1e6
            table.append((str(run["ranks"]), f"{sent:.4g}", f"{bound:.4g}", f"{sent / bound:.0%}"))
        parts.append(aligned(table))
    return "\n\n".join(parts)


def _of(values: dict[str, float] | None, job: str) -> float:
    if values is None:
        return 0.0
    return sum(values[j] for j in JOBS) if job == "all" else values[job]


def differences(runs: Sequence[dict[str, Any]]) -> list[str]:
    """What is not the same on all numbers of ranks."""
    first, found = runs[0], []
    for run in runs[1:]:
        where = f"on {run['ranks']} ranks"
        if run["block_ranks"] != first["block_ranks"]:
            found.append(f"{where} the blocks' ranks are others than on one")
        for name in ("error", "product_norm"):
            if abs(run[name] - first[name]) > SAME_ERROR * first[name]:
                found.append(f"{where} {name} is {run[name]:.9g}, on one {first[name]:.9g}")
    return found


# ---- The command ----------------------------------------------------------------------------


def operator(options: argparse.Namespace, ranks: int) -> Any:
    """The exact matrix, the same on every rank."""
    if options.net:
        net = networks.train(options.net, samples=1000, seed=options.seed)
        return gh.GGNOperator(net.model, net.loss, net.inputs, net.targets, dtype="float64")
    n = options.n * ranks if options.weak else options.n
    if options.matrix == POINTS:
        points = np.random.default_rng(options.seed).random((n, 2))
        return gh.KernelOperator(points, "laplace", 0.2)
    return matrix(options.matrix, n, options.seed)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more, got {text!r}")
    return int(text)


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--net", choices=tuple(networks.LAYERS), help="Gauss-Newton matrix")
    what.add_argument(
        "--matrix", choices=(POINTS, *NAMES), default=POINTS, metavar="NAME",
        help=f"{POINTS} (Laplace kernel in the unit square) or one of {', '.join(NAMES)},"
        f" default {POINTS}",
    )  # fmt: skip
    add(
        "--n",
        type=_count,
        default=8192,
        help="rows of --matrix; with --weak rows a rank, default %(default)s",
    )
    add(
        "--scheme",
        choices=SCHEMES,
        default="hss",
        help="predictions are for hss alone, default %(default)s",
    )
    add("--rtol", type=float, default=1e-2, help="relative error wanted, default 1e-2")
    add("--max-rank", type=_count, default=256, help="cap of the rank, default %(default)s")
    add("--leaf-size", type=_count, default=256, help="rows of a leaf, default %(default)s")
    add(
        "--nrhs",
        type=_count,
        default=256,
        help="columns of products and solves, default %(default)s",
    )
    add(
        "--repeat",
        type=_count,
        default=3,
        help="runs the medians are taken of, default %(default)s",
    )
    add("--seed", type=int, default=0, help="of all random numbers, default %(default)s")
    add("--weak", action="store_true", help="N grows with the ranks; not with --net")
    add("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(argv)
    if options.weak and options.net:
        parser.error("--weak needs a matrix of any size: --matrix")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    try:
        from mpi4py import MPI
    except ImportError as error:
        print(f"scaling.py needs mpi4py and an MPI library: {error}", file=sys.stderr)
        return 2
    world = MPI.COMM_WORLD
    first, runs = world.rank == 0, []
    machine: dict[str, Any] = {}
    if first:
        machine["copy_bytes_per_s"] = copy_bandwidth("cpu", np.dtype(np.float64), COPY_BYTES, 3)
        machine["gemm_flops_per_s"] = gemm_rate("cpu", np.dtype(np.float64), GEMM_STACK, 3)
    wait(world)
    machine["latency_s"], machine["network_bytes_per_s"] = network(world)
    machine["mpi"] = " ".join(MPI.Get_library_version().splitlines()[0].split())
    machine["processors"] = len(os.sched_getaffinity(0))
    try:
        op = None if options.weak else operator(options, 1)
    except (GpuHodlrError, ModuleNotFoundError) as error:
        if first:
            print(f"scaling.py: {error}", file=sys.stderr)
        return 2
    for count in sizes(world.size):
        comm = world.Split(0 if world.rank < count else MPI.UNDEFINED, world.rank)
        if comm != MPI.COMM_NULL:
            try:
                runs.append(measure(comm, op or operator(options, count), options))
            except GpuHodlrError as error:
                print(f"on {count} ranks: {error}", file=sys.stderr, flush=True)
                world.Abort(1)
            except Exception:  # the other ranks would wait for this one
                traceback.print_exc()
                sys.stderr.flush()
                world.Abort(1)
            if first:
                total = sum(runs[-1]["seconds"].values())
                print(f"{count} ranks: {total:.3g} s a round", file=sys.stderr, flush=True)
            comm.Free()
        wait(world)
    if not first:
        return 0
    return report(runs, machine, options)


def report(runs: list[dict[str, Any]], machine: dict[str, Any], options: argparse.Namespace) -> int:
    """Print and write all; 1 if ranks or errors differ."""
    about = environment()
    add_predictions(runs, machine, options.nrhs)
    name, ranks = options.net or options.matrix, runs[-1]["ranks"]
    print(
        f"{name}, {options.scheme}, rtol {options.rtol:g}, max rank {options.max_rank}, leaf"
        f" {options.leaf_size}, {options.nrhs} columns; {about['processor']}, threads a rank:"
        f" {about['threads']}\nmeasured here: one rank copies"
        f" {machine['copy_bytes_per_s'] / 1e9:.3g} GB/s, batched GEMM"
        f" {machine['gemm_flops_per_s'] / 1e9:.3g} GF/s"
    )
    if ranks > 1:
        print(
            f"measured here: {ranks} ranks gather {machine['network_bytes_per_s'] / 1e9:.3g} GB/s"
            f" each, {machine['latency_s'] * 1e6:.3g} us a message; {machine['mpi']}"
        )
    if ranks * about["threads"] > machine["processors"]:
        print(
            f"{ranks} ranks of {about['threads']} threads share {machine['processors']} processors:"
            " beyond these seconds do not fall, bytes and results are as with one each"
        )
    print(f"\n{describe(runs, options.weak)}")
    if "predicted" in runs[0] and len(runs) > 1:
        print(f"\n{sent_table(runs, options.nrhs)}")
    different = [] if options.weak else differences(runs)
    print("\n" + ("\n".join(different) or "ranks and errors: the same" * (not options.weak)))
    if options.json:
        given = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        content = {
            "environment": about, "machine": machine, "name": name, "weak": options.weak,
            "columns": options.nrhs, "options": given, "same": not different, "runs": runs,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
