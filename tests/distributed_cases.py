"""What every rank does in the tests of many ranks; see mpi_runs."""

from __future__ import annotations

import pickle
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix_cases import entries_only, products_only, toeplitz

import gpu_hodlr as gh
from gpu_hodlr import errors
from gpu_hodlr.distributed import Communicator, communicator
from gpu_hodlr.matrices import matrix
from gpu_hodlr.operators import SharedOperator
from gpu_hodlr.ordering import build_tree

# --- communicators -----------------------------------------------------------------------------


def communication(comm: Any) -> dict[str, Any]:
    """See `operations`, of ranks of mpi4py."""
    ranks = communicator(comm)
    assert communicator(comm) is ranks or ranks.size == 1
    assert communicator(ranks) is ranks
    assert (ranks.rank, ranks.size) == (comm.Get_rank(), comm.Get_size())
    return operations(ranks)


def operations(ranks: Communicator) -> dict[str, Any]:
    """Every operation against what NumPy says; what was counted."""
    rank, size = ranks.rank, ranks.size
    for dtype in (np.float64, np.float32, np.int64):
        for shape in ((), (3,), (2, 5), (0,)):
            counts = [2 * p % 3 for p in range(size)]  # some rank has none
            every = np.arange(sum(counts) * int(np.prod(shape)), dtype=dtype)
            every = every.reshape(sum(counts), *shape)
            first = sum(counts[:rank])
            got = ranks.allgather(every[first : first + counts[rank]], counts)
            assert got.dtype == dtype
            assert got.flags.c_contiguous
            np.testing.assert_array_equal(got, every)
            parts = [np.full((p + 1, *shape), 10 * rank + p, dtype) for p in range(size)]
            wanted = [np.full((rank + 1, *shape), 10 * p + rank, dtype) for p in range(size)]
            counts = [p + 1 for p in range(size)]
            got = ranks.exchange(np.concatenate(parts), counts, [rank + 1] * size)
            np.testing.assert_array_equal(got, np.concatenate(wanted))
    x = np.random.default_rng(rank).standard_normal((40, 7))
    total = ranks.allreduce(x)
    want = sum(np.random.default_rng(p).standard_normal((40, 7)) for p in range(size))
    np.testing.assert_allclose(total, want, rtol=1e-13, atol=1e-13)
    assert ranks.bcast({"from": rank}, size - 1) == {"from": size - 1}
    assert ranks.share(rank) == list(range(size))
    ranks.alike(0)
    before = ranks.sent.copy(), ranks.messages.copy()
    with ranks.phase("outer"):
        with ranks.phase("inner"):
            ranks.allgather(np.zeros((1, 3)), [1] * size)
        ranks.exchange(
            np.zeros((size * (size - 1), 2)), list(range(0, 2 * size, 2)), [2 * rank] * size
        )
    with ranks.phase("sum"):
        ranks.allreduce(np.zeros(5, np.float32))
    with ranks.phase("small"):
        ranks.bcast(rank)
        ranks.share(rank)
        assert ranks.alike(3)
        assert ranks.alike(rank) == (size == 1)
    sent, messages = (
        {name: now[name] - was[name] for name in ("inner", "outer", "sum", "small")}
        for now, was in zip((ranks.sent, ranks.messages), before, strict=True)
    )
    return {"bits": total.tobytes(), "sent": sent, "messages": messages}


def check_counts(every: list[dict[str, Any]]) -> None:
    """Of what `operations` gave on every rank: bytes to others, and one message an operation."""
    size = len(every)
    assert len({seen["bits"] for seen in every}) == 1
    for rank, seen in enumerate(every):
        others = size - 1
        outer = 32 * sum(p for p in range(size) if p != rank)  # rank p gets 2 p rows of 16 bytes
        total = 20 * (others if rank == 0 else 1)  # gathered by rank 0, which tells the others
        assert seen["sent"] == {"inner": 24 * others, "outer": outer, "sum": total, "small": 0}
        messages = {"inner": 1, "outer": 1, "sum": 1, "small": 2}
        assert seen["messages"] == {name: count * (size > 1) for name, count in messages.items()}


ERRORS: list[Callable[[], Exception]] = [
    lambda: ValueError("no"),
    lambda: errors.NotPositiveDefiniteError("no", 0.5, None),
    lambda: errors.FileFormatError("no"),
    lambda: errors.MemoryEstimateError("no"),
]


