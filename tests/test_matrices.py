"""The test matrices of the GOFMM paper against oracles built another way, and their script."""

import math
import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scripts import script

import gpu_hodlr as gh
from gpu_hodlr import matrices
from gpu_hodlr.errors import ArgumentError, DtypeError

N = 300
KERNELS = ("K04", "K05", "K06", "K07", "K10")
# grids: how many points of at most 300
SHAPES = dict.fromkeys(matrices.NAMES, N) | {
    **dict.fromkeys(("K02", "K03", "K12", "K13", "K14", "K15", "K16"), 17**2),
    **dict.fromkeys(("K17", "K18"), 6**3),
}
LISTED = [*(f"K{i:02}" for i in range(2, 19) if i != 11), *(f"G{i:02}" for i in range(1, 6))]


def regularized(K: np.ndarray) -> np.ndarray:
    return K / np.mean(np.diag(K)) + 1e-5 * np.eye(len(K))


def close(found: gh.Operator, expected: np.ndarray, relative: float = 1e-11) -> bool:
    gap = np.abs(found.to_dense() - regularized(expected)).max()
    return bool(gap < relative * np.abs(expected / np.mean(np.diag(expected))).max())


def rank_of_half(name: str, n: int = 400, tolerance: float = 1e-4) -> float:
    """The numerical rank of the block that couples the two halves, per row of it."""
    K = matrices.matrix(name, n).to_dense()
    half = len(K) // 2
    s = np.linalg.svd(K[:half, half:], compute_uv=False)
    return float(np.mean(s > tolerance * s[0])) if s[0] else 0.0


def test_names():
    assert list(matrices.NAMES) == LISTED
    assert all(case.description for case in matrices.CASES.values())


@pytest.mark.parametrize("name", matrices.NAMES)
def test_every_matrix_is_symmetric_positive_definite(name: str, dtype: Any):
    operator = matrices.matrix(name, N, seed=3, dtype=dtype)
    assert isinstance(operator, gh.KernelOperator if name in KERNELS else gh.DenseOperator)
    assert operator.shape == (SHAPES[name],) * 2
    assert operator.dtype == dtype
    K = operator.to_dense()
    assert K.dtype == dtype
    # dense ones to the last bit; those formed when asked for, to the rounding of |x - y|^2
    rounding = 100 * np.finfo(dtype).eps if name in KERNELS else 0
    np.testing.assert_allclose(K, K.T, rtol=0, atol=rounding)
    assert np.linalg.eigvalsh(K.astype(np.float64))[0] > 5e-6
    assert np.mean(operator.diagonal()) == pytest.approx(1 + 1e-5, rel=1e-6)


