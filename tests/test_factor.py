"""The ULV-Cholesky factor against dense linear algebra of the same compressed matrix."""

import itertools
from collections.abc import Callable
from typing import Any

import dense_oracles
import numpy as np
import pytest
from dense_oracles import backward_error
from matrix_cases import MATRICES, Clustered, low_rank_plus_diagonal, toeplitz

import gpu_hodlr as gh
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.structures.telescope import real_rows

BACKWARD = {np.dtype(np.float64): 1e-13, np.dtype(np.float32): 1e-6}


def laplace(n: int, dimension: int = 2, nugget: float = 0.0) -> gh.KernelOperator:
    points = np.random.default_rng(n).random((n, dimension))
    return gh.KernelOperator(points, "laplace", 0.5, nugget)


def compressed(name: str) -> gh.HSSMatrix:
    options: dict[str, Any] = {"rtol": 1e-6, "leaf_size": 30}
    if name == "clusters":  # leaves of unequal size
        exact = dense_oracles.distance_matrix(257, lambda d: np.exp(-d / 300))
        return gh.compress(Clustered(exact, 1), **options | {"leaf_size": 40}, ordering="natural")
    if name == "empty leaves":  # 33 units of 5 and 64 leaves
        exact = toeplitz(165)
        return gh.compress(exact, **options | {"leaf_size": 3}, ordering="natural")
    if name == "wide ranks":  # ranks above the number of rows of a leaf
        return gh.compress(toeplitz(300), rtol=1e-12, leaf_size=4, ordering="random")
    if name == "leaf size 1":
        return gh.compress(toeplitz(101), rtol=1e-10, leaf_size=1)
    if name == "kernel":
        return gh.compress(laplace(500), **options)
    if name == "one leaf":
        return gh.compress(toeplitz(50), leaf_size=64)
    if name == "two rows":
        return gh.compress(np.array([[2.0, 1.0], [1.0, 2.0]]), leaf_size=1)
    if name == "float32":
        return gh.compress(toeplitz(301).astype(np.float32), rtol=1e-4, leaf_size=30)
    return gh.compress(MATRICES[name](300), **options)


NAMES = (
    "toeplitz",
    "banded",
    "identity",
    "low rank + diagonal",
    "full rank",
    "kernel",
    "clusters",
    "empty leaves",
    "wide ranks",
    "leaf size 1",
    "one leaf",
    "two rows",
    "float32",
)


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[gh.HSSMatrix, np.ndarray]:
    """A compressed positive definite matrix, and its dense float64 form."""
    K = compressed(request.param)
    return K, K.to_dense().astype(np.float64)