def fail_on(ranks: Any, rank: int, error: Exception) -> None:
    with ranks.agreed():
        if ranks.rank == rank:
            raise error


def agreement(comm: Any) -> None:
    """An exception of one rank is raised on all; values that differ are refused on all."""
    ranks = communicator(comm)
    with ranks.agreed():
        pass
    for make in ERRORS:
        with pytest.raises(type(make()), match="no") as caught:
            fail_on(ranks, ranks.size - 1, make())
        if ranks.rank < ranks.size - 1:
            assert f"on rank {ranks.size - 1}" in caught.value.__notes__[0]
    own = KeyError("a") if ranks.rank == 0 else IndexError("b")
    with pytest.raises(type(own)):
        fail_on(ranks, ranks.rank, own)
    ranks.same(a=1, b="x", c=np.arange(3))
    for name, values in {"n": (1, 2), "x": (np.arange(3), np.arange(3) + 1)}.items():
        if ranks.size > 1:
            with pytest.raises(errors.ArgumentError, match=f"{name} differs between ranks"):
                ranks.same(**{name: values[ranks.rank > 0]})


class UnsendableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def unsendable(comm: Any) -> None:
    """An exception that pickle cannot bring back still says what it was."""
    ranks = communicator(comm)
    kind = UnsendableError if ranks.rank == 1 else errors.DistributedError
    with pytest.raises(kind, match="1 and 2"):
        fail_on(ranks, 1, UnsendableError(1, 2))


# --- matrices ----------------------------------------------------------------------------------


def plane(n: int = 600) -> gh.KernelOperator:
    points = np.random.default_rng(0).random((n, 2))
    return gh.KernelOperator(points, "laplace", 0.2, 0.1)


def both_signs(n: int = 400) -> gh.DenseOperator:
    """Twenty negative eigenvalues, small ones."""
    Q = np.linalg.qr(np.random.default_rng(5).standard_normal((n, n)))[0]
    exact = (Q * np.r_[0.9 ** np.arange(n - 20), -1e-3 * 0.8 ** np.arange(20)]) @ Q.T
    return gh.DenseOperator((exact + exact.T) / 2, definite=False)


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "toeplitz": (lambda: toeplitz(500), {}),
    "entries": (lambda: entries_only(toeplitz(300)), {"ordering": "gram"}),
    "points": (plane, {}),
    "K04": (lambda: matrix("K04", 400), {"ordering": "auto"}),
    "float32": (lambda: toeplitz(300).astype(np.float32), {"rtol": 1e-3}),
    "storage": (lambda: toeplitz(300), {"rtol": 1e-4, "storage_dtype": "float32"}),
    "bfloat16": (lambda: toeplitz(300), {"rtol": 1e-2, "storage_dtype": "bfloat16"}),
    "products": (lambda: products_only(toeplitz(300)), {}),
    "auto products": (lambda: products_only(toeplitz(290)), {"scheme": "auto", "rtol": 1e-4}),
    "fmm points": (plane, {"scheme": "fmm", "budget": 0.1}),
    "fmm dense": (
        lambda: gh.DenseOperator(plane(400).to_dense()),
        {"scheme": "fmm", "budget": 0.2, "ordering": "angle"},
    ),
    "fmm, no near field": (lambda: toeplitz(300), {"scheme": "fmm"}),
    "hodlr points": (plane, {"scheme": "hodlr"}),
    "hodlr dense": (lambda: toeplitz(300), {"scheme": "hodlr"}),
    "hodlr products": (lambda: toeplitz(300), {"scheme": "hodlr", "sampler": "products"}),
    "lowrank": (lambda: matrix("K04", 400), {"scheme": "lowrank", "rtol": 1e-3}),
    "lowrank, both signs": (both_signs, {"scheme": "lowrank", "rtol": 1e-5}),
    "lowrank, tail": (plane, {"scheme": "lowrank", "rtol": 1e-3, "tail": "diagonal"}),
    "auto": (lambda: matrix("K04", 400), {"scheme": "auto", "rtol": 1e-3}),
    "auto points": (plane, {"scheme": "auto", "rtol": 1e-3, "budget": 0.2}),
}
FEW = ("toeplitz", "points", "products", "fmm points", "hodlr dense", "lowrank")
DEFAULTS: dict[str, Any] = {"rtol": 1e-6, "leaf_size": 20, "max_rank": 150, "seed": 3}


