"""Factors in float32 of float64 matrices, refined: solutions, refusals, files, ranks."""

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import toeplitz
from saved_files import rewritten
from test_memory import peak
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.distributed import ALONE
from gpu_hodlr.errors import (
    AccuracyWarning,
    ArgumentError,
    DtypeError,
    FileFormatError,
    NotPositiveDefiniteError,
)
from gpu_hodlr.factor import RefinedHODLR, RefinedULV, RefinedWoodbury
from gpu_hodlr.factor.refined import refine
from gpu_hodlr.factor.residuals import sizes

N = 126  # leaves are padded
A = toeplitz(N) + 0.1 * np.eye(N)
B = np.random.default_rng(0).standard_normal((N, 3))
ROWS = np.random.default_rng(3).uniform(0.5, 3.0, N)
CLASSES = {
    "hss": RefinedULV, "hodlr": RefinedHODLR, "lowrank": RefinedWoodbury, "fmm": RefinedULV,
}  # fmt: skip
ROUNDING = 1e-15  # a backward error of float64
FLOAT32 = 1e-5  # what is left in float32


def compressed(kind: str, xp: Any = np, exact: Any = A, **options: Any) -> Any:
    options = {"rtol": 1e-6, "max_rank": len(exact), "leaf_size": 20, **options}
    return gh.compress(xp.asarray(exact), kind, **options)


def with_eigenvalues(eigenvalues: Any) -> np.ndarray:
    n = len(eigenvalues)
    Q = np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0]
    exact = (Q * eigenvalues) @ Q.T
    return (exact + exact.T) / 2


def stored(K: Any) -> np.ndarray:
    """What K stores, as a dense matrix in float64."""
    return to_host(K._exact().to_dense()).astype(np.float64)


def damped(K: Any, damping: Any) -> np.ndarray:
    return stored(K) + np.diag(np.broadcast_to(damping, K.shape[0]))


@pytest.mark.parametrize("rows", [False, True], ids=["one damping", "of every row"])
@pytest.mark.parametrize("kind", CLASSES)
def test_solutions_are_those_of_float64(kind: str, rows: bool, xp: ModuleType):
    K, damping = compressed(kind, xp), ROWS if rows else 0.3
    F = K.factorize(xp.asarray(damping) if rows else damping, dtype="float32")
    assert type(F) is CLASSES[kind]
    assert (F.dtype, F.factor.dtype) == (np.float64, np.float32)
    exact = damped(K, damping)
    for b in (B, B[:, 0], 1e200 * B, 1e-200 * B):
        x = F.solve(xp.asarray(b))
        assert isinstance(x, xp.ndarray)
        assert (x.dtype, x.shape) == (np.float64, b.shape)
        size = np.abs(b).max() or 1.0  # squares of these would leave the range
        assert dense_oracles.backward_error(exact, to_host(x) / size, b / size) <= ROUNDING
        assert F.info.converged
        assert F.info.iterations <= 5
    x = F.solve(xp.asarray(B))
    assert F.info.iterations >= 2  # one step would be float32 alone
    residual = np.linalg.norm(exact @ to_host(x) - B, axis=0) / np.linalg.norm(B, axis=0)
    assert F.residual == pytest.approx(residual.max(), abs=1e-15)
    assert not F.solve(xp.asarray(B[:, :0])).size
    assert (F.info.converged, F.info.iterations, F.residual) == (True, 0, 0.0)
    assert not F.solve(xp.zeros((N, 2))).any()


@pytest.mark.parametrize("kept_in", ["float32", "bfloat16", "tfloat32"])
@pytest.mark.parametrize("kind", CLASSES)
def test_of_what_is_stored_narrower_residuals_are_of_float64(
    kind: str, kept_in: str, xp: ModuleType
):
    """Sums in float32 would leave residuals of 1e-7."""
    K = compressed(kind, xp, rtol=1e-2, storage_dtype=kept_in)
    for damping in (0.3, ROWS):
        F = K.factorize(xp.asarray(damping) if np.ndim(damping) else damping, dtype="float32")
        x = F.solve(xp.asarray(B))
        assert dense_oracles.backward_error(damped(K, damping), to_host(x), B) <= ROUNDING


@pytest.mark.parametrize("kind", CLASSES)
def test_bytes_are_halved(kind: str):
    K = compressed(kind, storage_dtype="float32")
    wide, F = K.factorize(ROWS), K.factorize(ROWS, dtype=np.float32)
    if kind == "lowrank":
        assert F.nbytes == wide.nbytes / 2
    else:  # a damping of every row leaves no basis to be shared with K
        K64 = compressed(kind)
        assert K64.factorize(0.3, dtype="float32").nbytes < 0.75 * K64.factorize(0.3).nbytes
        assert K.factorize(0.3, dtype="float32").nbytes == K.factorize(0.3).nbytes / 2


