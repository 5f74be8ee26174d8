"""The one call: from an operator to a compressed matrix."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.compressed import CompressedMatrix, CompressionReport, StructuredMatrix
from gpu_hodlr.compression import memory
from gpu_hodlr.compression.building import prepared
from gpu_hodlr.compression.options import CAP, Options
from gpu_hodlr.compression.promise import warn
from gpu_hodlr.compression.tolerance import DEFAULT_RTOL
from gpu_hodlr.devices import device_kind, is_array, memory_errors, to_host
from gpu_hodlr.distributed import Communicator, communicator
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.operators import (
    Operator,
    as_operator,
    check_consistent,
    device_of_matrix,
)
from gpu_hodlr.profiling import timing
from gpu_hodlr.progress import bar as progress_bar
from gpu_hodlr.progress import check_bar
from gpu_hodlr.schemes import Sampling

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDevice, AnyDtype

_COMPARED = 32  # rows and columns whose entries the ranks compare


def compress(
    op: object,
    scheme: str = "hss",
    *,
    rtol: float | None = None,
    atol: float | None = None,
    damping: float | None = None,
    max_rank: int | None = None,
    leaf_size: int = 256,
    ordering: str = "auto",
    budget: float = 0.0,
    seed: int = 0,
    dtype: AnyDtype | None = None,
    storage_dtype: AnyDtype | None = None,
    device: AnyDevice | None = None,
    progress: bool = False,
    sampler: str = "auto",
    tail: str = "none",
    comm: Any = None,
) -> CompressedMatrix:
    """Compress a symmetric matrix K into hierarchical form.

    Collective: all ranks call.

    Promise: report.error, measured, is at most rtol (a factor 3 allowed) unless `max_rank` was
    hit, which is reported and warned of.

    Args:
        op: an Operator, or a matrix that `as_operator` takes: dense, sparse, a LinearOperator.
        scheme: which form, see docs/schemes.md. "hss": nested bases of whole block rows; "fmm":
            the same but for a near field, stored densely, of pairs of leaves that hold nearest
            neighbours; "hodlr": every pair of siblings has its own bases, smaller where the ranks
            of whole block rows grow; "lowrank": one global low-rank form, of eigenvalues of both
            signs where K declares `definite = False`, from products; "kfe", of networks: the large
            entries in the Kronecker-factored eigenbasis; "auto": of these the one that is
            predicted to need the least storage ("fmm" only with a budget); report.choice says why.
        rtol: relative Frobenius error wanted, norm(K - K~)_F <= rtol norm(K)_F; 1e-4 where no
            other tolerance is given.
        atol: absolute one, norm(K - K~)_F <= atol; with an rtol the larger of the two counts, as
            in SciPy.
        damping: with which, or a nugget within K, the matrix is to be factorized: the tolerance is
            found so that the spectral error is a tenth of it, `report.spectral_error`, measured
            with products (but for large point kernels). What else is given must hold as well.
        max_rank: cap of the rank of every off-diagonal block row; 256 by default, with scheme
            "auto" up to N / 8, as memory allows, for forms whose sampled ranks are within reach.
        leaf_size: rows of a diagonal block: the number of leaves is the smallest power of two with
            N / leaves <= leaf_size (natural leaves may be 25 % larger).
        ordering: "natural", "gram", "angle", "geometric", "random" or "auto", see
            `gpu_hodlr.ordering.build_tree`.
        budget: share of N^2 that the near field of scheme "fmm" may take, each block stored once;
            0 gives the HSS structure.
        seed: of every random choice; the same seed gives the same bits.
        dtype: of the matrix and its vectors, NumPy's or torch's; the operator's by default.
        storage_dtype: of the stored blocks, `dtype` by default. float32 in a float64 matrix halves
            storage and time of a product, whose sums are then float32; from rtol 1e-4 on samples
            and bases are float32 as well, and the error is measured in float64. "bfloat16" keeps
            blocks of the far field (bases and couplings) in two bytes a number, all else in
            float32, and "tfloat32" multiplies them on a GPU's tensor cores, in four; they err by
            1e-3 to 1e-2 of the far field and by an eighth of that. report.error includes it, and
            what rtol has no room for is warned of.
        device: "cpu" or "cuda", or a torch.device; the operator's by default, otherwise its data
            is moved there.
        progress: show a bar on stderr (needs tqdm).
        sampler: "products+entries" (one product with a random block; the default unless products
            are very expensive), "entries" (sampled columns; the default for point kernels),
            "products" (no entry is asked for; the default where there are none), "auto".
        tail: "diagonal": scheme "lowrank" keeps the diagonal of what it leaves out as well, which
            mends log-determinants and the diagonal of an inverse, and may need a smaller rank; K
            must know its diagonal, by entries, `_diagonal` or up to 2,048 products. "none": not.
        comm: an mpi4py communicator: all its ranks call with the same arguments, and the matrix is
            spread over them (see `CompressedMatrix`). On "cuda" every rank takes the GPU of its
            number on the node.

    Returns:
        The compressed matrix; its `report` says what was done and reached.

    Raises:
        ArgumentError, DtypeError: an argument cannot be used, or differs between the ranks; K is
            not symmetric, or its products and its entries are not of the same matrix.
        NotPositiveDefiniteError: scheme "lowrank" met a negative eigenvalue beyond rtol of a K
            that declares none.
        DeviceError: the device cannot be used.
        MemoryEstimateError: the compressed matrix or its samples would not fit.

    Warns:
        RankCapWarning: max_rank was hit and the error exceeds rtol, or the spectral error a tenth
            of the damping; names the levels.
        AccuracyWarning: the error exceeds 3 rtol, or the spectral error a tenth of the damping,
            though no cap was hit.

    Example:
        >>> points = np.random.default_rng(0).random((500, 2))
        >>> op = gh.KernelOperator(points, "matern32", 0.3, nugget=0.1)
        >>> K = gh.compress(op, rtol=1e-4, leaf_size=64)
        >>> K.report.error <= 3e-4, len(K.ranks)
        (True, 3)
        >>> v = np.ones(500)
        >>> bool(np.linalg.norm(K @ v - op @ v) <= 1e-3 * np.linalg.norm(op @ v))
        True
    """
    ranks = communicator(comm, device_of_matrix(op) if device is None else device_kind(device))
    with ranks.agreed():
        cap = CAP if max_rank is None else max_rank
        options = Options(
            scheme, rtol, atol, damping, cap, leaf_size, ordering, budget, seed, dtype,
            storage_dtype, device, sampler, tail,
            may_raise=max_rank is None and scheme == "auto",
        )  # fmt: skip
        options.same(ranks)
        check_bar(progress)
        matrix, cap = _compressed(op, options, ranks, progress)
        if ranks.rank == 0:
            warn(matrix.report, cap, matrix.structure.kept_in, options.error_asked)
    return matrix


def _compressed(
    op: Any, options: Options, ranks: Communicator, progress: bool
) -> tuple[StructuredMatrix, int]:
    """See `compress`; and the cap. What fails on some ranks, is for the caller to tell others."""
    operator, sampling = _read(op, options, ranks)
    lower = "leaf_size or max_rank, or use float32"
    with (
        memory_errors("the compression", lower, operator.device),
        ranks.phase("compress"),
        timing(operator.device) as timer,
    ):
        ready = prepared(operator, options, sampling, ranks)
        with progress_bar(progress and ranks.rank == 0, ready.job.tree.depth):
            done = ready.compressed()
    made, rtol = done.made, done.rtol
    if not made.capped and not made.keeps(rtol) and ranks.rank == 0:
        check_consistent(  # an operator that is not symmetric misses rtol with every form
            operator, rtol, options.seed, products=options.measured_by_products(operator, sampling),
            entries=sampling.entries, closely=True,
        )  # fmt: skip
    report = CompressionReport(
        error=made.measured.error, rtol=float(rtol), frobenius_norm=ready.norm,
        rank_cap_hit=bool(made.capped), capped_levels=made.capped,
        scheme=made.scheme.name, ordering=ready.job.ordering, sampler=made.sampling.value,
        num_samples=made.build.num_samples,
        passes=made.passes, cpu_seconds=timer.cpu_seconds, seed=int(options.seed),
        seconds=timer.seconds, neighbour_recall=made.build.neighbour_recall, choice=done.why,
        spectral_error=done.spectral_error, spectral_sampled=not ready.spectral_by_products,
        nugget=_declared_nugget(operator), atol=options.atol, damping=options.damping,
        error_bound=made.measured.bound, measured_by=ready.measured_by,
    )  # fmt: skip
    wanted = options.dtypes(operator)[0]
    return made.scheme.matrix(made.structure, report, wanted, 1.0 / ready.factor), made.max_rank


def _read(op: Any, options: Options, ranks: Communicator) -> tuple[Operator, Sampling]:
    """The matrix, where it is wanted, and what is read of it; all that can be refused before.

    Raises:
        ArgumentError, DtypeError, ShapeError, DeviceError: see `compress`, as the next.
        MemoryEstimateError: by what the options and the order of the matrix tell.
    """
    operator = as_operator(op)
    options.check(operator)
    if options.device is not None:
        operator = operator.to(options.device)
    options.dtypes(operator)
    sampling = options.sampling(operator)
    first = options.sample_sizes(operator.shape[0])[0]
    memory.check(operator, options, sampling, first, ranks.size)
    multiplied = options.measured_by_products(operator, sampling)
    _check_same_kind(operator, ranks)
    if ranks.rank == 0:  # the others wait, and have the same matrix
        least = DEFAULT_RTOL if options.rtol is None else options.rtol
        check_consistent(
            operator, least, options.seed, products=multiplied, entries=sampling.entries
        )
    _check_same_entries(operator, ranks)
    return operator, sampling


def _declared_nugget(operator: Operator) -> float | None:
    """See `CompressionReport`."""
    nugget = getattr(operator, "nugget", 0.0)
    return (
        float(np.min(to_host(nugget) if is_array(nugget) else nugget))
        if operator.definite
        else None
    )


def _check_same_kind(operator: Operator, ranks: Communicator) -> None:
    """Refuse an operator of another kind on another rank, before it is read.

    Raises:
        ArgumentError: on every rank.
    """
    ranks.same(op=operator.said)


def _check_same_entries(operator: Operator, ranks: Communicator) -> None:
    """Refuse another matrix on another rank, as far as a few entries tell.

    Raises:
        ArgumentError: on every rank.
    """
    if ranks.size == 1 or not operator.has_entries:
        return
    seen = np.linspace(0, operator.shape[0] - 1, _COMPARED).astype(np.int64)[None]
    every = ranks.share(to_host(operator.reader.blocks(seen, seen)))
    for rank, other in enumerate(every):
        if not np.allclose(other, every[0], rtol=1e-3, atol=1e-3 * abs(every[0]).max()):
            raise ArgumentError(f"op on rank {rank} is another matrix than on rank 0")