def close(got: Any, want: Any, dtype: Any, factor: float = 1.0) -> None:
    accuracy = factor * (1e-12 if dtype == np.float64 else 1e-5)
    np.testing.assert_allclose(got, want, rtol=0, atol=accuracy * np.abs(want).max())


def forms(comm: Any) -> set[str]:
    """Every verb against the serial matrix; all cases on two and three ranks, elsewhere a few."""
    names = CASES if comm.Get_size() in (2, 3) else FEW
    for name in names:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            serial, K = (compressed(name, ranks) for ranks in (None, comm))
        the_same(K, serial, comm)
    return set(names)


def compressed(name: str, comm: Any) -> gh.CompressedMatrix:
    """The matrix of a case."""
    make, options = CASES[name]
    return gh.compress(make(), **{**DEFAULTS, **options}, comm=comm)


def the_same(K: Any, serial: Any, comm: Any) -> None:
    """Every verb of a matrix spread over ranks against that of one rank."""
    n, dtype = K.shape[0], K.dtype
    assert K.shape == serial.shape
    assert K.ranks == serial.ranks
    np.testing.assert_array_equal(K.tree.leaves, serial.tree.leaves)
    assert K.num_stored == serial.num_stored
    assert repr(K)[:20] == repr(serial)[:20]
    assert K.report.error == pytest.approx(serial.report.error, rel=1e-3)
    assert K.report.passes == serial.report.passes
    v = np.random.default_rng(1).standard_normal((n, 3)).astype(dtype)
    loose = 1.0 if serial.structure.dtype == np.float64 else 1e7
    if isinstance(serial, gh.LowRankMatrix):
        loose *= 10  # sums of inner products are in another order, and squares magnify rounding
    close(K @ v, serial @ v, dtype, loose)
    close(K @ v[:, 0], serial @ v[:, 0], dtype, loose)
    close(K @ v[K.rows], (serial @ v)[K.rows], dtype, loose)
    close(K.diagonal(), serial.diagonal(), dtype, loose)
    assert K.trace() == pytest.approx(serial.trace(), rel=1e-5)
    damping = 0.1 * float(serial.diagonal().mean())
    (F, warned), (alone, expected) = (factorized(A, damping) for A in (K, serial))
    if hasattr(comm, "Get_rank"):  # what threads warn of, they all catch
        assert warned == ([] if comm.Get_rank() else expected)  # rank 0 speaks for all
    x = alone.solve(v)
    close(F.solve(v), x, dtype, 1e3 * loose)
    close(F.solve(v[K.rows]), x[K.rows], dtype, 1e3 * loose)
    found, info = gh.cg(K, v[K.rows], damping=damping, M=getattr(F, "preconditioner", F), rtol=1e-6)
    assert info.converged
    close(found, gh.cg(serial, v, damping=damping, rtol=1e-8)[0][K.rows], dtype, 1e8)
    if hasattr(F, "preconditioner"):
        assert F.info.iterations == alone.info.iterations
        assert F.residual == pytest.approx(alone.residual, rel=0.2, abs=1e-12)
    else:
        square_roots(K, F, alone, v, loose)
        if dtype == np.float64:
            narrow = factorized(K, damping, dtype="float32")[0]
            close(narrow.solve(v[K.rows]), x[K.rows], dtype, 1e3 * loose)
            assert narrow.info.converged
    with pytest.raises(errors.ShapeError, match="must have shape"):
        K @ np.ones(n + 1, dtype)
    files(K, v, comm, dtype, loose)


