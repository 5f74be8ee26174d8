"""Kernel matrices: length scales, variances, noise of every row, more kernels, predictions."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from scipy.spatial.distance import cdist

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, GpuHodlrError, ShapeError
from gpu_hodlr.interactions import nearest_neighbours

N = 60
RNG = np.random.default_rng(4)
POINTS = RNG.standard_normal((N, 3))
LENGTHS = np.array([0.5, 2.0, 1.0])
NOISE = RNG.random(N)


def periodic(x: np.ndarray, y: np.ndarray, lengths: Any, periods: Any) -> np.ndarray:
    """From sines, a product over the coordinates."""
    sines = np.sin(np.pi * (x[:, None] - y) / periods) / lengths
    return np.exp(-2 * (sines**2).sum(axis=2))


def test_length_scales_variance_and_noise(xp: ModuleType, dtype: Any):
    for kernel in ("gaussian", "matern32", "spherical", "inverse_multiquadric"):
        op = gh.KernelOperator(
            xp.asarray(POINTS.astype(dtype)), kernel, LENGTHS, xp.asarray(NOISE.astype(dtype)),
            variance=2.5,
        )  # fmt: skip
        want = 2.5 * dense_oracles.kernel_matrix(POINTS / LENGTHS, kernel) + np.diag(NOISE)
        gh.testing.check_operator(op, want)
        np.testing.assert_allclose(to_host(op.to_dense()), want, atol=60 * np.finfo(dtype).eps)


@pytest.mark.parametrize(
    "lengthscale", [[0.5, 2, 1.0], (0.5, 2.0, 1.0), LENGTHS, LENGTHS.astype(np.float32)]
)
def test_length_scales_are_lists_too(lengthscale: Any):
    op = gh.KernelOperator(POINTS, "rbf", lengthscale)
    assert op.kernel == "gaussian"
    np.testing.assert_array_equal(op.lengthscale, LENGTHS)
    want = dense_oracles.kernel_matrix(POINTS / LENGTHS, "gaussian")
    np.testing.assert_allclose(op.to_dense(), want, atol=1e-13)


def test_numbers_may_be_arrays_without_axes():
    torch = pytest.importorskip("torch")
    want = gh.KernelOperator(POINTS, "laplace", 0.5, 0.25).to_dense()
    for half, quarter in ((torch.tensor(0.5), torch.tensor(0.25)), (np.array(0.5), np.array(0.25))):
        got = gh.KernelOperator(POINTS, "matern12", half, quarter)
        assert (got.lengthscale, got.nugget) == (0.5, 0.25)
        np.testing.assert_array_equal(got.to_dense(), want)


def test_alpha_of_the_rational_quadratic(xp: ModuleType):
    for alpha in (0.3, 2.0, 50.0):
        op = gh.KernelOperator(xp.asarray(POINTS), "rational_quadratic", alpha=alpha)
        want = dense_oracles.kernel_matrix(POINTS, "rational_quadratic", alpha=alpha)
        np.testing.assert_allclose(to_host(op.to_dense()), want, atol=1e-13)


def test_periodic_on_a_line_is_exp_sine_squared(xp: ModuleType, dtype: Any):
    """scikit-learn's: exp(-2 sin^2(pi |x - y| / p) / l^2)."""
    t = np.linspace(0, 20, 200).astype(dtype)
    op = gh.KernelOperator(xp.asarray(t), "periodic", 0.7, period=1.3)
    r = np.abs(t[:, None].astype(np.float64) - t)
    want = np.exp(-2 * (np.sin(np.pi * r / 1.3) / 0.7) ** 2)
    np.testing.assert_allclose(to_host(op.to_dense()), want, atol=30 * np.finfo(dtype).eps)


