"""Measure one matrix: compress it, multiply by it, factorize it and solve with it."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.cli import Progress, UnfinishedError, warnings_as_notes
from gpu_hodlr.cli.summary import scientific
from gpu_hodlr.devices import (
    Array,
    HostArray,
    HostIndex,
    gpu_name,
    namespace,
    synchronize,
    to_host,
)
from gpu_hodlr.errors import InexactError, MemoryEstimateError, NotPositiveDefiniteError
from gpu_hodlr.factor.solver import Solver
from gpu_hodlr.linear_map import LinearMap
from gpu_hodlr.structures import LowRank, Multipole, RotatedSparse, Structure

CG_RTOL = 1e-8
_CELLS = 60  # of a picture of entries, a side
_ROWS = 1 << 12  # of entries at a time
STEPS = ("compress", "product", "factor", "solve", "cg")  # steps of `Progress`


@dataclass(frozen=True)
class Preset:
    """What an accuracy means for `compress`."""

    rtol: float
    max_rank: int
    leaf_size: int = 256
    budget: float = 0.0


@dataclass(frozen=True)
class Settings:
    """How one matrix is compressed, multiplied by and factorized."""

    name: str
    accuracy: str
    preset: Preset
    seed: int
    maxiter: int
    damping: float | None = None
    scheme: str = "hss"
    ordering: str = "auto"
    dtype: str | None = None
    device: str | None = None


@dataclass
class Result:
    """What was measured of one matrix; the inverse's fields stay None until it is factorized.

    Attributes:
        gpu: name of the GPU, None on the CPU.
        rank_bound: n * outputs, an upper bound of the exact rank, where known.
        error: relative Frobenius error of the compressed matrix, measured.
        ranks: largest rank a level, leaves first.
        inverse_error: norm((K~ + d I) x - b) / norm(b), K~ compressed, x = F.solve(b).
        true_residual: norm((K + d I) x - b) / norm(b), K exact.
        cg_with, cg_without: CG iterations to 1e-8 with the factor and without; None: not reached.
        budget: share of N^2 that a near field might take.
        neighbour_recall: of the search for it; None where there was none.
        choice: why scheme "auto" chose the scheme; None where it was given.
        failure: why it was not solved, though that was asked for; None where it was.
        leaf_sizes, block_ranks, far_pairs, near_pairs: the tree, the rank of every node of its
            levels, the pairs of nodes with a low-rank block, and of leaves with a dense one; for
            the picture.
        density: of a form sparse in an eigenbasis, see `entry_density`; None of another.
    """

    name: str
    accuracy: str
    scheme: str
    size: int
    rank_bound: int | None
    dtype: str
    device: str
    gpu: str | None
    rtol: float
    max_rank: int
    leaf_size: int
    ordering: str
    sampler: str
    compress_seconds: float
    compress_cpu_seconds: float
    phase_seconds: dict[str, float]
    multiply_seconds: float
    storage_fraction: float
    nbytes: int
    frobenius_norm: float
    error: float
    rank_cap_hit: bool
    ranks: list[int]
    damping: float | None = None
    factor_seconds: float | None = None
    solve_seconds: float | None = None
    logdet: float | None = None
    inverse_error: float | None = None
    true_residual: float | None = None
    cg_with: int | None = None
    cg_without: int | None = None
    notes: list[str] = field(default_factory=list)
    budget: float = 0.0
    neighbour_recall: float | None = None
    choice: str | None = None
    failure: str | None = None
    leaf_sizes: list[int] = field(default_factory=list, repr=False)
    block_ranks: list[tuple[int, ...]] = field(default_factory=list, repr=False)
    far_pairs: list[Any] = field(default_factory=list, repr=False)
    near_pairs: HostIndex | None = field(default=None, repr=False)
    density: tuple[HostIndex, HostArray] | None = field(default=None, repr=False)


def measure_product(op: gh.Operator, settings: Settings, progress: Progress) -> tuple[Any, Result]:
    """Compress, and time a product with one column (median of five).

    On a GPU the compression is timed at its second run: the first compiles kernels.

    Returns:
        The compressed matrix, and a result without its inverse's part.
    """
    preset, label = settings.preset, f"{settings.name} {settings.accuracy}"
    notes: list[str] = []
    with progress.step(f"{label} compress"), warnings_as_notes(notes):
        K, seconds = timed(
            lambda: gh.compress(
                op,
                scheme=settings.scheme,
                rtol=preset.rtol,
                max_rank=preset.max_rank,
                leaf_size=preset.leaf_size,
                ordering=settings.ordering,
                budget=preset.budget,
                seed=settings.seed,
                dtype=settings.dtype,
                device=settings.device,
                progress=progress.shown,
            ),
            settings.device or op.device,
        )
    with progress.step(f"{label} product"):
        w = right_hand_side(K, settings.seed)
        multiply = median_seconds(lambda: K @ w, 5, K.device)
    found = K.report
    far_pairs, near_pairs = block_pairs(K.structure)
    return K, Result(
        name=settings.name,
        accuracy=settings.accuracy,
        scheme=found.scheme.upper(),
        size=K.shape[0],
        rank_bound=getattr(op, "rank_bound", None),
        dtype=str(K.dtype),
        device=K.device,
        gpu=gpu_name(K.device),
        rtol=preset.rtol,
        max_rank=preset.max_rank,
        leaf_size=preset.leaf_size,
        ordering=found.ordering,
        sampler=found.sampler,
        compress_seconds=seconds,
        compress_cpu_seconds=float(found.cpu_seconds),
        phase_seconds={phase: float(spent) for phase, spent in found.seconds.items()},
        multiply_seconds=multiply,
        storage_fraction=float(K.storage_fraction),
        nbytes=int(K.nbytes),
        frobenius_norm=float(found.frobenius_norm),
        error=float(found.error),
        rank_cap_hit=bool(found.rank_cap_hit),
        ranks=[int(max(level)) for level in K.ranks],
        budget=preset.budget,
        neighbour_recall=found.neighbour_recall,
        choice=found.choice,
        notes=notes,
        leaf_sizes=[int(size) for size in K.tree.leaf_sizes],
        block_ranks=[tuple(int(rank) for rank in level) for level in K.ranks],
        far_pairs=far_pairs,
        near_pairs=near_pairs,
        density=entry_density(K.structure),
    )


def block_pairs(structure: Structure) -> tuple[list[Any], Any]:
    """The pairs of nodes with a low-rank block, leaves first, and those of leaves with a dense one.

    Pairs (p, 2) of a symmetric matrix, one of (a, b) and (b, a).
    """
    if isinstance(structure, LowRank):
        return [np.zeros((1, 2), int)], np.zeros((0, 2), int)
    if isinstance(structure, RotatedSparse):
        return [np.zeros((0, 2), int)], np.zeros((0, 2), int)
    leaves = np.arange(len(structure.leaves))
    near = np.stack([leaves, leaves], axis=1)
    if isinstance(structure, Multipole):
        return list(structure.far_pairs), np.concatenate([near, structure.near_pairs])
    return [np.arange(len(level)).reshape(-1, 2) for level in structure.ranks], near


def entry_density(structure: Structure) -> tuple[HostIndex, HostArray] | None:
    """Where the entries stand of a form that is sparse in an eigenbasis, in the order of energy.

    Returns:
        edges: (cells + 1,) of groups of coordinates, the largest of the diagonal first, each about
            as large as all before it are by a fixed factor.
        share: (cells, cells) stored entries over all, the diagonal's included.
        None of another form.
    """
    if not isinstance(structure, RotatedSparse):
        return None
    energy = to_host(structure.D)
    size = len(energy)
    edges = np.unique(np.append(0, np.geomspace(1, size, _CELLS).round().astype(int)))
    cells = len(edges) - 1
    group = np.empty(size, np.int64)
    group[np.argsort(-energy, kind="stable")] = np.repeat(np.arange(cells), np.diff(edges))
    lengths, columns = (to_host(a) for a in structure.rows.gathered()[:2])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    counts = np.zeros(cells * cells)
    for begin in range(0, size, _ROWS):  # a list of all entries' rows may not fit
        rows = slice(begin, begin + _ROWS)
        row = np.repeat(group[rows], lengths[rows])
        here = slice(starts[begin], starts[begin + len(lengths[rows])])
        counts += np.bincount(row * cells + group[columns[here]], minlength=cells * cells)
    below = counts.reshape(cells, cells)
    sizes = np.diff(edges)
    return edges, (below + below.T + np.diag(sizes)) / np.outer(sizes, sizes)


def measure_solves(
    op: gh.Operator, K: gh.CompressedMatrix, result: Result, settings: Settings, progress: Progress
) -> None:
    """`measure_inverse`; where there is no inverse, the result says why."""
    try:
        measure_inverse(op, K, result, settings, progress)
    except (NotPositiveDefiniteError, MemoryEstimateError) as error:
        result.failure = " ".join(str(error).split())
        result.notes.append(f"not solved: {result.failure}")


def require_done(results: Sequence[Result], *, rtol: bool = False) -> None:
    """Fail, at the end of a command, where something that was asked for was not done.

    Args:
        results: all of the command.
        rtol: whether the error reached is a part of that.

    Raises:
        UnfinishedError: some are not solved, or miss the tolerance by more than a factor of 3.
    """
    missed = [
        f"rtol {scientific(r.rtol)} was not reached: the error is {scientific(r.error)}"
        for r in results
        if rtol and r.error > 3 * r.rtol
    ]
    failed = [f"not solved: {r.failure}" for r in results if r.failure is not None]
    if len(failed) > 1:
        failed = [f"{len(failed)} of {len(results)} were not solved, as the notes say"]
    if missed or failed:
        raise UnfinishedError("; ".join(missed + failed))


def measure_inverse(
    op: gh.Operator, K: gh.CompressedMatrix, result: Result, settings: Settings, progress: Progress
) -> None:
    """Factorize K~ + damping I, solve with it, precondition CG with it; fill in the result.

    The exact operator is on the compressed matrix's device. The default damping is ||K~ - K||_F,
    measured: K is positive semi-definite, so by Weyl
    lambda_min(K~ + damping I) >= damping - ||K~ - K||_2 >= 0. Where it does not do all the same,
    the one that would is taken, which a note says; one that was asked for is never replaced.

    Raises:
        NotPositiveDefiniteError, MemoryEstimateError: there is no factor.
    """
    label = f"{settings.name} {settings.accuracy}"
    damping, asked = settings.damping, settings.damping is not None
    if damping is None:
        error = max(result.error, float(np.finfo(K.dtype).eps))
        damping = error * result.frobenius_norm or 1.0  # the zero matrix has no scale of its own
    with warnings_as_notes(result.notes):
        b = right_hand_side(K, settings.seed + 1)
        with progress.step(f"{label} factor"):
            try:
                F, seconds, x = _factor_and_solve(K, damping, b)
            except NotPositiveDefiniteError as error:
                if asked or error.damping is None:
                    raise
                result.notes.append(
                    f"not positive definite with damping {damping:.3g}: {error.damping:.3g} used"
                )
                damping = float(error.damping)
                F, seconds, x = _factor_and_solve(K, damping, b)
            result.factor_seconds = seconds
            result.damping = damping
            with contextlib.suppress(InexactError):  # FMM is solved by CG
                result.logdet = float(F.logdet())
        with progress.step(f"{label} solve"):
            result.solve_seconds = median_seconds(lambda: F.solve(b), 3, K.device)
            result.inverse_error = _relative(K @ x + damping * x - b, b)
            result.true_residual = _relative(op @ x + damping * x - b, b)
        with progress.step(f"{label} cg"):
            if settings.maxiter > 0:
                M = preconditioner(F)
                if M is None:
                    result.notes.append("no positive definite preconditioner was found")
                else:
                    result.cg_with = cg_iterations(op, b, damping, M, settings.maxiter)
                result.cg_without = cg_iterations(op, b, damping, None, settings.maxiter)


def _factor_and_solve(K: gh.CompressedMatrix, damping: float, b: Array) -> tuple[Any, float, Array]:
    """The factor, its seconds, and a first solve: an FMM form is known to be indefinite by then.

    Raises:
        NotPositiveDefiniteError: K~ + damping I is not positive definite.
    """
    F, seconds = timed(lambda: K.factorize(damping), K.device)
    return F, seconds, F.solve(b)


def preconditioner(F: Solver) -> Solver | None:
    """What a factor offers to CG: itself; of an FMM form its HSS factor, None where none is."""
    return getattr(F, "preconditioner", F)


def right_hand_side(K: LinearMap, seed: int) -> Array:
    """A standard normal vector of the matrix's order and dtype, drawn on its device."""
    return batched.normal_source((seed,), K.device)((K.shape[0], 1), K.dtype)[:, 0]