def factorized(K: Any, damping: float, **options: Any) -> tuple[Any, list[Any]]:
    """A factor, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        F = K.factorize(damping, **options)
    kinds = [found.category for found in caught]
    assert set(kinds) <= {errors.AccuracyWarning}
    return F, kinds


def files(K: Any, v: Any, comm: Any, dtype: Any, loose: float) -> None:
    """Saved by all ranks, loaded by all and by one; saved by one, loaded by all."""
    ranks = communicator(comm)
    with tempfile.TemporaryDirectory() as own:
        folder = Path(ranks.bcast(own))
        K.save(folder / "spread.npz")
        again = gh.load(folder / "spread.npz", comm=comm)
        assert (again.ranks, again.num_stored) == (K.ranks, K.num_stored)
        close(again @ v, K @ v, dtype, loose)
        assert again.nbytes == pytest.approx(K.nbytes, rel=0.5)
        alone = gh.load(folder / "spread.npz")
        close(alone @ v, K @ v, dtype, loose)
        if ranks.rank == 0:
            alone.save(folder / "alone.npz")
        ranks.alike(0)
        close(gh.load(folder / "alone.npz", comm=comm) @ v, K @ v, dtype, loose)
        ranks.alike(0)


def square_roots(K: Any, F: Any, alone: Any, v: Any, loose: float) -> None:
    """W differs from the serial one by the order of what is eliminated; what it does, does not."""
    dtype = K.dtype
    assert F.logdet() == pytest.approx(alone.logdet(), rel=1e-9 * loose)
    A_v = (K @ v) + dtype.type(F.damping) * v
    close(F.sqrt_matmat(F.sqrt_matmat(v, transpose=True)), A_v, dtype, 100 * loose)
    close(F.sqrt_solve(F.sqrt_solve(v), transpose=True), F.solve(v), dtype, 1e4 * loose)
    own = F.coordinates.mine if not F.owners.alone else slice(None)
    z = F.sqrt_solve(v)
    close(F.sqrt_solve(v[K.rows]), z[own], dtype, 1e3)
    close(F.sqrt_matmat(z[own]), v[K.rows], dtype, 1e5 * loose)
    again = F.sqrt_solve(F.sqrt_matmat(v[K.rows], transpose=True), transpose=True)
    close(again, v[K.rows], dtype, 1e5)
    assert F.sample(2, seed=1).shape == (len(v), 2)
    covariance = F.sample(4000, seed=2)
    np.testing.assert_allclose((covariance**2).mean(axis=1), K.diagonal() + F.damping, rtol=0.25)


def network(comm: Any) -> None:
    """A Gauss-Newton matrix, whose products the ranks share by columns."""
    from network_cases import data, image_network, images

    inputs, model = images(8, n=25, border=1), image_network(64, 6, 10)
    targets = data((64,), 10, "cross_entropy", n=25)[1]
    op = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    for scheme in ("hss", "fmm"):
        options = {"rtol": 1e-5, "leaf_size": 20, "budget": 0.1 if scheme == "fmm" else 0.0}
        serial = gh.compress(op, scheme, **options)
        K = gh.compress(op, scheme, **options, comm=comm)
        assert (K.ranks, K.report.ordering) == (serial.ranks, serial.report.ordering)
        v = np.random.default_rng(0).standard_normal((K.shape[0], 5))
        close(K @ v, serial @ v, np.float64)
        damping = 0.1 * float(op.diagonal().mean())
        F = K.factorize(damping)
        M = getattr(F, "preconditioner", F)
        x, info = gh.cg(op, v, damping=damping, M=M, rtol=1e-10, comm=comm)
        assert info.converged
        assert info.iterations < 15
        close(op @ x + damping * x, v, np.float64, 1e4)
    shared = SharedOperator(op, communicator(comm))
    close(shared @ v, op @ v, np.float64)
    close(shared @ v[:, 0], op @ v[:, 0], np.float64)
    np.testing.assert_array_equal(shared.diagonal(), op.diagonal())
    dense = SharedOperator(gh.DenseOperator(op.to_dense()), communicator(comm))
    for k in (1, 2, 5):
        close(dense @ v[:, :k], op @ v[:, :k], np.float64)
    with pytest.raises(errors.DtypeError, match="comm is for an operator"):
        gh.cg(K, v, damping=damping, comm=comm)


def counted(comm: Any) -> dict[str, Any]:
    """Bytes of a product and what it was made of, bytes of memory, messages."""
    ranks = communicator(comm)
    op, options = plane(3000), {"rtol": 1e-3, "leaf_size": 50}
    K = gh.compress(op, **options, comm=comm)
    serial = gh.compress(op, **options)
    own = np.ones((len(K.rows), 5))
    sent, messages = ranks.sent["product"], ranks.messages["product"]
    K @ own
    F, alone = (matrix.factorize(1.0) for matrix in (K, serial))
    return {
        "sent": ranks.sent["product"] - sent,
        "messages": ranks.messages["product"] - messages,
        "rank": max(level.rank for level in K.structure.levels),
        "columns": 5,
        "memory": K.nbytes / serial.nbytes,
        "factor": F.nbytes / alone.nbytes,
        "rows": len(K.rows) / K.shape[0],
        "compress": ranks.sent["compress"],
    }


def orderings(comm: Any) -> None:
    """Trees large enough that the ranks share the nodes above their own."""
    op, ranks = plane(6000), communicator(comm)
    for name in ("gram", "angle", "geometric"):
        made, alone = (build_tree(op, name, 100, 2, 1.0, None, *c)[0] for c in ((ranks,), ()))
        np.testing.assert_array_equal(made.leaves, alone.leaves)


def refusals(comm: Any) -> None:
    """What is wrong on one rank is refused on all; what is indefinite is so on all."""
    ranks = communicator(comm)
    other = ranks.rank == ranks.size - 1 and ranks.size > 1
    exact = toeplitz(200)
    options = {"leaf_size": 20, "comm": comm}
    if ranks.size > 1:
        with pytest.raises(errors.ArgumentError, match="rtol differs between ranks: "):
            gh.compress(exact, rtol=1e-3 if other else 1e-2, **options)
        with pytest.raises(errors.ArgumentError, match="seed differs"):
            gh.compress(exact, seed=int(other), **options)
        with pytest.raises(errors.ArgumentError, match="another matrix"):
            gh.compress(2 * exact if other else exact, **options)
        with pytest.raises(errors.ArgumentError, match="op differs"):
            gh.compress(toeplitz(201) if other else exact, **options)
        with pytest.raises(errors.DtypeError):
            gh.compress("no" if other else exact, **options)
        with pytest.raises(errors.ArgumentError, match="lower leaf_size"):
            gh.compress(exact, leaf_size=200, comm=comm)
    with pytest.raises(errors.ArgumentError, match="rtol"):
        gh.compress(exact, rtol=-1.0, **options)
    K = gh.compress(exact - 3.0 * np.diag(np.arange(200) == 7), rtol=1e-6, **options)
    with pytest.raises(errors.NotPositiveDefiniteError) as caught:
        K.factorize(0.1)
    dampings = ranks.share(caught.value.damping)
    assert dampings == [dampings[0]] * ranks.size
    F = K.factorize(caught.value.damping)
    if ranks.size > 1:
        wrong_vectors(K, F, other)
    assert ranks.share(pickle.dumps(K.report.error)) == [pickle.dumps(K.report.error)] * ranks.size


def wrong_vectors(K: Any, F: Any, other: bool) -> None:
    """What one rank gives otherwise than the rest is refused by all; they go on together."""
    n = K.shape[0]
    for run in (K.matmat, F.solve, F.sqrt_solve, F.sqrt_matmat):
        with pytest.raises(errors.ArgumentError, match="differs between ranks: '2 columns of all"):
            run(np.ones((n, 3 if other else 2)))
        own = F.coordinates if run == F.sqrt_matmat else K.owners.rows
        with pytest.raises(errors.ArgumentError, match="of the rows of each rank' on rank"):
            run(np.ones(len(own.mine) if other else n))
        for wrong, error in ((np.full(n, np.nan), errors.ArgumentError),
                             (np.ones(n + 1), errors.ShapeError),
                             (np.ones(n, int), errors.DtypeError)):  # fmt: skip
            with pytest.raises(error) as caught:
                run(wrong if other else np.ones(n))
            assert other or f"of {K.owners.comm.size}" in caught.value.__notes__[0]
    with pytest.raises(errors.ArgumentError, match="damping differs"):
        K.factorize(2.0 if other else 1.0)
    with pytest.raises(errors.ArgumentError, match="damping differs"):
        K.factorize(-1.0 if other else 1.0)
    with pytest.raises(errors.ArgumentError, match="num differs"):
        F.sample(2 if other else 1)
    with pytest.raises(errors.ArgumentError, match="maxiter differs"):
        gh.cg(K, np.ones(n), maxiter=7 if other else 8)
