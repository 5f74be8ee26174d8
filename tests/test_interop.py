"""Matrices, operators and factors beside SciPy, NumPy, torch and other packages."""

from typing import Any

import dense_oracles
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg as sla
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr.errors import DtypeError, ShapeError
from gpu_hodlr.testing import check_operator

N = 150
A = toeplitz(N) + np.eye(N)
SCHEMES = ("hss", "hodlr", "fmm", "lowrank")


def compressed(scheme: str, exact: Any = A) -> gh.CompressedMatrix:
    options = {"budget": 0.2} if scheme == "fmm" else {}
    return gh.compress(exact, scheme, rtol=1e-10, max_rank=N, leaf_size=20, **options)


def network() -> tuple[Any, Any]:
    """The eigenbasis form of a network's matrix, and that."""
    pytest.importorskip("torch")
    from eigenbasis_cases import operator

    op = operator("autoencoder")
    return gh.compress(op, "kfe", rtol=1e-10), op.to_dense()


def factor_of_a_network() -> tuple[Any, Any]:
    K, exact = network()
    F = K.factorize(0.1)
    return F, np.linalg.inv(exact + 0.1 * np.eye(len(exact)))


# What multiplies, and by what.
MULTIPLIES = (
    {"operator": lambda: (gh.DenseOperator(A), A)}
    | {scheme: (lambda scheme=scheme: (compressed(scheme), A)) for scheme in SCHEMES}
    | {
        "scaled": lambda: (compressed("hss", 4 * A) / 4, A),
        "sum": lambda: (compressed("hodlr", toeplitz(N)) + gh.Diagonal(np.ones(N)), A),
        "eigenbasis": network,
        "factor": lambda: (compressed("hss", toeplitz(N)).factorize(np.ones(N)), np.linalg.inv(A)),
        "factor in the eigenbasis": factor_of_a_network,
    }
)


@pytest.mark.parametrize("make", MULTIPLIES.values(), ids=MULTIPLIES)
def test_every_way_to_multiply(make: Any):
    K, A = make()
    v, w = np.random.default_rng(0).standard_normal((2, len(A), 3))

    def close(got: Any, want: Any) -> None:
        assert type(got) is np.ndarray
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)

    assert K.__array_ufunc__ is None

    for got in (K @ v, K.matmat(v), K.rmatmat(v), K.T @ v, (v.T @ K).T, K.to_scipy() @ v):
        close(got, A @ v)
    for got in (K @ v[:, 0], K.matvec(v[:, 0]), K.rmatvec(v[:, 0]), v[:, 0] @ K, K.T @ v[:, 0]):
        close(got, A @ v[:, 0])
    close(w.T @ K @ v, w.T @ A @ v)
    assert K.T is K


@pytest.mark.parametrize("name", [name for name in MULTIPLIES if "factor" not in name])
def test_scipy_takes_it_as_it_is(name: str):
    K, A = MULTIPLIES[name]()
    n = len(A)
    assert sla.aslinearoperator(K).shape == (n, n)
    largest = sla.eigsh(K, k=3, v0=np.ones(n), return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(largest), np.linalg.eigvalsh(A)[-3:], rtol=1e-6)
    b = A @ np.random.default_rng(1).standard_normal(n)
    x, failed = sla.cg(K, b, rtol=1e-8)
    assert not failed
    assert np.linalg.norm(A @ x - b) <= 1e-6 * np.linalg.norm(b)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_factor_is_the_preconditioner_scipy_means(scheme: str):
    F = compressed(scheme).factorize(0.0 if scheme != "lowrank" else 0.5)
    b = np.random.default_rng(1).standard_normal((N, 2))
    damped = A + F.damping * np.eye(N)
    np.testing.assert_allclose(F.to_scipy() @ b, np.linalg.solve(damped, b), rtol=0, atol=1e-6)
    counts = []
    for M in (None, F):
        steps: list[Any] = []
        x, failed = sla.cg(damped, b[:, 0], M=M, rtol=1e-10, callback=steps.append)
        assert not failed
        np.testing.assert_allclose(x, np.linalg.solve(damped, b[:, 0]), rtol=0, atol=1e-6)
        counts.append(len(steps))
    assert counts[1] <= min(3, counts[0] - 1)
    start = np.random.default_rng(2).standard_normal((N, 2))
    found, _ = sla.lobpcg(damped, start, M=F, tol=1e-6, maxiter=200)
    np.testing.assert_allclose(np.sort(found), np.linalg.eigvalsh(damped)[-2:], rtol=1e-6)