def test_periodic_in_more_dimensions_is_positive_definite():
    """That of the distance is not: its smallest eigenvalue is -62 on this grid."""
    r = np.linspace(0, 1, 16)
    grid = np.stack(np.meshgrid(r, r), -1).reshape(-1, 2)
    of_distance = np.exp(-2 * np.sin(np.pi * cdist(grid, grid)) ** 2)
    assert np.linalg.eigvalsh(of_distance)[0] < -1
    op = gh.KernelOperator(grid, "periodic", [1.0, 2.0], period=[1.0, 3.0])
    want = periodic(grid, grid, [1.0, 2.0], [1.0, 3.0])
    np.testing.assert_allclose(op.to_dense(), want, atol=1e-13)
    assert np.linalg.eigvalsh(want)[0] > -1e-12


def test_periodic_points_are_neighbours_across_periods():
    t = np.sort(RNG.random(500) * 20)
    op = gh.KernelOperator(t, "periodic", 0.3, 1e-2)
    found = nearest_neighbours(op, 5, 0).index
    phase = np.abs((t[found] - t[:, None] + 0.5) % 1 - 0.5)
    assert phase.max() < 0.03
    K = gh.compress(op, rtol=1e-9, leaf_size=32)
    assert K.report.ordering == "geometric"
    want = periodic(t[:, None], t[:, None], 0.3, 1.0) + 1e-2 * np.eye(500)
    assert dense_oracles.frobenius_error(K.to_dense(), want) < 3e-9
    np.testing.assert_allclose(K.factorize().logdet(), np.linalg.slogdet(want)[1], rtol=1e-6)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_spherical_is_definite_in_up_to_three_dimensions(d: int):
    points = np.random.default_rng(d).random((200, d))
    op = gh.KernelOperator(points, "spherical", 0.6)
    assert op.definite
    assert np.linalg.eigvalsh(op.to_dense())[0] > 0


# --- a function of the user's


def wendland(r: Any) -> Any:
    """(1 - r)^4 (4 r + 1) for r < 1, by operators alone, as any library has them."""
    inside = (1 - r) * (r < 1)
    return inside**4 * (4 * r + 1)


def test_own_kernel(xp: ModuleType, dtype: Any):
    op = gh.KernelOperator(
        xp.asarray(POINTS.astype(dtype)), wendland, 3 * LENGTHS, xp.asarray(NOISE.astype(dtype)),
        variance=2.0,
    )  # fmt: skip
    want = 2 * wendland(cdist(POINTS / LENGTHS, POINTS / LENGTHS) / 3) + np.diag(NOISE)
    gh.testing.check_operator(op, want)
    assert op.kernel == "own"
    cross = op.cross(xp.asarray(POINTS[:4].astype(dtype)))
    want = 2 * wendland(cdist(POINTS[:4] / LENGTHS, POINTS / LENGTHS) / 3)
    np.testing.assert_allclose(to_host(cross.to_dense()), want, atol=30 * np.finfo(dtype).eps)


def test_own_kernel_may_be_indefinite():
    op = gh.KernelOperator(POINTS, lambda r: -r, definite=False)
    assert "indefinite" in repr(op)
    np.testing.assert_allclose(op.to_dense(), -cdist(POINTS, POINTS), atol=1e-13)
    np.testing.assert_array_equal(op.diagonal(), 0)
    K = gh.compress(op, "lowrank", rtol=1e-6)
    np.testing.assert_allclose(K.to_dense(), op.to_dense(), atol=1e-4)
    assert np.linalg.eigvalsh(K.to_dense())[0] < -1


@pytest.mark.parametrize(
    ("kind", "kernel", "words"),
    [
        (ArgumentError, lambda r: r**2 * np.log(np.where(r > 0, r, np.nan)), "kernel.*NaN"),
        (ShapeError, lambda r: r[0], "kernel must give shape"),
        (DtypeError, lambda r: 1.0, "kernel"),
        (DtypeError, lambda r: r > 0, "kernel.*bool"),
    ],
)
def test_own_kernel_gives_something_else(kind: type[GpuHodlrError], kernel: Any, words: str):
    with pytest.raises(kind, match=words):
        gh.KernelOperator(POINTS, kernel).to_dense()