@pytest.mark.parametrize("name", matrices.NAMES)
def test_the_seed_decides_every_bit(name: str):
    first, again, other = (matrices.matrix(name, 80, seed=s).to_dense() for s in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == (name in ("K02", "K03"))


@pytest.mark.parametrize("name", matrices.NAMES)
def test_the_least_size(name: str):
    assert matrices.matrix(name, 64).shape == (64, 64)
    with pytest.raises(ArgumentError, match="n must be >= 64, got 63"):
        matrices.matrix(name, 63)


@pytest.mark.parametrize(("n", "dimension"), [(64, 3), (63, 3), (26**3 - 1, 3), (16384, 2)])
def test_side_is_the_largest(n: int, dimension: int):
    k = matrices.side(n, dimension)
    assert k**dimension <= n < (k + 1) ** dimension


def test_bad_arguments():
    with pytest.raises(ArgumentError, match=r"one of K02, K03, .*, G05, got 'K11'"):
        matrices.matrix("K11", N)
    with pytest.raises(ArgumentError, match="seed must be >= 0"):
        matrices.matrix("K02", N, seed=-1)
    with pytest.raises(DtypeError, match="n must be an integer"):
        matrices.matrix("K02", 300.0)
    with pytest.raises(DtypeError, match="dtype must be float32 or float64"):
        matrices.matrix("K02", N, dtype=np.float16)


def test_too_much_memory_is_refused_before_it_is_taken():
    with pytest.raises(gh.errors.MemoryEstimateError, match="lower n"):
        matrices.matrix("G02", 10**8)


def dense_laplacian(k: int) -> np.ndarray:
    """h^2 times the 5-point Laplacian, entry by entry."""
    L = np.zeros((k * k, k * k))
    for x in range(k):
        for y in range(k):
            L[x * k + y, x * k + y] = 4
            for u, v in ((x + 1, y), (x, y + 1)):
                if u < k and v < k:
                    L[x * k + y, u * k + v] = L[u * k + v, x * k + y] = -1
    return L


def test_k02_is_the_inverse_of_a_dense_matrix():
    k = 15
    A = dense_laplacian(k) * (k + 1) ** 2 + np.eye(k * k)
    assert close(matrices.matrix("K02", k * k), np.linalg.inv(A @ A))


def test_k03_is_the_inverse_of_a_dense_matrix():
    k, w2 = 15, (2 * np.pi / 10) ** 2
    A = dense_laplacian(k) - (1 + 0.05j) * w2 * np.eye(k * k)
    assert close(matrices.matrix("K03", k * k), np.linalg.inv(A @ A.conj().T).real)


def test_k04_is_a_gaussian_of_points_in_the_cube():
    K = matrices.matrix("K04", N)
    assert K.points.shape == (N, 6)
    assert K.points.min() >= 0
    assert K.points.max() <= 1
    r = np.linalg.norm(K.points[3] - K.points[8])
    assert K.entries([3], [8])[0, 0] == pytest.approx(np.exp(-(r**2) / 8), rel=1e-12)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("K08", lambda x, y: (1 + sum(x * y)) ** 3),
        ("K09", lambda x, y: sum(x * y) / (math.hypot(*x) * math.hypot(*y))),
        ("K07", lambda x, y: 1 / (1 + math.dist(x, y) ** 2 / 4) ** 2),
    ],
)
def test_kernels_of_inner_products(name: str, kernel: Any):
    points = matrices.matrix("K04", 70, seed=2).points  # those of every kernel matrix
    expected = np.array([[kernel(x, y) for y in points] for x in points])
    assert close(matrices.matrix(name, 70, seed=2), expected)


def test_diffusion_by_a_loop_over_faces():
    k = 7
    a = np.random.default_rng(0).uniform(0.1, 10, (k, k))
    b = np.random.default_rng(1).uniform(-9, 9, (2, k, k))
    h = 1 / (k + 1)
    A = np.zeros((k, k, k, k))
    for x, y in np.ndindex(k, k):
        for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
            u, v = (x + step, y) if axis == 0 else (x, y + step)
            inside = 0 <= u < k and 0 <= v < k
            face = 2 / (1 / a[x, y] + 1 / a[u, v]) if inside else a[x, y]
            weight = face / h**2 + max(-step * b[axis, x, y], 0) / h
            A[x, y, x, y] += weight
            if inside:
                A[x, y, u, v] -= weight
    found = matrices.diffusion(a, list(b)).toarray()
    np.testing.assert_allclose(found, A.reshape(k * k, k * k), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["K12", "K13", "K14", "K18"])
def test_inverses_of_what_was_discretized(monkeypatch: pytest.MonkeyPatch, name: str):
    """K A^T A = I: one solve too few, or a transpose in the wrong place, shows."""
    kept: list[Any] = []
    true = matrices.diffusion
    monkeypatch.setattr(matrices, "diffusion", lambda *a: kept.append(true(*a)) or kept[0])
    K = matrices.matrix(name, 216)
    A = kept[0].toarray()
    assert np.allclose(A, A.T) == (name == "K18")
    assert close(K, np.linalg.inv(A.T @ A), 1e-7)


def test_k18_of_a_constant_coefficient_has_the_known_eigenvalues():
    k = 5
    A = matrices.diffusion(np.ones((k, k, k)), []).toarray()
    mu = (2 * (k + 1) * np.sin(np.pi * np.arange(1, k + 1) / (2 * (k + 1)))) ** 2
    expected = np.sort((mu[:, None, None] + mu[:, None] + mu).ravel())
    np.testing.assert_allclose(np.linalg.eigvalsh(A), expected, rtol=1e-12)


@pytest.mark.parametrize("k", [16, 17])
def test_differentiation_of_waves_is_exact(k: int):
    D = matrices.fourier_differentiation(k)
    x = 2 * np.pi * np.arange(k) / k
    np.testing.assert_allclose(D @ np.ones(k), 0, atol=1e-13)
    for m in range(1, 8):
        np.testing.assert_allclose(D @ np.sin(m * x + 1), m * np.cos(m * x + 1), atol=1e-12)


