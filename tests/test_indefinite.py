"""HSS and HODLR of matrices that may be indefinite: storage, products, orderings, factors."""

import warnings
from collections.abc import Callable
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import products_only, toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.ordering import build_tree

N = 240


def shifted_kernel() -> np.ndarray:
    """Of points in the plane, in no order that knows of it."""
    points = np.random.default_rng(0).random((N, 2))
    return gh.KernelOperator(points, "matern32", 0.4).to_dense() - 0.5 * np.eye(N)


def random_symmetric() -> np.ndarray:
    """Eigenvalues of both signs that fall off."""
    rng = np.random.default_rng(1)
    Q = np.linalg.qr(rng.standard_normal((N, N)))[0]
    exact = (Q * (rng.choice([-1.0, 1.0], N) * 0.85 ** np.arange(N))) @ Q.T
    return (exact + exact.T) / 2


def saddle() -> np.ndarray:
    """[[A, B^T], [B, 0]] with smooth A and B: a minimum under constraints, row by row."""
    n = N // 2
    A, B = toeplitz(n) + np.eye(n), np.eye(n) - np.eye(n, k=1)
    exact = np.block([[A, B.T], [B, np.zeros((n, n))]])
    together = np.arange(N).reshape(2, n).T.ravel()  # a constraint beside its unknown
    return exact[np.ix_(together, together)]


def wave() -> np.ndarray:
    """The sine of a distance, as of a Helmholtz equation: blocks off the diagonal have rank two."""
    x = np.linspace(0, 1, N)
    return np.sin(25 * abs(x[:, None] - x))


MATRICES: dict[str, Callable[[], np.ndarray]] = {
    "kernel": shifted_kernel, "random": random_symmetric, "saddle": saddle, "wave": wave,
    "negative": lambda: -toeplitz(N),
}  # fmt: skip


@pytest.mark.parametrize("scheme", ["hss", "hodlr"])
@pytest.mark.parametrize("products", [False, True], ids=["entries", "products"])
@pytest.mark.parametrize("name", MATRICES)
def test_storage_products_and_factors(scheme: str, products: bool, name: str):
    exact = MATRICES[name]()
    op = (
        products_only(exact, definite=False)
        if products
        else gh.DenseOperator(exact, definite=False)
    )
    K = gh.compress(op, scheme, rtol=1e-7, leaf_size=30, max_rank=N)
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 3e-7
    v = np.random.default_rng(2).standard_normal((N, 3))
    np.testing.assert_allclose(K @ v, K.to_dense() @ v, rtol=0, atol=1e-10)
    assert K.report.nugget is None
    values = np.linalg.eigvalsh(K.to_dense())
    smallest, size = -values[0], np.abs(values).max()
    damping = 1.05 * smallest
    F, damped = K.factorize(damping), K.to_dense() + damping * np.eye(N)
    lost = 1e3 * 2.3e-16 * np.linalg.cond(damped)
    want = np.linalg.solve(damped, v)
    np.testing.assert_allclose(F.solve(v), want, rtol=0, atol=lost * np.abs(want).max())
    assert F.logdet() == pytest.approx(np.linalg.slogdet(damped)[1], abs=N * lost)
    for below in (0.0, 0.9 * smallest):
        with pytest.raises(NotPositiveDefiniteError, match="smallest eigenvalue about -") as caught:
            K.factorize(below)
        error = caught.value
        assert smallest < error.damping <= 1.08 * smallest + 1e-9 * size
        assert K.factorize(error.damping).verified()
        assert "definite = False" not in str(error)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        K.factorize(np.full(N, 0.5 * smallest))
    assert K.factorize(np.full(N, 0.5 * smallest) + caught.value.damping).verified()
    shifted = K.factorize(0.0, shift="auto")
    regular = np.linalg.cond(exact) < 1e6
    x, info = gh.minres(K, v, M=shifted, rtol=1e-8, maxiter=2000 if regular else 50)
    if regular:
        assert info.converged
        assert np.linalg.norm(K @ x - v) <= 1e-7 * np.linalg.norm(v)


@pytest.mark.parametrize("name", ["kernel", "saddle"])
def test_cg_hands_out_the_direction(name: str):
    exact = MATRICES[name]()
    for A in (gh.DenseOperator(exact, definite=False), products_only(exact, definite=False)):
        _, info = gh.cg(A, np.ones(N))
        assert not info.converged
        p = info.direction
        assert p @ exact @ p / (p @ p) == pytest.approx(info.curvature, rel=1e-8)
        assert info.curvature <= 0


@pytest.mark.parametrize("seed", range(3))
def test_auto_finds_an_order_that_no_one_gave(seed: int):
    """Of rows in random order: the natural one needs all ranks, columns that are alike belong
    together."""
    mixed = np.random.default_rng(seed).permutation(600)
    exact = (toeplitz(600) - 0.5 * np.eye(600))[np.ix_(mixed, mixed)]
    op = gh.DenseOperator(exact, definite=False)
    K = gh.compress(op, rtol=1e-3, leaf_size=40)
    assert K.report.ordering in ("gram", "angle")
    assert K.report.error <= 3e-3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        natural = gh.compress(op, rtol=1e-3, leaf_size=40, ordering="natural")
    assert K.storage_fraction < 0.7 * natural.storage_fraction


def test_auto_keeps_an_order_that_is_good():
    op = gh.DenseOperator(wave(), definite=False)
    assert gh.compress(op, rtol=1e-6, leaf_size=30).report.ordering == "natural"


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_the_order_is_one_of_the_columns(scale: float):
    """Rows with equal columns share a leaf, whatever their sign and size of all."""
    rng = np.random.default_rng(3)
    kinds = rng.permutation(np.repeat(np.arange(4), 16))
    core = rng.standard_normal((4, 4))
    exact = scale * (core + core.T)[np.ix_(kinds, kinds)]
    op = gh.DenseOperator(exact, definite=False)
    tree, used = build_tree(op, "gram", 16, 0, 0.0)
    assert used == "gram"
    for leaf in tree.leaves:
        assert len(set(kinds[leaf])) == 1


def test_the_order_does_not_depend_on_the_ranks():
    op = gh.DenseOperator(shifted_kernel(), definite=False)
    alone = build_tree(op, "gram", 20, 5, 0.0)[0].leaves
    for size in (2, 3):
        for tree, _ in on_threads(
            size, lambda comm: build_tree(op, "gram", 20, 5, 0.0, None, comm)
        ):
            np.testing.assert_array_equal(tree.leaves, alone)


@pytest.mark.parametrize("scheme", ["hss", "hodlr"])
def test_ranks(scheme: str):
    exact = random_symmetric()
    op = gh.DenseOperator(exact, definite=False)
    options: dict[str, Any] = {"scheme": scheme, "rtol": 1e-8, "leaf_size": 30, "max_rank": N}
    alone = gh.compress(op, **options)
    v = np.ones(N)

    def spread(comm: Any) -> Any:
        K = gh.compress(op, **options, comm=comm)
        try:
            K.factorize(0.5)
        except NotPositiveDefiniteError as error:
            return K.report.ordering, K.ranks, K @ v, K.factorize(1.2).solve(v), error.damping
        return None

    want = alone.factorize(1.2).solve(v)
    for size in (2, 3):
        results = on_threads(size, spread)
        for ordering, ranks, product, solution, damping in results:
            assert (ordering, ranks) == (alone.report.ordering, alone.ranks)
            np.testing.assert_allclose(product, alone @ v, rtol=0, atol=1e-10)
            np.testing.assert_allclose(solution, want, rtol=0, atol=1e-9)
            assert damping == results[0][-1]