# --- where the points are


@pytest.mark.parametrize("offset", [0.0, 4e6])
def test_map_coordinates_in_float32(xp: ModuleType, offset: float):
    """UTM metres: what float32 still tells is not lost to a second rounding."""
    metres = offset + np.random.default_rng(0).integers(0, 120, (80, 2)) / 4
    points = metres.astype(np.float32)
    np.testing.assert_array_equal(points, metres)  # quarters of a metre are there
    op = gh.KernelOperator(xp.asarray(points), "gaussian", 5.3)
    want = dense_oracles.kernel_matrix(metres - offset, "gaussian", 5.3)
    np.testing.assert_allclose(to_host(op.to_dense()), want, atol=1e-6)
    new = xp.asarray(points[:5])
    np.testing.assert_allclose(to_host(op.cross(new).to_dense()), want[:5], atol=1e-6)


def test_float32_matrix_of_float64_points(xp: ModuleType):
    """Julian dates, whose float32 is a quarter of a day."""
    t = 2458899.75295227 + 0.00697187 * np.arange(300)
    op = gh.KernelOperator(xp.asarray(t), "matern32", 0.05, dtype="float32")
    assert op.dtype == np.float32
    want = dense_oracles.kernel_matrix(t - t[0], "matern32", 0.05)
    np.testing.assert_allclose(to_host(op.to_dense()), want, atol=2e-5)


def test_the_origin_costs_no_digit():
    """Points about 0 stay where they are: those near it are known to more digits."""
    t = np.array([-1e6, 0.0, 1e-3, 2e-3, 1e6], np.float32)
    op = gh.KernelOperator(t, "laplace", 1e-3)
    np.testing.assert_allclose(op.entries([1], [2, 3]), np.exp([[-1.0, -2.0]]), rtol=1e-5)


def test_points_and_noise_are_copied(xp: ModuleType):
    points, noise, lengths = POINTS.copy(), NOISE.copy(), LENGTHS.copy()
    x, s = xp.asarray(points), xp.asarray(noise)
    op = gh.KernelOperator(x, "gaussian", lengths, s)
    function = gh.FunctionOperator(N, matmat=lambda v: v, points=points)
    before = to_host(op.to_dense()).copy()
    x[:] = 0
    s[:] = 7
    points[:], lengths[:] = 0, 1
    np.testing.assert_array_equal(to_host(op.to_dense()), before)
    np.testing.assert_array_equal(to_host(op.points), POINTS)
    np.testing.assert_array_equal(function.points, POINTS)


def test_orderings_and_neighbours_go_by_length_scales():
    """The first coordinate is long and hardly counts."""
    rng = np.random.default_rng(1000)
    points = rng.standard_normal((400, 2)) * [5000, 1e-3]
    op = gh.KernelOperator(points, "laplace", [5e6, 1e-3])
    found = nearest_neighbours(op, 2, 0).index
    order = points[:, 1].argsort()
    beside = np.abs(order.argsort()[found] - order.argsort()[:, None])
    assert np.median(beside) <= 2
    by_lengths = gh.compress(op, rtol=1e-3, leaf_size=32)
    assert max(max(level) for level in by_lengths.ranks) < 10


# --- right values of public cases, smaller


def test_log_marginal_likelihood_with_two_length_scales():
    """scikit-learn's of ConstantKernel(2.5) * RBF([5000, 1e-3]) + WhiteKernel(0.1)."""
    rng = np.random.default_rng(1000)
    points = np.c_[rng.standard_normal(1500) * 5000, rng.standard_normal(1500) * 1e-3]
    y = rng.standard_normal(1500)
    op = gh.KernelOperator(points, "rbf", [5000.0, 1e-3], 0.1, variance=2.5)
    K = gh.compress(op, rtol=1e-8)
    assert K.report.ordering == "geometric"
    F = K.factorize()
    value = -0.5 * (y @ F.solve(y) + F.logdet() + 1500 * np.log(2 * np.pi))
    np.testing.assert_allclose(value, -6958.6539, atol=2e-3)