def test_pseudo_spectral_operator_of_waves_is_exact():
    """-div(a grad u) + b . grad u + c u by hand, for waves that the grid resolves."""
    k = 12
    x, y = np.meshgrid(*[2 * np.pi * np.arange(k) / k] * 2, indexing="ij")
    a, b, c = 2 + np.sin(x), [np.cos(y), np.sin(x + y)], 3 + np.cos(x)
    u, ux, uy = np.sin(2 * x + y), 2 * np.cos(2 * x + y), np.cos(2 * x + y)
    expected = a * 5 * u - np.cos(x) * ux + b[0] * ux + b[1] * uy + c * u
    A = matrices.pseudo_spectral_operator(a, b, c)
    np.testing.assert_allclose(A @ u.ravel(), expected.ravel(), atol=1e-11)


@pytest.mark.parametrize("name", ["K15", "K16", "K17"])
def test_pseudo_spectral_matrices_are_squares(monkeypatch: pytest.MonkeyPatch, name: str):
    kept: list[Any] = []
    true = matrices.pseudo_spectral_operator
    monkeypatch.setattr(
        matrices, "pseudo_spectral_operator", lambda *a: kept.append(true(*a)) or kept[0]
    )
    K = matrices.matrix(name, 700)  # more than one strip
    A = kept[0].toarray()
    assert close(K, A.T @ A)


@pytest.mark.parametrize("name", ["G01", "G02", "G03", "G04", "G05"])
def test_graphs_by_a_dense_inverse(name: str):
    n = 600  # more than one strip
    edges = matrices.CASES[name].build.keywords["edges"]
    pairs, weights = edges(n, np.random.default_rng(4))
    W = np.zeros((n, n))
    for (i, j), w in zip(pairs, weights, strict=True):
        W[i, j] = W[j, i] = w
    assert not np.diag(W).any()
    expected = np.linalg.inv(np.diag(W.sum(axis=1)) - W + 0.01 * np.eye(n))
    assert close(matrices.matrix(name, n, seed=4), expected)


def test_geometric_graphs_join_what_is_near():
    pairs, weights = matrices.geometric(
        500, np.random.default_rng(0), dimension=2, neighbours=20, width=0.5
    )
    points = np.random.default_rng(0).uniform(size=(500, 2))
    r = np.linalg.norm(points[:, None] - points, axis=2)
    radius = math.sqrt(20 / (500 * math.pi))
    i, j = np.nonzero(np.triu(r < radius, 1))
    assert {tuple(sorted(p)) for p in pairs.tolist()} == set(
        zip(i.tolist(), j.tolist(), strict=True)
    )
    np.testing.assert_allclose(weights, np.exp(-2 * (r[tuple(pairs.T)] / radius) ** 2))


def test_preferential_attachment_is_a_tree_with_hubs():
    n = 3000
    pairs, _ = matrices.preferential_attachment(n, np.random.default_rng(0))
    np.testing.assert_array_equal(pairs[:, 0], np.arange(1, n))
    assert (pairs[:, 1] < pairs[:, 0]).all()
    degrees = np.bincount(pairs.ravel())
    assert degrees.max() > 30
    assert np.mean(degrees == 1) == pytest.approx(2 / 3, abs=0.03)  # of the limit law


def test_which_compress_and_which_do_not():
    """Ranks at 1e-4 of the block between the halves, as shares of its order."""
    for name in ("K02", "K03", "K04", "K09", "K12", "K13", "K14"):
        assert rank_of_half(name) < 0.2, name
    for name in ("K06", "K15", "K16", "K17"):
        assert rank_of_half(name) > 0.6, name


def test_ranks_grow_as_the_gaussian_narrows():
    ranks = [rank_of_half(name) for name in ("K04", "K05", "K06")]
    assert all(2 * a < b or b > 0.9 for a, b in pairwise(ranks))


def test_script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["matrices.py", "K02", "K04", "--n", "100"])
    assert script("matrices").main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:3] for line in lines] == ["K02", "K04"]
    assert "N 100" in lines[0]
    monkeypatch.setattr(sys, "argv", ["matrices.py", "K11"])
    with pytest.raises(SystemExit):
        script("matrices").main()
    assert "name must be one of" in capsys.readouterr().err
