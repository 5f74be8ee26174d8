"""The one call: from an operator to a compressed matrix."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpu_hodlr.arrays import check_dtype
from gpu_hodlr.bases import samples_for
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.compressed import CompressedMatrix, CompressionReport, matrix_of
from gpu_hodlr.compression.choice import Choice, choose
from gpu_hodlr.compression.probe import ErrorProbe
from gpu_hodlr.devices import check_memory, device_of, is_array, memory_errors, to_host
from gpu_hodlr.distributed import Communicator, Ownership, communicator
from gpu_hodlr.errors import AccuracyWarning, ArgumentError, RankCapWarning
from gpu_hodlr.interactions import check_budget
from gpu_hodlr.operators import (
    Operator,
    ScaledOperator,
    Sketch,
    as_operator,
    check_consistent,
)
from gpu_hodlr.ordering import build_tree, check_ordering
from gpu_hodlr.profiling import PhaseTimer
from gpu_hodlr.schemes.hodlr import HODLRBuild
from gpu_hodlr.schemes.hss import FMMBuild, HSSBuild, ProductsOnlyBuild
from gpu_hodlr.schemes.job import Build, Job
from gpu_hodlr.schemes.lowrank import NystromBuild
from gpu_hodlr.structures import Structure
from gpu_hodlr.tree import rows_tree

SCHEMES = ("hss", "fmm", "hodlr", "lowrank", "auto")
SAMPLERS = ("auto", "products+entries", "entries", "products")
_START = 160  # columns sampled at first
# Of rtol, aimed at by the bases: interpolation from both sides amplifies their errors, by about
# two with Gaussian samples and eight with columns (measured on networks and point kernels).
_AIM = {"products+entries": 0.5, "products": 0.5, "entries": 0.12}
# Truncated to what they may miss, which nothing amplifies.
_AIM_OF_SCHEME = {"hodlr": 0.8, "lowrank": 0.9}
_ACCEPTED = 2.0  # times rtol: beyond it another sweep with a tighter tolerance is made
_PROMISED = 3.0  # times rtol: beyond it the user is warned
_PASSES = 3
_COMPARED = 32  # rows and columns whose entries the ranks compare
_AFFORDABLE = 1e12  # operations of all products together: seconds on any machine


def compress(
    op: Any,
    scheme: str = "hss",
    *,
    rtol: float = 1e-4,
    max_rank: int = 256,
    leaf_size: int = 256,
    ordering: str = "auto",
    budget: float = 0.0,
    seed: int = 0,
    dtype: Any = None,
    storage_dtype: Any = None,
    device: str | None = None,
    progress: bool = False,
    sampler: str = "auto",
    comm: Any = None,
) -> CompressedMatrix:
    """Compress a symmetric matrix K into hierarchical form.

    Promise: report.error, measured, is at most rtol (a factor 3 allowed) unless `max_rank` was
    hit, which is reported and warned of.

    Args:
        op: an Operator, or a matrix that `as_operator` takes: dense, sparse, a LinearOperator.
        scheme: "hss", or "fmm": the low-rank blocks leave out a near field, stored densely, of
            pairs of leaves that hold nearest neighbours; "hodlr": every pair of siblings has its
            own bases, smaller where the ranks of whole block rows grow; "lowrank": one global
            low-rank form, from products; "auto": of these the one that is predicted to need the
            least storage ("fmm" only with a budget); report.choice says why.
        rtol: relative Frobenius error wanted, norm(K - K~)_F <= rtol norm(K)_F.
        max_rank: cap of the rank of every off-diagonal block row.
        leaf_size: rows of a diagonal block: the number of leaves is the smallest power of two with
            N / leaves <= leaf_size (natural leaves may be 25 % larger).
        ordering: see `gpu_hodlr.ordering.build_tree`.
        budget: share of N^2 that the near field of scheme "fmm" may take, each block stored once;
            0 gives the HSS structure.
        seed: of every random choice; the same seed gives the same bits.
        dtype: of the matrix and its vectors; the operator's by default.
        storage_dtype: of the stored blocks, `dtype` by default. float32 in a float64 matrix halves
            storage and time of a product, whose sums are then float32; report.error includes it.
        device: "cpu" or "cuda"; the operator's by default, otherwise its data is moved there.
        progress: show a bar on stderr (needs tqdm).
        sampler: "products+entries" (one product with a random block; the default unless products
            are very expensive), "entries" (sampled columns; the default for point kernels),
            "products" (no entry is asked for; the default where there are none), "auto".
        comm: an mpi4py communicator: all its ranks call with the same arguments, and the matrix is
            spread over them (see `CompressedMatrix`). On "cuda" every rank takes the GPU of its
            number on the node.

    Returns:
        The compressed matrix; its `report` says what was done and reached.

    Raises:
        ArgumentError, DtypeError: an argument cannot be used, or differs between the ranks; K is
            not symmetric, or its products and its entries are not of the same matrix.
        NotPositiveDefiniteError: scheme "lowrank" met a negative eigenvalue beyond rtol.
        DeviceError: the device cannot be used.
        MemoryEstimateError: the compressed matrix or its samples would not fit.

    Warns:
        RankCapWarning: max_rank was hit and the error exceeds rtol; names the levels.
        AccuracyWarning: the error exceeds 3 rtol though no cap was hit.
    """
    ranks = communicator(comm, device or _device_of(op))
    ranks.same(
        scheme=scheme, rtol=rtol, max_rank=max_rank, leaf_size=leaf_size, ordering=ordering,
        budget=budget, seed=seed, dtype=dtype, storage_dtype=storage_dtype, device=device,
        sampler=sampler,
    )  # fmt: skip
    with ranks.agreed():
        operator = as_operator(op)
        _check_arguments(operator, scheme, rtol, max_rank, leaf_size, ordering, seed, sampler)
        _check_budget(budget, scheme)
        if device is not None:
            operator = operator.to(device)
        wanted = operator.dtype if dtype is None else check_dtype(dtype, "dtype")
        stored = wanted if storage_dtype is None else check_dtype(storage_dtype, "storage_dtype")
        if stored.itemsize > wanted.itemsize:
            raise ArgumentError(f"storage_dtype {stored} is wider than the matrix's dtype {wanted}")
        way = _way_to_sample(operator, sampler, max_rank, leaf_size)
        way = _way_of_scheme(scheme, way, sampler, operator)
        start, limit = _sample_sizes(operator.shape[0], max_rank)
        _check_memory(operator, leaf_size, start, ranks.size)
        if ranks.rank == 0:  # the others wait, and have the same matrix
            check_consistent(
                operator, rtol, seed, products=way != "entries", entries=way != "products"
            )
    _check_same_matrix(operator, ranks)
    timer = PhaseTimer(operator.device)
    lower = "leaf_size or max_rank, or use float32"
    with memory_errors("the compression", lower, operator.device), ranks.phase("compress"):
        with timer.phase("probe"):
            probe = ErrorProbe(operator, way != "entries", seed, ranks)
            norm, factor = probe.norm, probe.scale_to_one()
        if factor != 1.0:
            operator = ScaledOperator(operator, factor)
        shares = dict.fromkeys(SCHEMES, _AIM[way]) | _AIM_OF_SCHEME
        aims = {name: share * rtol * probe.norm for name, share in shares.items()}
        sketch = None
        if way != "entries":
            with timer.phase("sampling"):
                sketch = Sketch(operator, start, seed, ranks)
        with timer.phase("ordering"):
            if scheme == "lowrank":
                tree, used = rows_tree(operator.shape[0], ranks.size), "natural"
            else:
                tree, used = build_tree(
                    operator, ordering, int(leaf_size), seed, aims["hss"], sketch, ranks
                )
        owners = Ownership(ranks, tree.leaves)
        with timer.phase("sampling"):
            probe.to_rows(owners)
            if sketch is not None:
                sketch.to_rows(owners)
        with _progress_bar(progress and ranks.rank == 0, tree.depth) as tick:
            job = Job(
                operator, tree, owners, used, sketch, way != "products", (start, limit),
                max_rank, budget, seed, timer, tick,
            )  # fmt: skip
            choice = Choice((scheme,), None)
            if scheme == "auto":
                with timer.phase("choice"):
                    choice = _choose(job, aims)
            made = _least(
                [
                    _until_promise(name, job, aims[name], rtol, stored, probe)
                    for name in choice.schemes
                ],
                rtol,
            )
    report = CompressionReport(
        error=made.error, rtol=float(rtol), frobenius_norm=norm,
        rank_cap_hit=bool(made.capped), capped_levels=made.capped,
        scheme=made.scheme, ordering=used, sampler=way, num_samples=made.build.num_samples,
        passes=made.passes, cpu_seconds=timer.cpu_seconds, seed=int(seed), seconds=timer.seconds,
        neighbour_recall=made.build.neighbour_recall, choice=choice.reason,
    )  # fmt: skip
    if ranks.rank == 0:
        _warn(report, max_rank)
    return matrix_of(made.structure.scaled(1.0 / factor), report, wanted)


def _choose(job: Job, aims: dict[str, float]) -> Choice:
    """Of the schemes that this operator and this budget leave."""
    if not job.entries and not job.operator.definite:
        return Choice(("hss",), "hss: the one form of an indefinite matrix without entries")
    if not job.entries:
        reason = "without entries there is nothing to sample: the smaller of hss and lowrank, built"
        return Choice(("hss", "lowrank"), reason)
    considered = ["hss", "hodlr"]
    if job.budget > 0:
        considered.append("fmm")
    if job.operator.has_products and job.operator.definite:
        considered.append("lowrank")
    return choose(job, {scheme: aims[scheme] for scheme in considered})


def _build(scheme: str, job: Job) -> Build:
    """A scheme at work on a job."""
    if scheme == "lowrank":
        return NystromBuild(job)
    if scheme == "hodlr":
        return HODLRBuild(job)
    if not job.entries:
        return ProductsOnlyBuild(job)
    return FMMBuild(job) if scheme == "fmm" else HSSBuild(job)


@dataclass(frozen=True)
class _Made:
    """A structure, how it was made and what error it was measured to have."""

    scheme: str
    build: Build
    structure: Structure
    capped: tuple[int, ...]
    error: float
    passes: int


def _until_promise(
    scheme: str, job: Job, aim: float, rtol: float, stored: np.dtype[Any], probe: ErrorProbe
) -> _Made:
    """Build, measure, and build again with a tighter tolerance while the promise is missed."""
    build, passes = _build(scheme, job), 0
    while True:
        structure, capped = build.run(aim, passes == 0)
        passes += 1
        structure = structure.astype(stored)
        with job.timer.phase("measuring"):
            error = probe.error(structure)
        if error <= _ACCEPTED * rtol or capped or passes == _PASSES:
            return _Made(scheme, build, structure, capped, error, passes)
        aim *= rtol / error


def _least(made: list[_Made], rtol: float) -> _Made:
    """The one that stores least of those that keep the promise, if any does."""
    return min(
        made,
        key=lambda m: (m.error > _PROMISED * rtol, m.structure.num_stored),
    )


def _device_of(op: Any) -> str:
    if isinstance(op, Operator):
        return op.device
    return device_of(op) if is_array(op) else "cpu"


def _check_arguments(
    operator: Operator,
    scheme: str,
    rtol: float,
    max_rank: int,
    leaf_size: int,
    ordering: str,
    seed: int,
    sampler: str,
) -> None:
    if scheme not in SCHEMES:
        raise ArgumentError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    check_number(rtol, "rtol")
    check_count(max_rank, "max_rank")
    check_count(leaf_size, "leaf_size")
    check_count(seed, "seed", least=0)
    check_ordering(operator, ordering)
    if scheme == "lowrank" and not operator.definite:
        raise ArgumentError(
            f"scheme 'lowrank' needs a positive semi-definite matrix, {type(operator).__name__} "
            "declares definite = False"
        )
    if sampler not in SAMPLERS:
        raise ArgumentError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    needs_products, needs_entries = "products" in sampler, "entries" in sampler
    for needed, has, what in (
        (needs_products, operator.has_products, "products"),
        (needs_entries, operator.has_entries, "entries"),
    ):
        if needed and not has:
            raise ArgumentError(f"sampler {sampler!r} needs {what}; this operator has none")


def _check_budget(budget: float, scheme: str) -> None:
    if check_budget(budget) > 0 and scheme not in ("fmm", "auto"):
        raise ArgumentError(f"budget is for scheme 'fmm', got {budget} with scheme {scheme!r}")


def _way_to_sample(operator: Operator, sampler: str, max_rank: int, leaf_size: int) -> str:
    """Products miss nothing: taken unless they cost very much, or 100 times the entries."""
    if sampler != "auto":
        return sampler
    if not operator.has_entries:
        return "products"
    n = operator.shape[0]
    columns = samples_for(min(max_rank, n))
    by_entries = n * (leaf_size + 3.0 * columns) * operator.entry_cost
    affordable = columns * operator.product_cost <= max(_AFFORDABLE, 100 * by_entries)
    if operator.has_products and affordable and operator.points is None:
        return "products+entries"
    return "entries"


def _way_of_scheme(scheme: str, way: str, sampler: str, operator: Operator) -> str:
    if scheme == "fmm" and way == "products":
        raise ArgumentError("scheme 'fmm' needs entries, with sampler 'products' there are none")
    if scheme == "lowrank":
        if sampler == "entries" or not operator.has_products:
            raise ArgumentError("scheme 'lowrank' needs products, there are none to use")
        return "products"
    return way


def _sample_sizes(n: int, max_rank: int) -> tuple[int, int]:
    """Columns at first and at most."""
    limit = samples_for(min(max_rank, max(1, n // 2)))
    return min(_START, limit), limit


def _check_same_matrix(operator: Operator, ranks: Communicator) -> None:
    """Refuse another matrix on another rank, as far as a few entries tell.

    Raises:
        ArgumentError: on every rank.
    """
    if ranks.size == 1:
        return
    kind = f"{type(operator).__name__} of {operator.shape[0]} rows, {operator.dtype}"
    ranks.same(op=kind)
    if operator.has_entries:
        seen = np.linspace(0, operator.shape[0] - 1, _COMPARED).astype(np.int64)[None]
        every = ranks.share(to_host(operator.reader.blocks(seen, seen)))
        for rank, other in enumerate(every):
            if not np.allclose(other, every[0], rtol=1e-3, atol=1e-3 * abs(every[0]).max()):
                raise ArgumentError(f"op on rank {rank} is another matrix than on rank 0")


def _check_memory(operator: Operator, leaf_size: int, columns: int, ranks: int) -> None:
    n = operator.shape[0]
    leaf = min(n, leaf_size)
    check_memory(
        int(n * (3 * leaf + 5 * columns)) * operator.dtype.itemsize // ranks,
        f"compressing a matrix of order {n}",
        "leaf_size, or use dtype float32",
        operator.device,
    )


@contextmanager
def _progress_bar(show: bool, levels: int) -> Iterator[Callable[[], Any]]:
    """Give a function to call once a level; further sweeps lengthen the bar."""
    if not show:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=levels, desc="compress", unit="level", leave=False) as bar:

        def tick() -> None:
            if bar.n == bar.total:
                bar.total += levels
            bar.update()

        yield tick


def _warn(report: CompressionReport, max_rank: int) -> None:
    if report.rank_cap_hit and report.error > report.rtol:
        levels = ", ".join(map(str, report.capped_levels))
        warnings.warn(
            f"max_rank {max_rank} was hit on level {levels} (root = 0): measured error "
            f"{report.error:.2g}, rtol {report.rtol:.2g}; raise max_rank or rtol",
            RankCapWarning,
            stacklevel=3,
        )
    elif report.error > _PROMISED * report.rtol:
        warnings.warn(
            f"measured error {report.error:.2g} exceeds rtol {report.rtol:.2g} after "
            f"{report.passes} passes",
            AccuracyWarning,
            stacklevel=3,
        )
