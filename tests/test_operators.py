"""Dense, kernel and function operators against dense matrices."""

from collections.abc import Callable
from typing import Any

import dense_oracles
import numpy as np
import pytest

import gpu_hodlr as gh
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.testing import check_operator

KERNELS = (
    "gaussian", "laplace", "matern32", "matern52", "rational_quadratic", "inverse_multiquadric",
)  # fmt: skip


def close(got: Any, want: np.ndarray, factor: float = 1.0) -> None:
    """Same dtype and shape, equal to rounding relative to the largest entry."""
    got = np.asarray(got)
    assert got.shape == want.shape
    eps = float(np.finfo(got.dtype).eps)
    allowed = factor * 100 * eps * np.abs(want).max(initial=0.0)
    np.testing.assert_allclose(got, want, rtol=0, atol=allowed)


def check(op: gh.Operator, want: np.ndarray, entries: bool = True) -> None:
    """Everything an operator offers, in every shape, agrees with a dense matrix."""
    n = len(want)
    op.definite = bool(np.linalg.eigvalsh(want)[0] > -1e-10)
    check_operator(op, want)
    assert op.shape == (n, n)
    assert op.device == "cpu"
    rng = np.random.default_rng(0)
    v = rng.standard_normal((n, 4)).astype(op.dtype)
    exact = want @ v.astype(np.float64)
    factor = max(10.0, n**0.5)
    for product in (op.matmat(v), op @ v, op.matmat(np.asfortranarray(v))):
        assert product.dtype == op.dtype
        close(product, exact, factor)
    close(op @ v[:, 1], exact[:, 1], factor)
    close(op @ v[:, 1:2], exact[:, 1:2], factor)
    assert op.matmat(np.zeros((n, 0), op.dtype)).shape == (n, 0)
    close(op.diagonal(), np.diagonal(want))
    dense = op.to_dense()
    assert dense.dtype == op.dtype
    close(dense, want)
    if not entries:
        return
    rows, cols = rng.integers(n, size=n // 2), rng.permutation(n)[: n // 3 + 1]
    close(op.entries(rows, cols), want[np.ix_(rows, cols)])
    close(op.entries(rows.tolist(), cols.tolist()), want[np.ix_(rows, cols)])
    many_rows, many_cols = rng.integers(n, size=(3, 5)), rng.integers(n, size=(3, 2))
    blocks = op.entries(many_rows, many_cols)
    for block, r, c in zip(blocks, many_rows, many_cols, strict=True):
        close(block, want[np.ix_(r, c)])
    assert op.entries(np.array([], int), np.array([0])).shape == (0, 1)


def symmetric(n: int, dtype: Any = np.float64) -> np.ndarray:
    a = np.random.default_rng(n).standard_normal((n, n))
    return (a + a.T).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [2, 3, 100, 700])
def test_dense(n: int, dtype: Any):
    a = symmetric(n, dtype)
    op = gh.DenseOperator(a)
    assert op.dtype == dtype
    check(op, a)


@pytest.mark.parametrize("layout", ["F", "strided", "reversed"])
def test_dense_layouts(layout: str):
    a = symmetric(40)
    given = {
        "F": np.asfortranarray(a),
        "strided": np.repeat(np.repeat(a, 2, axis=0), 3, axis=1)[::2, ::3],
        "reversed": a[::-1, ::-1].copy()[::-1, ::-1],
    }[layout]
    check(gh.DenseOperator(given), a)


def test_dense_is_not_copied():
    a = symmetric(10)
    assert gh.DenseOperator(a).array is a


def test_dense_allows_rounding_in_the_symmetry():
    a = symmetric(50)
    a[3, 7] *= 1 + 1e-15
    check(gh.DenseOperator(a), symmetric(50))


def test_dense_from_torch():
    torch = pytest.importorskip("torch")
    a = symmetric(30)
    op = gh.DenseOperator(torch.from_numpy(a).requires_grad_())
    check(op, a)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("nugget", [0.0, 0.5])
@pytest.mark.parametrize("dimension", [1, 3, 20])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel(kernel: str, dimension: int, nugget: float, dtype: Any):
    points = np.random.default_rng(3).standard_normal((60, dimension)).astype(dtype)
    scale = 0.8 * dimension**0.5
    op = gh.KernelOperator(points, kernel, lengthscale=scale, nugget=nugget)
    assert op.dtype == dtype
    check(op, dense_oracles.kernel_matrix(points, kernel, scale, nugget))


def test_kernel_products_of_several_strips():
    points = np.random.default_rng(3).random((1100, 2))
    op = gh.KernelOperator(points, "matern32", lengthscale=0.3, nugget=0.1)
    check(op, dense_oracles.kernel_matrix(points, "matern32", 0.3, 0.1))


def test_kernel_of_points_on_a_line():
    points = np.linspace(0, 3, 50)
    op = gh.KernelOperator(points, "laplace")
    assert op.points.shape == (50, 1)
    check(op, dense_oracles.kernel_matrix(points, "laplace"))


@pytest.mark.parametrize("dimension", [2, 20])
@pytest.mark.parametrize("kernel", KERNELS)
def test_coincident_points(kernel: str, dimension: int):
    """k(0) = 1 off the diagonal too; the nugget goes on the diagonal alone."""
    points = np.ones((6, dimension))
    points[3:] += np.arange(3)[:, None]
    dense = gh.KernelOperator(points, kernel, nugget=2.0).to_dense()
    close(dense, dense_oracles.kernel_matrix(points, kernel, 1.0, 2.0))