def columns(K: gh.HSSMatrix, k: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((K.shape[0], k)).astype(K.dtype)


@pytest.mark.parametrize("damping", [0.0, 1e-3, 10.0])
def test_solve(case: tuple[gh.HSSMatrix, np.ndarray], damping: float):
    K, dense = case
    F = K.factorize(damping)
    A = dense + damping * np.eye(len(dense))
    b = columns(K)
    x = F.solve(b)
    assert x.dtype == K.dtype
    assert F.damping == damping
    assert F.shape == K.shape
    assert backward_error(A, x, b) <= BACKWARD[K.dtype]
    one = F.solve(b[:, 3])
    assert one.shape == (len(A),)
    assert backward_error(A, one, b[:, 3]) <= BACKWARD[K.dtype]


@pytest.mark.parametrize("damping", [0.0, 10.0])
def test_logdet(case: tuple[gh.HSSMatrix, np.ndarray], damping: float):
    K, dense = case
    sign, want = np.linalg.slogdet(dense + damping * np.eye(len(dense)))
    assert sign == 1
    accuracy = 1e-10 if K.dtype == np.float64 else 1e-3
    got = K.factorize(damping).logdet()
    assert isinstance(got, float)
    assert got == pytest.approx(want, rel=accuracy, abs=accuracy * len(dense))


def test_square_root(case: tuple[gh.HSSMatrix, np.ndarray]):
    """W W^T = K + damping I, W square; the transposes and inverses belong to the same W."""
    K, dense = case
    F = K.factorize(0.5)
    n = len(dense)
    A = dense + 0.5 * np.eye(n)
    accuracy = 1e-12 if K.dtype == np.float64 else 2e-5
    unit = np.eye(n, dtype=K.dtype)
    W = F.sqrt_matmat(unit)
    assert W.shape == (n, n)
    assert W.dtype == K.dtype
    assert np.linalg.norm(W @ W.T - A) <= accuracy * np.linalg.norm(A)
    norm = np.linalg.norm(W)
    assert np.linalg.norm(F.sqrt_matmat(unit, transpose=True) - W.T) <= accuracy * norm
    inverse = F.sqrt_solve(unit)
    condition = np.linalg.cond(W.astype(np.float64))
    allowed = accuracy * condition * np.linalg.norm(inverse)
    assert np.linalg.norm(inverse @ W - unit) <= accuracy * condition * n**0.5
    assert np.linalg.norm(F.sqrt_solve(unit, transpose=True) - inverse.T) <= allowed


def test_square_root_of_vectors(case: tuple[gh.HSSMatrix, np.ndarray]):
    K, _ = case
    F = K.factorize(0.5)
    z = columns(K, 3, seed=2)
    accuracy = 1e-10 if K.dtype == np.float64 else 1e-3
    for transpose in (False, True):
        product = F.sqrt_matmat(z, transpose=transpose)
        back = F.sqrt_solve(product, transpose=transpose)
        np.testing.assert_allclose(back, z, rtol=0, atol=accuracy)
        again = F.sqrt_matmat(z[:, 1], transpose=transpose)
        assert again.shape == (len(z),)
        np.testing.assert_allclose(again, product[:, 1], rtol=0, atol=accuracy)
    solved = F.sqrt_solve(F.sqrt_solve(z), transpose=True)
    np.testing.assert_allclose(solved, F.solve(z), rtol=0, atol=accuracy * np.abs(solved).max())


def test_rows_and_columns_of_the_factor_are_all_used(case: tuple[gh.HSSMatrix, np.ndarray]):
    """No unknown of W is padding and none is lost: W has full rank N."""
    K, _ = case
    n = K.shape[0]
    W = K.factorize(0.5).sqrt_matmat(np.eye(n, dtype=K.dtype)).astype(np.float64)
    assert np.linalg.svd(W, compute_uv=False)[-1] > 0.5  # the square root of the damping, at least


def test_a_new_damping_does_not_compress_again():
    """The factor reads the telescope and leaves it as it is; factors are independent."""
    K = gh.compress(toeplitz(300), rtol=1e-6, leaf_size=30)
    before = [a.copy() for a in K.structure.arrays()]
    b = columns(K, 2)
    factors = {damping: K.factorize(damping) for damping in (0.0, 0.1, 5.0)}
    for a, kept in zip(K.structure.arrays(), before, strict=True):
        np.testing.assert_array_equal(a, kept)
    dense = K.to_dense()
    for damping, F in factors.items():
        A = dense + damping * np.eye(300)
        assert backward_error(A, F.solve(b), b) < 1e-13


def test_solve_leaves_its_argument_alone():
    K = gh.compress(toeplitz(100), leaf_size=10)
    F = K.factorize(0.1)
    b = columns(K, 2)
    b.flags.writeable = False
    kept = b.copy()
    for function in (F.solve, F.sqrt_matmat, F.sqrt_solve):
        np.testing.assert_array_equal(function(b), function(b))
    np.testing.assert_array_equal(b, kept)
    assert F.solve(np.zeros((100, 0))).shape == (100, 0)
    assert not F.solve(np.zeros(100)).any()


def test_many_columns_are_the_columns_one_by_one():
    K = gh.compress(toeplitz(200), rtol=1e-8, leaf_size=20)
    F = K.factorize()
    b = columns(K, 70)
    x = F.solve(b)
    for j in (0, 33, 69):
        np.testing.assert_allclose(F.solve(b[:, j]), x[:, j], rtol=0, atol=1e-12)


def test_torch_in_torch_out():
    torch = pytest.importorskip("torch")
    F = gh.compress(toeplitz(100), leaf_size=10).factorize(0.1)
    b = torch.randn(100, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for function in (F.solve, F.sqrt_matmat, F.sqrt_solve):
        got = function(b)
        assert isinstance(got, torch.Tensor)
        np.testing.assert_array_equal(got.numpy(), function(b.numpy()))


def test_the_same_factor_twice_is_the_same():
    K = gh.compress(laplace(400), rtol=1e-4, leaf_size=30)
    b = columns(K)
    np.testing.assert_array_equal(K.factorize(0.1).solve(b), K.factorize(0.1).solve(b))
    assert K.factorize(0.1).logdet() == K.factorize(0.1).logdet()


def test_gauss_newton_with_damping():
    """A singular matrix with zero rows: (K + damping I)^-1 and its logdet."""
    pytest.importorskip("torch")
    from network_cases import data, image_network, images

    inputs, model = images(8, n=25, border=1), image_network(64, 6, 3)
    targets = data((64,), 3, "cross_entropy", n=25)[1]
    op = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    exact = op.to_dense()
    damping = 1e-3
    F = gh.compress(op, rtol=1e-10, leaf_size=40).factorize(damping)
    A = exact + damping * np.eye(len(exact))
    b = np.random.default_rng(0).standard_normal((len(A), 3))
    want = np.linalg.solve(A, b)
    np.testing.assert_allclose(F.solve(b), want, rtol=0, atol=1e-6 * np.abs(want).max())
    assert F.logdet() == pytest.approx(np.linalg.slogdet(A)[1], rel=1e-8)


def test_factor_storage_grows_linearly():
    bytes_of = [
        gh.compress(low_rank_plus_diagonal(n, 4), rtol=1e-6, leaf_size=32).factorize().nbytes
        for n in (512, 1024, 2048)
    ]
    for small, large in itertools.pairwise(bytes_of):
        assert small < large < 2.2 * small


# --- samples ---------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
def test_sample_covariance(inverse: bool):
    """Of N samples z, E[z z^T] = C; its error has standard deviation |C|_F-like / sqrt(N)."""
    n, num = 60, 20000
    K = gh.compress(laplace(n, nugget=0.3), rtol=1e-8, leaf_size=8)
    F = K.factorize(0.2)
    A = K.to_dense() + 0.2 * np.eye(n)
    C = np.linalg.inv(A) if inverse else A
    z = F.sample(num, seed=3, inverse=inverse)
    assert z.shape == (n, num)
    deviation = np.sqrt((np.linalg.norm(C) ** 2 + np.trace(C) ** 2) / num)
    assert np.linalg.norm(z @ z.T / num - C) < 2 * deviation
    assert np.abs(z.mean(axis=1)).max() < 5 * np.sqrt(np.diagonal(C).max() / num)


def test_samples_are_seeded():
    F = gh.compress(toeplitz(90), leaf_size=10).factorize()
    np.testing.assert_array_equal(F.sample(4, seed=1), F.sample(4, seed=1))
    assert not np.array_equal(F.sample(4, seed=1), F.sample(4, seed=2))
    assert F.sample(1).shape == (90, 1)
    small = gh.compress(toeplitz(90).astype(np.float32), rtol=1e-3, leaf_size=10)
    assert small.factorize().sample(2).dtype == np.float32


def test_number_of_samples_and_seed_are_checked():
    F = gh.compress(toeplitz(20)).factorize()
    with pytest.raises(ArgumentError, match="num must be >= 1, got 0"):
        F.sample(0)
    with pytest.raises(ArgumentError, match="seed must be >= 0, got -1"):
        F.sample(1, seed=-1)


# --- the neighbours' problems ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "n", "leaf_size", "rtol"),
    [("hss", 1000, 100, 1e-12), ("hss", 1943, 123, 1e-7), ("hodlr", 1000, 100, 1e-12)],
)
def test_hodlrlibs_gaussian(scheme: str, n: int, leaf_size: int, rtol: float):
    """A 1-D Gaussian kernel with a nugget: product, solve, logdet and W W^T within N rtol."""
    points = np.sort(np.random.default_rng(n).uniform(-1, 1, n))
    op = gh.KernelOperator(points, "gaussian", 0.5**0.5, nugget=1.0)
    exact = dense_oracles.kernel_matrix(points, "gaussian", 0.5**0.5, 1.0)
    K = gh.compress(op, scheme, rtol=rtol, leaf_size=leaf_size)
    F = K.factorize()
    x = np.random.default_rng(0).standard_normal((n, 3))
    b = exact @ x
    tolerance = n * rtol
    assert np.linalg.norm(K @ x - b) <= tolerance * np.linalg.norm(b)
    assert np.linalg.norm(F.solve(b) - x) <= tolerance * np.linalg.norm(x)
    want = np.linalg.slogdet(exact)[1]
    assert abs(F.logdet() - want) <= tolerance * abs(want)
    back = F.sqrt_matmat(F.sqrt_matmat(x, transpose=True))
    assert np.linalg.norm(back - b) <= tolerance * np.linalg.norm(b)
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 3 * rtol


@pytest.mark.parametrize("n", [199, 200])
@pytest.mark.parametrize("place", [np.linspace, None], ids=["grid", "random"])
def test_georges_logdet(n: int, place: Callable[..., np.ndarray] | None):
    """george's HODLR solver is right at n = 199 and wrong at n = 200, where it first splits."""
    if place is None:
        points = np.sort(10 * np.random.default_rng(1234).random(n))
    else:
        points = place(0, 10, n)
    exact = dense_oracles.kernel_matrix(points, "gaussian", 1.0, 0.01)
    want = np.linalg.slogdet(exact)[1]
    op = gh.KernelOperator(points, "gaussian", 1.0, 0.01)
    for leaf_size in (100, 30):
        K = gh.compress(op, rtol=1e-12, leaf_size=leaf_size)
        assert K.tree.depth >= 1
        assert K.factorize().logdet() == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("n", [2, 3, 31, 97, 500])
@pytest.mark.parametrize("leaf_size", [1, 5, 64])
def test_small_and_prime_orders(n: int, leaf_size: int):
    exact = toeplitz(n)
    K = gh.compress(exact, rtol=1e-12, leaf_size=leaf_size)
    F = K.factorize()
    b = np.random.default_rng(n).standard_normal(n)
    np.testing.assert_allclose(F.solve(b), np.linalg.solve(exact, b), rtol=0, atol=1e-8)
    assert F.logdet() == pytest.approx(np.linalg.slogdet(exact)[1], rel=1e-9)


def test_rows_that_are_not_padding():
    """Of leaves, of pairs of skeletons of at most 2 rows, of the root from skeletons of one."""
    leaves = np.array([[0, 1, 2], [3, 4, -1], [5, 6, -1], [7, -1, -1]])
    counts = real_rows(leaves, [2, 1])
    assert [level.tolist() for level in counts] == [[3, 2, 2, 1], [4, 3], [2]]