@pytest.mark.parametrize("kind", CLASSES)
def test_roots_and_determinants_are_those_of_float32(kind: str, xp: ModuleType):
    K = compressed(kind, xp)
    F, exact = K.factorize(0.3, dtype="float32"), damped(K, 0.3)
    z, scale = xp.asarray(B), np.abs(exact @ B).max()
    for transpose in (False, True):
        whole = F.sqrt_solve(F.sqrt_matmat(z, transpose=transpose), transpose=transpose)
        np.testing.assert_allclose(to_host(whole), B, atol=FLOAT32)
    product = F.sqrt_matmat(F.sqrt_matmat(z, transpose=True))
    np.testing.assert_allclose(to_host(product), exact @ B, atol=FLOAT32 * scale)
    assert F.logdet() == pytest.approx(np.linalg.slogdet(exact)[1], abs=1e-3)
    assert F.sample(2, seed=1).shape == (N, 2)
    assert F.inverse_norm == pytest.approx(np.linalg.norm(np.linalg.inv(exact), 2), rel=0.1)
    assert F.residual_bound > 0
    assert "ULVCholesky in float32" in repr(compressed("hss").factorize(0.3, dtype="float32"))


@pytest.mark.parametrize("kept_in", ["float64", "float32"])
@pytest.mark.parametrize("scale", [2.0**-900, 1e-40, 4.0, 1e30, 2.0**900])
@pytest.mark.parametrize("kind", CLASSES)
def test_any_scale_does(kind: str, scale: float, kept_in: str):
    """Beyond the range of float32, of which the factor is, or what is stored."""
    one = compressed(kind, rtol=1e-4, storage_dtype=kept_in)
    K, exact = one * scale, damped(one, 0.3)
    F = K.factorize(0.3 * scale, dtype="float32")
    x = F.solve(B) * scale
    rounded = kept_in == "float32" and np.frexp(scale)[0] != 0.5  # the product that is stored
    assert dense_oracles.backward_error(exact, x, B) <= (1e-7 if rounded else 1e-14)
    want = np.linalg.slogdet(exact)[1] + N * np.log(scale)
    assert F.logdet() == pytest.approx(want, abs=1e-2)
    for transpose in (False, True):
        root = F.sqrt_matmat(B, transpose=transpose)
        np.testing.assert_allclose(F.sqrt_solve(root, transpose=transpose), B, atol=FLOAT32)
    product = F.sqrt_matmat(F.sqrt_matmat(B, transpose=True)) / scale
    np.testing.assert_allclose(product, exact @ B, atol=FLOAT32 * np.abs(exact @ B).max())
    diagonal = F.inverse_diagonal() * scale
    np.testing.assert_allclose(diagonal, np.diagonal(np.linalg.inv(exact)), rtol=1e-4)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_damping_far_above_the_norm(kind: str):
    """What a residual may be counts both."""
    K = compressed(kind)
    F = K.factorize(1e6, dtype="float32")
    x = F.solve(B)
    assert F.info.converged
    assert dense_oracles.backward_error(damped(K, 1e6), x, B) <= ROUNDING


def test_sizes_of_columns(xp: ModuleType):
    """One of those that are zero, or of which a rank has no rows."""
    v = xp.asarray(np.array([[0.0, -3.0, 1e-300], [0.0, 2.0, 0.0]]))
    np.testing.assert_array_equal(to_host(sizes(v, ALONE)), [1.0, 3.0, 1e-300])
    np.testing.assert_array_equal(to_host(sizes(v[:0], ALONE)), np.ones(3))
    others: Any = SimpleNamespace(max=lambda own: xp.maximum(own, 0.25))
    np.testing.assert_array_equal(to_host(sizes(v[:0], others)), np.full(3, 0.25))


@pytest.mark.parametrize("kind", CLASSES)
def test_a_damping_too_small_for_float32_is_refused(kind: str):
    exact = with_eigenvalues(np.geomspace(1e-12, 1.0, 100))
    K = compressed(kind, exact=exact, rtol=1e-13)
    F = K.factorize(1e-9)  # float64 does
    x = F.solve(exact[:, 0])
    assert dense_oracles.backward_error(damped(K, 1e-9), x, exact[:, 0]) <= 1e-13
    for damping in (1e-9, np.full(100, 1e-9)):
        said = r"too small for a factor in float32.*or factorize in float64"
        with pytest.raises(NotPositiveDefiniteError, match=said) as caught:
            K.factorize(damping, dtype="float32")
        more = caught.value.damping
        assert 1e-9 < more < 1e-4
        enough = more + damping if np.ndim(damping) else more
        x = K.factorize(enough, dtype="float32").solve(exact[:, 0])
        backward = dense_oracles.backward_error(damped(K, enough), x, exact[:, 0])
        assert backward <= ROUNDING
    F = K.factorize(1e-9, shift="auto", dtype="float32")
    assert F.shifted == F.damping - 1e-9 > 0