def test_noise_of_every_row():
    rng = np.random.default_rng(0)
    t = np.sort(rng.random(2000) * 100)
    noise = 0.05 + 0.3 * rng.random(2000)
    op = gh.KernelOperator(t, "matern32", 3.0, noise**2)
    F = gh.compress(op, rtol=1e-8).factorize()
    np.testing.assert_allclose(F.logdet(), -6288.0055931, atol=1e-5)


def spline(points: np.ndarray) -> Callable[..., Any]:
    """r^2 log(r), the thin plate spline, which is not definite."""

    def entries(rows: Any, cols: Any) -> Any:
        squared = ((points[rows][:, None] - points[cols]) ** 2).sum(axis=-1)
        return 0.5 * squared * np.log(np.where(squared > 0, squared, 1))

    return entries


def test_own_entries_with_points():
    """With its coordinates a spline is compressed in their order; without, in none that helps."""
    points = np.random.default_rng(0).random((1000, 2))
    entries = spline(points)
    given = {"entries": entries, "definite": False}
    exact = entries(np.arange(1000), np.arange(1000))
    with_points = gh.compress(
        gh.FunctionOperator(1000, **given, points=points), rtol=1e-6, leaf_size=64
    )
    assert with_points.report.ordering == "geometric"
    assert dense_oracles.frobenius_error(with_points.to_dense(), exact) < 3e-6
    without = gh.compress(
        gh.FunctionOperator(1000, **given), rtol=1e-6, leaf_size=64, max_rank=1000
    )
    assert with_points.storage_fraction < 0.5 * without.storage_fraction


def test_points_beside_products_alone():
    points = np.random.default_rng(0).random(200)
    dense = dense_oracles.kernel_matrix(points, "laplace", 0.3)
    op = gh.FunctionOperator(200, matmat=lambda v: dense @ v, points=points)
    assert op.points is not None
    assert op.points.shape == (200, 1)
    K = gh.compress(op, rtol=1e-8, leaf_size=16)
    assert (K.report.ordering, max(map(max, K.ranks))) == ("geometric", 2)
    assert dense_oracles.frobenius_error(K.to_dense(), dense) < 1e-8


# --- predictions


def test_cross_products(xp: ModuleType, dtype: Any):
    new = RNG.standard_normal((17, 3))
    op = gh.KernelOperator(
        xp.asarray(POINTS.astype(dtype)), "matern52", LENGTHS, xp.asarray(NOISE.astype(dtype)),
        variance=2.0,
    )  # fmt: skip
    want = 2 * dense_oracles.kernel_matrix(POINTS / LENGTHS, "matern52", others=new / LENGTHS).T
    C = op.cross(xp.asarray(new.astype(dtype)))
    assert (C.shape, C.T.shape, C.T.T.shape) == ((17, N), (N, 17), (17, N))
    assert (C.dtype, C.device) == (dtype, op.device)
    tight = {"atol": 500 * np.finfo(dtype).eps}
    np.testing.assert_allclose(to_host(C.to_dense()), want, **tight)
    np.testing.assert_allclose(to_host(C.T.to_dense()), want.T, **tight)
    v, w = RNG.standard_normal((N, 4)).astype(dtype), RNG.standard_normal((17, 4)).astype(dtype)
    v_, w_ = xp.asarray(v), xp.asarray(w)
    for got, exact in (
        (C @ v_, want @ v), (C.matvec(v_[:, 0]), want @ v[:, 0]), (C.T @ w_, want.T @ w),
        (C.rmatmat(w_), want.T @ w), (C.rmatvec(w_[:, 1]), want.T @ w[:, 1]),
        (C.__rmatmul__(w_.T), w.T @ want), (C.T.__rmatmul__(v_[:, 0]), want @ v[:, 0]),
    ):  # fmt: skip
        assert got.dtype == dtype
        np.testing.assert_allclose(to_host(got), exact, **tight)
    np.testing.assert_allclose(to_host(C.entries([16, 0], [3])), want[[16, 0]][:, [3]], **tight)
    batch = to_host(C.entries([[1], [2]], [[5, 6], [7, 8]]))
    np.testing.assert_allclose(batch[1], want[2:3, 7:9], **tight)