def test_torch_leaves_the_product_from_the_left():
    torch = pytest.importorskip("torch")
    K = compressed("hss")
    w = torch.from_numpy(np.random.default_rng(0).standard_normal((2, N)))
    got = w @ K
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(got.numpy(), w.numpy() @ A, rtol=0, atol=1e-7)
    np.testing.assert_allclose((w[0] @ K).numpy(), w[0].numpy() @ A, rtol=0, atol=1e-7)
    with pytest.raises(TypeError):
        w + K


def sparse() -> Any:
    return scipy.sparse.csr_array(np.where(A > 0.05, A, 0.0))


FOREIGN = {
    "array": (lambda: A, A, "products and entries"),
    "csr": (sparse, sparse().toarray(), "products and entries"),
    "coo of integers": (
        lambda: scipy.sparse.coo_matrix(np.diag(np.arange(N))),
        np.diag(np.arange(N)),
        "products and entries",
    ),
    "float32": (lambda: sparse().astype(np.float32), sparse().toarray(), "products and entries"),
    "LinearOperator": (lambda: sla.aslinearoperator(A), A, "products,"),
    "compressed": (lambda: compressed("hss"), A, "products,"),
}


@pytest.mark.parametrize(("make", "want", "said"), FOREIGN.values(), ids=FOREIGN)
def test_matrices_of_others(make: Any, want: np.ndarray, said: str):
    op = gh.as_operator(make())
    assert said in repr(op)
    assert "positive semi-definite by declaration" in repr(op)
    check_operator(op, None if said == "products," else want)
    assert np.abs(op.to_dense() - want).max() <= 1e-6
    assert "indefinite by declaration" in repr(gh.as_operator(make(), definite=False))


def test_operators_stay_as_they_are():
    op = gh.DenseOperator(A)
    assert gh.as_operator(op) is op


def test_compress_takes_them():
    K = gh.compress(sla.aslinearoperator(A), rtol=1e-6, leaf_size=20, max_rank=100)
    assert dense_oracles.frobenius_error(K.to_dense(), A) <= 3e-6


class OnlyMatvec:
    """The least that SciPy takes."""

    shape = (N, N)

    def matvec(self, v: Any) -> Any:
        return A @ v


def test_the_least_that_scipy_takes():
    op = gh.as_operator(OnlyMatvec())
    np.testing.assert_allclose(op.to_dense(), A, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("x", "error", "said"),
    [
        ("K", DtypeError, "must be an Operator, an array, or have shape and matmat"),
        (scipy.sparse.csr_array((3, 4)), ShapeError, r"must be square, got shape \(3, 4\)"),
        (scipy.sparse.csr_array(np.eye(3) * 1j), DtypeError, "float32 or float64, got complex128"),
        (sla.aslinearoperator(np.eye(3)[:2]), ShapeError, "square"),
        (np.eye(3, dtype=np.float16), DtypeError, "float16"),
    ],
    ids=["text", "not square", "complex", "not square operator", "half"],
)
def test_what_is_none(x: Any, error: type[Exception], said: str):
    with pytest.raises(error, match=said):
        gh.as_operator(x)


@pytest.mark.filterwarnings("ignore")  # of theirs
def test_gpytorchs_operators():
    linear_operator = pytest.importorskip("linear_operator")
    torch = pytest.importorskip("torch")
    op = gh.as_operator(linear_operator.to_linear_operator(torch.from_numpy(A)))
    assert "products and entries" in repr(op)
    check_operator(op, A)
    sum_of_two = linear_operator.operators.DiagLinearOperator(torch.ones(N, dtype=torch.float64))
    both = linear_operator.to_linear_operator(torch.from_numpy(toeplitz(N))) + sum_of_two
    check_operator(gh.as_operator(both), A)


@pytest.mark.filterwarnings("ignore")  # of theirs
def test_curvlinops_operators():
    curvlinops = pytest.importorskip("curvlinops")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    model.to(torch.float64)
    x, y = torch.randn(20, 4, dtype=torch.float64), torch.randn(20, 3, dtype=torch.float64)
    theirs = curvlinops.GGNLinearOperator(
        model, torch.nn.MSELoss(), list(model.parameters()), [(x, y)]
    )
    op = gh.as_operator(theirs)
    want = gh.GGNOperator(model, "mse", x, y).to_dense()
    check_operator(op)
    np.testing.assert_allclose(op.to_dense(), want, rtol=0, atol=1e-12)