def timed(work: Callable[[], Any], device: str, *, cpu: bool = False) -> tuple[Any, float]:
    """What a call gives, and its wall time; on a GPU that of a second call.

    With `cpu`, the CPU seconds of all threads where the CPU does the work.
    """
    if device == "cuda":
        work()
        cpu = False
    return _once(work, device, time.process_time if cpu else time.perf_counter)


def _once(
    work: Callable[[], Any], device: str, clock: Callable[[], float] = time.perf_counter
) -> tuple[Any, float]:
    """What a call gives, and the time of it and of the device's work for it."""
    synchronize(device)
    start = clock()
    result = work()
    synchronize(device)
    return result, clock() - start


def median_seconds(work: Callable[[], object], repeats: int, device: str = "cpu") -> float:
    """Median wall time of a call and of the device's work for it, after one not counted."""
    work()
    return statistics.median(_once(work, device)[1] for _ in range(repeats))


def _relative(residual: Array, b: Array) -> float:
    norm = namespace(b).linalg.norm
    return float(norm(residual)) / float(norm(b))


def cg_iterations(
    op: gh.Operator, b: Array, damping: float, M: Solver | None, maxiter: int
) -> int | None:
    """CG iterations to 1e-8 on the exact operator; None when `maxiter` are not enough."""
    _, info = gh.cg(op, b, damping=damping, M=M, rtol=CG_RTOL, maxiter=maxiter)
    return int(info.iterations) if info.converged else None