def test_cross_of_many_strips_and_of_none():
    rng = np.random.default_rng(2)
    points, new = rng.random((1100, 2)), rng.random((600, 2))
    op = gh.KernelOperator(points, "laplace", 0.3)
    want = dense_oracles.kernel_matrix(new, "laplace", 0.3, others=points)
    v = rng.standard_normal((1100, 3))
    np.testing.assert_allclose(op.cross(new) @ v, want @ v, atol=1e-11)
    np.testing.assert_allclose(op.cross(new).T @ v[:600], want.T @ v[:600], atol=1e-11)
    assert (op.cross(new[:0]) @ v).shape == (0, 3)


@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_predictive_variances(noise: float):
    """None below zero where the compression is exact against the noise."""
    rng = np.random.default_rng(0)
    points, new = rng.random((700, 2)), rng.random((50, 2))
    op = gh.KernelOperator(points, "matern32", 0.2, noise)
    k = dense_oracles.kernel_matrix(new, "matern32", 0.2, others=points).T
    exact = 1 - (k * np.linalg.solve(op.to_dense(), k)).sum(axis=0)
    across = op.cross(new).T.to_dense()
    F = gh.compress(op, rtol=1e-9, leaf_size=64).factorize()
    found = 1 - (across * F.solve(across)).sum(axis=0)
    np.testing.assert_allclose(found, exact, rtol=1e-4)
    assert (found > 0).all()


def test_predictions_are_of_the_points_where_they_are():
    """The new points may lie outside the box of the old ones, and far from the origin."""
    t = np.linspace(1e6, 1e6 + 3, 40)
    op = gh.KernelOperator(t, "periodic", 0.8, period=1.7)
    new = np.array([1e6 - 5.0, 1e6 + 9.25])
    want = periodic(new[:, None] - 1e6, t[:, None] - 1e6, 0.8, 1.7)
    np.testing.assert_allclose(op.cross(new).to_dense(), want, atol=1e-8)


def test_cross_with_torch_and_scipy():
    torch = pytest.importorskip("torch")
    C = gh.KernelOperator(POINTS).cross(POINTS[:5])
    v = RNG.standard_normal((N, 2))
    got = C @ torch.from_numpy(v)
    assert isinstance(got, torch.Tensor)
    np.testing.assert_array_equal(got.numpy(), C @ v)
    np.testing.assert_array_equal(v[:5].T @ C, (C.T @ v[:5]).T)
    np.testing.assert_allclose(C.to_scipy().T @ v[:5], C.T @ v[:5])


@pytest.mark.parametrize(
    ("kind", "ask", "words"),
    [
        (ShapeError, lambda op: op.cross(POINTS[:, :2]), r"new_points.*\(M, 3\).*\(60, 2\)"),
        (DtypeError, lambda op: op.cross([[1.0, 2.0, 3.0]]), "new_points.*list"),
        (ArgumentError, lambda op: op.cross(POINTS * np.nan), "new_points.*NaN"),
        (ArgumentError, lambda op: op.cross(POINTS * 1e200), "new_points.*length scales"),
        (ShapeError, lambda op: op.cross(POINTS[:2]) @ np.ones(2), r"\(60,\)"),
        (ArgumentError, lambda op: op.cross(POINTS[:2]).entries([2], [0]), "rows.*0 .. 1"),
        (DtypeError, lambda op: op.cross(POINTS[:2]).entries([0.5], [0]), "rows.*float"),
    ],
)
def test_bad_cross(kind: type[GpuHodlrError], ask: Callable[[gh.KernelOperator], Any], words: str):
    with pytest.raises(kind, match=words):
        ask(gh.KernelOperator(POINTS))