@pytest.mark.parametrize("kind", CLASSES)
def test_what_float32_takes_for_positive_is_seen(kind: str):
    """An eigenvalue of -1e-8: Cholesky in float32 may well succeed."""
    eigenvalues = np.r_[-1e-8, np.linspace(0.5, 1.0, 79)]
    op = gh.DenseOperator(with_eigenvalues(eigenvalues))
    op.definite = False
    K = gh.compress(op, kind, rtol=1e-14, max_rank=80, leaf_size=20)
    with pytest.raises(NotPositiveDefiniteError, match="is not positive definite"):
        K.factorize(0.0, dtype="float32")


def test_tolerance_and_steps():
    K = compressed("hss")
    F = K.factorize(0.3, dtype="float32")
    x = F.solve(B, rtol=1e-4)
    assert F.info.iterations == 1
    assert 1e-12 < F.residual <= 1e-4
    each = np.linalg.norm(B - damped(K, 0.3) @ x, axis=0) / np.linalg.norm(B, axis=0)
    assert F.residual == pytest.approx(each.max(), rel=1e-6)
    assert each.min() < 0.999 * each.max()
    for b in (B, np.c_[np.zeros(N), B[:, 0]]):
        with pytest.warns(AccuracyWarning, match="factorize in float64"):
            F.solve(b, maxiter=1)
        assert not F.info.converged
        assert F.info.residuals[0] == pytest.approx(1.0)
    x = F.solve(np.c_[np.zeros(N), B[:, 0]])  # one column has ended before the other
    assert dense_oracles.backward_error(damped(K, 0.3), x[:, 1], B[:, 0]) <= ROUNDING
    for wrong in ({"rtol": -1.0}, {"maxiter": 0}):
        with pytest.raises(ArgumentError):
            F.solve(B, **wrong)


@pytest.mark.parametrize(("share", "converges"), [(0.3, False), (0.6, True), (1.7, False)])
def test_a_step_must_leave_less_than_half(share: float, converges: bool):
    """Of the residual; else no more are made."""
    exact = damped(compressed("hss"), 0.3)
    inverse = share * np.linalg.inv(exact)
    norm = float(np.linalg.norm(exact))
    x, info = refine(lambda v: exact @ v, lambda r: inverse @ r, B, norm, 0.0, 50, ALONE)
    assert info.converged == converges
    left = abs(1 - share) ** np.arange(len(info.residuals))
    np.testing.assert_allclose(info.residuals[:20], left[:20], rtol=1e-6)
    if converges:
        assert 30 < info.iterations < 50
        assert dense_oracles.backward_error(exact, x, B) <= ROUNDING
    else:
        assert info.iterations == 1


def test_bad_types():
    K = compressed("hss")
    assert type(K.factorize(0.3, dtype="float64")) is type(K.factorize(0.3))
    narrow = compressed("hss", exact=A.astype(np.float32), rtol=1e-3)
    assert narrow.factorize(0.3, dtype=np.float32).dtype == np.float32
    with pytest.raises(ArgumentError, match=r"float64 is wider than the matrix's float32"):
        narrow.factorize(0.3, dtype="float64")
    with pytest.raises(DtypeError, match="dtype must be float32 or float64"):
        K.factorize(0.3, dtype="bfloat16")
    near = compressed("fmm", budget=0.2)
    with pytest.raises(ArgumentError, match="FMMMatrix solves by iterations"):
        near.factorize(0.3, dtype="float32")


def test_gradients():
    torch = pytest.importorskip("torch")
    F = compressed("hss").factorize(0.3, dtype="float32")
    b = torch.as_tensor(B[:, 0]).requires_grad_()
    F.solve(b).sum().backward()
    np.testing.assert_array_equal(b.grad.numpy(), F.solve(np.ones(N)))


@pytest.mark.parametrize("kind", ["hss", "hodlr"])
def test_memory_is_estimated_within_half(kind: str):
    """That of low rank is a few numbers."""
    op = gh.KernelOperator(np.random.default_rng(0).random((1500, 3)), "matern32", nugget=0.5)
    K = gh.compress(op, kind, rtol=1e-2, leaf_size=40)
    F, most = peak(lambda: K.factorize(20.0, dtype="float32"))
    assert 1 / 1.5 < type(F).memory(K.structure) / most < 1.5