@pytest.mark.parametrize("dimension", [2, 20])
def test_kernel_far_from_the_origin(dimension: int):
    """Distances do not suffer from a large common offset."""
    rng = np.random.default_rng(0)
    points = rng.integers(0, 5, size=(30, dimension)).astype(float)
    op = gh.KernelOperator(points + 2.0**20, "matern52", lengthscale=4.0)
    np.testing.assert_allclose(
        op.to_dense(),
        dense_oracles.kernel_matrix(points, "matern52", 4.0),
        rtol=0,
        atol=1e-12,
    )


def test_kernel_extremes():
    """Distances whose squares vanish give 1, huge ones 0 (or a power), never NaN."""
    points = np.array([0.0, 1e-300, 1.0, 1e150])
    for kernel in KERNELS:
        dense = gh.KernelOperator(points, kernel, lengthscale=1e-3).to_dense()
        np.testing.assert_array_equal(dense[:2, :2], 1)
        limit = {"rational_quadratic": 1.6e-11, "inverse_multiquadric": 1e-3}.get(kernel, 0.0)
        np.testing.assert_allclose(dense[:2, 2:], [[limit, 0]] * 2, rtol=1e-5, atol=1e-150)


def function_operator(
    a: np.ndarray, matmat: bool, entries: bool, diagonal: bool, **options: Any
) -> gh.FunctionOperator:
    return gh.FunctionOperator(
        len(a),
        matmat=(lambda v: a @ v) if matmat else None,
        entries=(lambda r, c: a[np.ix_(r, c)]) if entries else None,
        diagonal=(lambda: np.diagonal(a)) if diagonal else None,
        **options,
    )


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("matmat", "entries"), [(True, False), (False, True), (True, True)])
def test_function(matmat: bool, entries: bool, diagonal: bool):
    a = symmetric(40)
    op = function_operator(a, matmat, entries, diagonal)
    assert (op.has_products, op.has_entries) == (matmat, entries)
    check(op, a, entries)


def test_function_results_are_converted():
    """float64 results of a float32 operator, and torch results."""
    a = symmetric(20)
    op = function_operator(a, True, True, True, dtype=np.float32)
    assert op.dtype == np.float32
    check(op, a)
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(a)
    check(
        gh.FunctionOperator(
            20,
            matmat=lambda v: tensor @ torch.from_numpy(v),
            entries=lambda r, c: tensor[torch.from_numpy(r)][:, torch.from_numpy(c)],
        ),
        a,
    )


def test_function_never_sees_padding():
    a = symmetric(10)
    seen: list[int] = []

    def entries(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        seen.extend(rows.tolist() + cols.tolist())
        return a[np.ix_(rows, cols)]

    op = gh.FunctionOperator(10, entries=entries)
    block = op.reader.blocks(np.array([[3, -1, 2]]), np.array([[-1, 5]]))[0]
    np.testing.assert_array_equal(block, [[0, a[3, 5]], [0, 0], [0, a[2, 5]]])
    assert sorted(set(seen)) == [2, 3, 5]


def test_function_operator_without_entries_says_so():
    op = function_operator(symmetric(5), True, False, False)
    with pytest.raises(ArgumentError, match="no entries, only"):
        op.entries([0], [1])


OPERATORS: dict[str, Callable[[np.ndarray], gh.Operator]] = {
    "dense": gh.DenseOperator,
    "function": lambda a: function_operator(a, True, True, False, dtype=a.dtype),
}


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
def test_torch_in_torch_out(make: Callable[[np.ndarray], gh.Operator]):
    torch = pytest.importorskip("torch")
    a = symmetric(12)
    op = make(a)
    v = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for given in (v, v[:, 0], v.t().contiguous().t(), v.clone().requires_grad_()):
        got = op.matmat(given)
        assert isinstance(got, torch.Tensor)
        assert got.dtype == torch.float64
        assert got.requires_grad == given.requires_grad
        close(got.detach().numpy(), a @ given.detach().numpy(), 10)
    assert (op.matmat(v) + 0).shape == (12, 3)


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
def test_right_hand_sides_of_the_other_precision(make: Callable[[np.ndarray], gh.Operator]):
    a = symmetric(12)
    v = np.random.default_rng(0).standard_normal((12, 2))
    close(make(a) @ v.astype(np.float32), a @ v.astype(np.float32).astype(np.float64), 10)
    small = make(a.astype(np.float32)) @ v
    assert small.dtype == np.float32
    close(small, a @ v, 10)


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
def test_arguments_are_not_written_to(make: Callable[[np.ndarray], gh.Operator]):
    a, v = symmetric(12), np.ones((12, 2))
    kept = a.copy()
    a.flags.writeable = v.flags.writeable = False
    op = make(a)
    op.matmat(v)
    op.diagonal()[:] = 0  # a copy: the operator keeps its own
    np.testing.assert_array_equal(op.to_dense(), kept)


def test_natural_runs_are_single_indices():
    runs = gh.DenseOperator(symmetric(6)).runs()
    np.testing.assert_array_equal(runs.permutation, np.arange(6))
    np.testing.assert_array_equal(runs.starts, np.arange(6))