# --- what is refused

BAD: dict[str, tuple[type[GpuHodlrError], dict[str, Any], str]] = {
    "two lengths of three": (ShapeError, {"lengthscale": [1.0, 2.0]}, r"lengthscale.*\(3,\).*\(2,"),
    "a length of 0": (ArgumentError, {"lengthscale": [1.0, 0.0, 1.0]}, "lengthscale.*> 0"),
    "lengths of text": (DtypeError, {"lengthscale": ["a", "b", "c"]}, "lengthscale.*str"),
    "a table of lengths": (ShapeError, {"lengthscale": np.ones((3, 1))}, r"lengthscale.*\(3, 1\)"),
    "noise of too few": (ShapeError, {"nugget": NOISE[:5]}, r"nugget.*\(60,\).*\(5,\)"),
    "negative noise": (ArgumentError, {"nugget": NOISE - 0.5}, "nugget.*>= 0"),
    "noise NaN": (ArgumentError, {"nugget": NOISE * np.nan}, "nugget.*NaN"),
    "noise of integers": (DtypeError, {"nugget": np.ones(N, int)}, "nugget.*int64"),
    "variance 0": (ArgumentError, {"variance": 0.0}, "variance.*> 0"),
    "alpha of another": (ArgumentError, {"alpha": 1.0}, "alpha.*rational_quadratic.*gaussian"),
    "period of another": (ArgumentError, {"period": 1.0}, "period.*'periodic'.*gaussian"),
    "alpha 0": (ArgumentError, {"kernel": "rational_quadratic", "alpha": 0.0}, "alpha.*> 0"),
    "period < 0": (ArgumentError, {"kernel": "periodic", "period": -1.0}, "period.*> 0"),
    "spherical in 4-D": (
        ArgumentError,
        {"points": np.ones((9, 4)), "kernel": "spherical"},
        "spherical.*up to 3 dimensions.*4",
    ),
    "dtype": (DtypeError, {"dtype": "int32"}, "dtype.*int32"),
}


@pytest.mark.parametrize(("kind", "arguments", "words"), BAD.values(), ids=BAD)
def test_refused(kind: type[GpuHodlrError], arguments: dict[str, Any], words: str):
    with pytest.raises(kind, match=words):
        gh.KernelOperator(**{"points": POINTS, **arguments})


@pytest.mark.parametrize(
    ("kind", "points", "words"),
    [
        (ShapeError, POINTS[:9], r"points.*\(60, d\).*\(9, 3\)"),
        (DtypeError, [[0.0]] * N, "points.*list"),
        (DtypeError, np.arange(N), "points.*int"),
        (ArgumentError, POINTS * np.inf, "points.*infinite"),
    ],
)
def test_refused_points_of_functions(kind: type[GpuHodlrError], points: Any, words: str):
    with pytest.raises(kind, match=words):
        gh.FunctionOperator(N, matmat=lambda v: v, points=points)


def test_points_on_another_device(cupy: ModuleType):
    """Nothing is copied between devices in silence."""
    op = gh.KernelOperator(cupy.asarray(POINTS))
    with pytest.raises(DeviceError, match=r"new_points.*cpu.*cuda"):
        op.cross(POINTS)
    with pytest.raises(DeviceError, match=r"nugget.*cpu.*cuda"):
        gh.KernelOperator(cupy.asarray(POINTS), nugget=NOISE)
    with pytest.raises(DeviceError, match=r"points.*cuda.*cpu"):
        gh.FunctionOperator(N, matmat=lambda v: v, points=cupy.asarray(POINTS))
    moved = gh.KernelOperator(POINTS, "laplace", LENGTHS, NOISE).to("cuda")
    back = moved.to("cpu")
    assert (moved.device, back.device) == ("cuda", "cpu")
    np.testing.assert_array_equal(back.nugget, NOISE)
    np.testing.assert_allclose(to_host(moved.to_dense()), back.to_dense(), atol=1e-13)