def test_not_in_the_eigenbasis():
    pytest.importorskip("torch")
    from eigenbasis_cases import operator

    K = gh.compress(operator("classifier"), "kfe", rtol=1e-3)
    with pytest.raises(ArgumentError, match="KFEMatrix solves by iterations"):
        K.factorize(1.0, dtype="float32")
    assert K.factorize(1.0, dtype="float64").dtype == np.float64


# --- files and ranks -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [False, True], ids=["one damping", "of every row"])
@pytest.mark.parametrize("kind", CLASSES)
def test_saved_and_loaded(kind: str, rows: bool, xp: ModuleType, tmp_path: Path):
    K = compressed(kind, xp, storage_dtype="bfloat16", rtol=1e-2)
    F = K.factorize(xp.asarray(ROWS) if rows else 0.3, dtype="float32")
    F.save(tmp_path / "F")
    G = gh.load(tmp_path / "F", device=F.device)
    assert type(G) is CLASSES[kind]
    z = xp.asarray(B)
    for got, want in (
        (G.solve(z), F.solve(z)), (G.sqrt_matmat(z), F.sqrt_matmat(z)), (G.sample(1), F.sample(1)),
    ):  # fmt: skip
        np.testing.assert_array_equal(to_host(got), to_host(want))
    assert G.logdet() == F.logdet()
    assert G.info.iterations == F.info.iterations
    assert G.nbytes > F.nbytes  # what was the matrix's


def _wide(arrays: dict[str, Any]) -> None:
    for name in arrays:
        if name.startswith("factor.") and arrays[name].dtype == np.float32:
            arrays[name] = arrays[name].astype(np.float64)


@pytest.mark.parametrize(
    ("header", "arrays"),
    [
        (id, _wide), (lambda h: h.update(scale=0.0), id), (lambda h: h.pop("of_factor"), id),
        (lambda h: h.update(norm=-1.0), id), (id, lambda a: a.pop("factor.root")),
    ],
    ids=["a factor of float64", "scale 0", "of no factor", "a negative norm", "no root"],
)  # fmt: skip
def test_damaged_files_are_noticed(header: Any, arrays: Any, tmp_path: Path):
    compressed("hss").factorize(0.3, dtype="float32").save(tmp_path / "F")
    with pytest.raises(FileFormatError):
        gh.load(rewritten(tmp_path / "F", header, arrays))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("size", [2, 3])
def test_on_many_ranks(kind: str, size: int, tmp_path: Path):
    K = compressed(kind)
    K.save(tmp_path / "K")
    for rows in (False, True):
        damping = ROWS if rows else 0.3
        K.factorize(damping, dtype="float32").save(tmp_path / "one")
        exact = damped(K, damping)

        def job(comm: Any, damping: Any = damping) -> Any:
            F = gh.load(tmp_path / "K", comm=comm).factorize(damping, dtype="float32")
            F.save(tmp_path / "F")
            G = gh.load(tmp_path / "F", comm=comm)
            one = gh.load(tmp_path / "one", comm=comm)
            return F.solve(B), G.solve(B), one.solve(B), F.logdet(), F.info.iterations

        found = on_threads(size, job)
        first = found[0]
        for each in found:
            assert not isinstance(each, Exception), each
            x, again, other, logdet, steps = each
            np.testing.assert_array_equal(x, first[0])
            np.testing.assert_array_equal(x, again)
            for solution in (x, other):
                assert dense_oracles.backward_error(exact, solution, B) <= ROUNDING
            assert (logdet, steps) == (first[3], first[4])
        x = gh.load(tmp_path / "F").solve(B)  # on one rank, what several have saved
        assert dense_oracles.backward_error(exact, x, B) <= ROUNDING


def test_ranks_are_refused_together():
    exact = with_eigenvalues(np.geomspace(1e-12, 1.0, 100))

    def job(comm: Any) -> Any:
        K = compressed("hss", exact=exact, rtol=1e-13, comm=comm)
        return K.factorize(1e-9, dtype="float32")

    found = on_threads(2, job)
    assert all(isinstance(error, NotPositiveDefiniteError) for error in found)
    assert len({str(error) for error in found}) == 1

    def differing(comm: Any) -> Any:
        return compressed("hss", comm=comm).factorize(0.3, dtype=["float32", None][comm.rank])

    assert all(isinstance(error, ArgumentError) for error in on_threads(2, differing))
