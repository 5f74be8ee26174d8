"""Spectra from products: density, ends, trace, norm, dimension, against dense eigenvalues."""

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matrix_cases import products_only, toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.errors import (
    ArgumentError,
    DtypeError,
    MemoryEstimateError,
    NotPositiveDefiniteError,
    ShapeError,
)
from gpu_hodlr.matrix_functions import lanczos, quadrature, radau_quadrature

N = 240
FEW: dict[str, Any] = {"num_probes": 6, "steps": 40}


def with_spectrum(values: np.ndarray) -> np.ndarray:
    n = len(values)
    Q = np.linalg.qr(np.random.default_rng(n).standard_normal((n, n)))[0]
    exact = (Q * values) @ Q.T
    return (exact + exact.T) / 2


def indefinite() -> np.ndarray:
    """A bulk around zero and outliers of both signs, as of a network's Hessian."""
    bulk = 0.3 * np.random.default_rng(0).standard_normal(N - 9)
    return np.r_[-4.0, -2.5, 3.0 * 2.0 ** np.arange(7), bulk]


def density(values: np.ndarray, grid: np.ndarray, width: float) -> np.ndarray:
    peaks = np.exp(-((grid[:, None] - values) ** 2) / (2 * width**2))
    return peaks.sum(axis=1) / (len(values) * width * np.sqrt(2 * np.pi))


def test_everything_of_an_indefinite_matrix(xp: ModuleType, dtype: Any):
    values = indefinite()
    exact = with_spectrum(values).astype(dtype)
    found = gh.spectrum(gh.DenseOperator(xp.asarray(exact), definite=False), num_probes=20)
    tight = 1e-5 if dtype == np.float64 else 1e-4
    largest = values.max()
    assert found.n == N
    assert found.largest == pytest.approx(largest, rel=tight)
    assert found.smallest == pytest.approx(-4, abs=tight * largest)
    assert max(found.largest_error, found.smallest_error) <= 2 * tight * largest
    biggest = values[np.argsort(-abs(values))[:10]]
    np.testing.assert_allclose(found.eigenvalues, np.sort(biggest), rtol=0, atol=tight * largest)
    assert found.trace == pytest.approx(values.sum(), rel=tight)
    assert found.trace_error == 0
    norm = np.linalg.norm(values)
    assert abs(found.frobenius - norm) <= 4 * found.frobenius_error + tight * norm
    assert found.frobenius_error < 1e-3 * norm  # the outliers, nearly all of it, are exact
    grid = np.linspace(-5, 10, 200)
    value, error = found.density(grid, 0.1)
    want = density(values, grid, 0.1)
    assert value.shape == error.shape == grid.shape
    assert (abs(value - want) <= 5 * error + 0.02 * want.max()).all()
    assert abs(value - want).sum() <= 0.1 * want.sum()
    for damping in (6.0, 20.0, 500.0):
        dimension, missed = found.effective_dimension(damping)
        assert dimension.shape == missed.shape == ()
        assert abs(dimension - (values / (values + damping)).sum()) <= 4 * missed + tight
        assert missed < 0.5


def test_errors_are_the_spread_over_seeds():
    """And the estimates are right on average."""
    values, grid = indefinite(), np.linspace(-0.6, 0.6, 5)
    op = products_only(with_spectrum(values), definite=False)
    every = [gh.spectrum(op, **FEW, seed=seed) for seed in range(60)]
    want = (values.sum(), np.linalg.norm(values), (values / (values + 6)).sum())
    values_of = [
        (f.trace, f.frobenius, float(f.effective_dimension(6.0)[0]), *f.density(grid, 0.15)[0])
        for f in every
    ]
    errors_of = [
        (
            f.trace_error,
            f.frobenius_error,
            float(f.effective_dimension(6.0)[1]),
            *f.density(grid, 0.15)[1],
        )
        for f in every
    ]
    got, said = np.array(values_of), np.sqrt(np.mean(np.square(errors_of), axis=0))
    wanted = np.r_[want, density(values, grid, 0.15)]
    spread = got.std(axis=0, ddof=1)
    assert (abs(got.mean(axis=0) - wanted) <= 4 * spread / np.sqrt(60) + 1e-6 * abs(wanted)).all()
    assert (said / spread > 0.75).all()
    assert (said / spread < 1.4).all()
    assert (np.std(errors_of, axis=0)[:3] < 0.3 * said[:3]).all()  # a few probes know them well


def test_more_probes_are_more_exact():
    op = products_only(with_spectrum(indefinite()), definite=False)
    few, many = (gh.spectrum(op, num_probes=k, steps=30) for k in (5, 80))
    assert 2 < few.trace_error / many.trace_error < 8


def test_without_outliers():
    """Ritz values find the ends as well; nothing is exact."""
    values = indefinite()
    found = gh.spectrum(with_spectrum(values), num_outliers=0, num_probes=8)
    assert len(found.eigenvalues) == 0
    assert found.largest == pytest.approx(values.max(), rel=1e-10)
    assert found.smallest == pytest.approx(-4, rel=1e-8)
    alone = gh.spectrum(with_spectrum(values), num_probes=8)
    assert alone.frobenius_error < 1e-2 * found.frobenius_error


def test_outliers_that_are_not_found_in_time_are_left_to_the_probes():
    """Of a crowded end; one that stands apart is found."""
    values = np.r_[np.linspace(0, 1, N - 1) ** 0.1, 50.0]
    found = gh.spectrum(with_spectrum(values), steps=10, num_probes=20)
    assert 1 <= len(found.eigenvalues) < 10
    assert found.largest == pytest.approx(50, rel=1e-9)
    assert abs(found.frobenius - np.linalg.norm(values)) <= 4 * found.frobenius_error
    dimension, error = found.effective_dimension(0.5)
    assert abs(dimension - (values / (values + 0.5)).sum()) <= 4 * error
    assert found.smallest - found.smallest_error <= 0.5


def test_the_dimension_of_a_small_damping_tells_that_steps_do_not_do():
    """What the probes agree on may be wrong all the same."""
    values = np.geomspace(1e-9, 1, N)
    exact = with_spectrum(values)
    few = gh.spectrum(exact, steps=6, num_probes=20)
    damping = 1e-7
    want = (values / (values + damping)).sum()
    dimension, error = few.effective_dimension(damping)
    probes = few._gauss
    spread = np.std(
        [w @ (x / (x + damping)) for x, w in zip(probes[0].T, probes[1].T, strict=True)]
    )
    assert abs(dimension - want) > 4 * (N - 10) * spread / np.sqrt(20)
    assert abs(dimension - want) < 1.5 * error
    every = np.geomspace(1e-3, 10, 5)
    dimension, error = gh.spectrum(exact, num_probes=20).effective_dimension(every)
    want = (values / (values + every[:, None])).sum(axis=1)
    assert (abs(dimension - want) <= 4 * error + 1e-6).all()
    assert (np.diff(dimension) < 0).all()


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(60),
        np.ones(60),
        np.r_[np.ones(30), -np.ones(30)],
        np.r_[np.zeros(55), np.arange(1.0, 6.0)],
        np.r_[np.full(20, 3.0), np.full(20, 5.0), np.zeros(20)],
        np.array([1.0, 2.0]),
        np.arange(1.0, 9.0),
        np.arange(1.0, 13.0),
    ],
    ids=["zero", "one", "signs", "low rank", "three", "two rows", "all outliers", "two left"],
)
@pytest.mark.parametrize("outliers", [0, 10])
def test_krylov_spaces_that_end(values: np.ndarray, outliers: int):
    """Multiples of the identity, low rank, orders that outliers or steps exhaust."""
    found = gh.spectrum(with_spectrum(values), num_outliers=outliers, steps=30)
    assert found.largest == pytest.approx(values.max(), abs=1e-6)
    assert found.smallest == pytest.approx(values.min(), abs=1e-6)
    assert found.trace == pytest.approx(values.sum(), abs=1e-9)
    norm = np.linalg.norm(values)
    assert abs(found.frobenius - norm) <= 5 * found.frobenius_error + 1e-9
    dimension, error = found.effective_dimension(7.0)
    assert abs(dimension - (values / (values + 7)).sum()) <= 5 * error + 1e-6
    grid = np.linspace(-2, 14, 2000)
    value, _ = found.density(grid, 0.1)
    assert np.trapezoid(value, grid) == pytest.approx(1, abs=1e-6)
    if len(np.unique(values)) == 1:
        assert found.frobenius == pytest.approx(norm, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_any_scale(scale: float):
    """A power of two from another changes no bit, another number rounding."""
    exact = with_spectrum(indefinite()) / 512
    one, other = gh.spectrum(exact, **FEW), gh.spectrum(exact * scale, **FEW)
    for name in ("trace", "frobenius", "frobenius_error", "largest", "smallest"):
        assert getattr(other, name) / scale == pytest.approx(getattr(one, name), rel=1e-5)
    grid = np.linspace(-0.01, 0.01, 9)
    values = [f.density(grid * s, 1e-3 * s)[0] * s for f, s in ((one, 1.0), (other, scale))]
    np.testing.assert_allclose(values[1], values[0], rtol=1e-3)


def test_compressed_matrices_and_those_of_others():
    exact = toeplitz(300)
    values = np.linalg.eigvalsh(exact)
    K = gh.compress(exact, rtol=1e-9, leaf_size=40)
    found, dense = gh.spectrum(K, num_probes=8), gh.spectrum(exact, num_probes=8)
    assert found.trace == pytest.approx(np.trace(exact), rel=1e-8)
    assert found.trace_error == 0
    assert found.frobenius == pytest.approx(dense.frobenius, rel=1e-6)
    dimension, error = found.effective_dimension(0.1)
    assert abs(dimension - (values / (values + 0.1)).sum()) <= 4 * error
    inverse = gh.spectrum(K.factorize(0.1), num_probes=8)
    assert abs(inverse.largest - 1 / (values[0] + 0.1)) <= inverse.largest_error < 0.01
    assert inverse.trace_error > 0
    assert abs(inverse.trace - (1 / (values + 0.1)).sum()) <= 4 * inverse.trace_error
    torch = pytest.importorskip("torch")
    assert gh.spectrum(torch.from_numpy(exact), num_probes=8).frobenius == dense.frobenius


def test_networks_and_checkpoints():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ).double()
    x = torch.randn(40, 5, dtype=torch.float64)
    y = torch.arange(40) % 3

    def operators() -> Any:
        for kind in (gh.GGNOperator, gh.HessianOperator, gh.HessianOperator):
            yield kind(model, "cross_entropy", x, y)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.5)

    exact = [op.to_dense() for op in operators()]
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.div_(1.5**3)
    found = gh.spectrum(operators(), num_probes=8)
    assert isinstance(found, tuple)
    for one, dense in zip(found, exact, strict=True):
        values = np.linalg.eigvalsh(dense)
        np.testing.assert_allclose(
            [one.smallest, one.largest], values[[0, -1]], rtol=0, atol=1e-6 * values[-1]
        )
        assert one.trace == pytest.approx(values.sum(), rel=1e-9)
        damping = 2 * abs(values[0]) + 0.01
        dimension, error = one.effective_dimension(damping)
        assert abs(dimension - (values / (values + damping)).sum()) <= 5 * error + 1e-4
    assert found[1].smallest < -1e-3
    assert gh.spectrum([exact[0]], **FEW)[0].n == len(exact[0])
    assert gh.spectrum([]) == ()


def test_same_seed_same_bits():
    exact = with_spectrum(indefinite())
    grid = np.linspace(-1, 1, 7)
    one, again, other = (gh.spectrum(exact, **FEW, seed=s).density(grid, 0.1) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_ranks():
    """The same on all ranks; an operator's products are shared, a matrix has its vectors spread."""
    exact = with_spectrum(indefinite())[:160, :160]
    grid = np.linspace(-1, 1, 7)

    def numbers(found: gh.Spectrum) -> list[float]:
        ends = [found.trace, found.frobenius, found.frobenius_error, found.largest, found.smallest]
        return [*ends, *np.ravel(found.density(grid, 0.2)), *found.effective_dimension(6.0)]

    op = gh.DenseOperator(exact, definite=False)
    K = gh.compress(exact, leaf_size=20, max_rank=80, rtol=1e-12)
    for size in (2, 3):

        def spread(comm: Any) -> Any:
            K = gh.compress(exact, leaf_size=20, max_rank=80, rtol=1e-12, comm=comm)
            return numbers(gh.spectrum(K, **FEW))

        def shared(comm: Any) -> Any:
            return numbers(gh.spectrum(op, **FEW, comm=comm))

        for given, run in ((op, shared), (K, spread)):
            alone = numbers(gh.spectrum(given, **FEW))
            results = on_threads(size, run)
            for result in results:
                np.testing.assert_array_equal(result, results[0])
                np.testing.assert_allclose(result, alone, rtol=1e-4, atol=1e-6)
    for error in on_threads(2, lambda comm: gh.spectrum(op, steps=9 + comm.rank, comm=comm)):
        assert isinstance(error, ArgumentError)
        assert "steps differs between ranks" in str(error)


@pytest.mark.parametrize("products", [0, 1, 12, 60, 90])
def test_what_fails_on_one_rank_fails_on_all(products: int):
    """Whenever a user's product does: at first, for an outlier, for the probes."""
    exact = with_spectrum(indefinite())

    def run(comm: Any) -> Any:
        left = [products]

        def multiply(v: Any) -> Any:
            left[0] -= 1
            if comm.rank == 1 and left[0] < 0:
                raise OSError("gone")
            return exact @ v

        op = gh.FunctionOperator(N, matmat=multiply, definite=False)
        return gh.spectrum(op, **{**FEW, "num_outliers": 9}, comm=comm)

    for error in on_threads(2, run):
        assert isinstance(error, OSError)
        assert "gone" in str(error)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_pictures(ending: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    values = indefinite()
    one = gh.spectrum(with_spectrum(values), **FEW)
    other = gh.spectrum(with_spectrum(abs(values)), **FEW)
    path = tmp_path / f"density.{ending}"
    one.plot(path, other, labels=["Hessian", "GGN"])
    alone = tmp_path / f"alone.{ending}"
    gh.spectrum(np.zeros((20, 20))).plot(str(alone))
    assert path.stat().st_size > alone.stat().st_size > 1000
    if ending == "svg":
        assert "Hessian" in path.read_text() or "<path" in path.read_text()


def test_the_axis_of_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Counts for each decade: the integral over the axis is the number of eigenvalues."""
    drawn: list[Any] = []
    module = sys.modules[gh.Spectrum.__module__]
    monkeypatch.setattr(module, "draw_densities", lambda *args: drawn.append(args))
    values = indefinite()
    gh.spectrum(with_spectrum(values), **FEW).plot(tmp_path / "x.png", threshold=0.01)
    _, [curve], c, width = drawn[0]
    assert (c, width) == (0.01, 0.1)
    assert np.trapezoid(curve.value, curve.places) == pytest.approx(N, rel=1e-3)
    want = density(np.sign(values) * np.log10(1 + abs(values) / c), curve.places, width) * N
    assert abs(curve.value - want).sum() < 0.2 * want.sum()
    np.testing.assert_allclose(curve.marks.max(), np.log10(1 + values.max() / c), rtol=1e-6)


BAD: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "one probe": (ArgumentError, {"num_probes": 1}, "num_probes must be >= 2"),
    "no step": (ArgumentError, {"steps": 0}, "steps must be >= 1"),
    "half a step": (DtypeError, {"steps": 1.5}, "steps must be an integer"),
    "outliers < 0": (ArgumentError, {"num_outliers": -1}, "num_outliers must be >= 0"),
    "seed < 0": (ArgumentError, {"seed": -1}, "seed must be >= 0"),
}


@pytest.mark.parametrize(("kind", "options", "said"), BAD.values(), ids=BAD)
def test_bad_options(kind: type[Exception], options: dict[str, Any], said: str):
    with pytest.raises(kind, match=said):
        gh.spectrum(np.eye(20), **options)


def test_bad_matrices(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DtypeError):
        gh.spectrum("matrix")
    with pytest.raises(DtypeError):
        gh.spectrum([1.0, 2.0])
    skew = np.triu(np.random.default_rng(0).standard_normal((300, 300)))
    op = gh.FunctionOperator(300, matmat=lambda v: skew @ v, definite=False)
    for outliers in (0, 5):
        with pytest.raises(ArgumentError, match="op must be symmetric"):
            gh.spectrum(op, num_outliers=outliers)
    monkeypatch.setattr("gpu_hodlr.devices.free_bytes", lambda device="cpu": 10_000)
    with pytest.raises(MemoryEstimateError, match=r"80 steps with 10 probes .* lower steps or num"):
        gh.spectrum(np.eye(100))


def test_products_that_are_no_numbers(cupy: ModuleType):
    """On a GPU nobody looks at products: then it is seen here."""
    exact = cupy.asarray(np.eye(20))
    op = gh.FunctionOperator(20, matmat=lambda v: exact @ v * np.nan, device="cuda")
    for outliers in (0, 3):
        with pytest.raises(ArgumentError, match="a product of op has NaN or infinity"):
            gh.spectrum(op, num_outliers=outliers)


def test_bad_questions(tmp_path: Path):
    found = gh.spectrum(with_spectrum(indefinite()), **FEW)
    grid = np.linspace(-1, 1, 5)
    for width in (0.0, -1.0, np.inf):
        with pytest.raises(ArgumentError, match="width must be > 0"):
            found.density(grid, width)
    with pytest.raises(ShapeError, match=r"grid must have shape \(t,\), got \(1, 5\)"):
        found.density(grid[None], 0.1)
    with pytest.raises(ArgumentError, match="grid must be finite"):
        found.density(grid * np.nan, 0.1)
    for wrong in ("x", None, [1j], ["1"]):
        with pytest.raises(DtypeError, match="damping must be real numbers"):
            found.effective_dimension(wrong)
    for damping in (0.0, -1.0, np.array([6.0, 0.0])):
        with pytest.raises(ArgumentError, match="damping must be > 0"):
            found.effective_dimension(damping)
    with pytest.raises(NotPositiveDefiniteError, match=r"damping 3\.9 may not be .* between -4"):
        found.effective_dimension(np.array([6.0, 3.9]))
    with pytest.raises(ArgumentError, match="labels must be 2, one a spectrum, got 1"):
        found.plot(tmp_path / "x.png", found, labels=["one"])
    with pytest.raises(ArgumentError, match="threshold must be > 0"):
        found.plot(tmp_path / "x.png", threshold=0.0)


def test_the_repr_says_what_there_is():
    said = repr(gh.spectrum(np.diag(np.arange(1.0, 9.0))))
    assert said == "Spectrum(N = 8, 1 .. 8, trace 36 +- 0, Frobenius norm 14.28 +- 0)"


# --- below: Lanczos with full orthogonalization, Gauss's rule --------------------------------


def test_vectors_stay_orthonormal_where_plain_lanczos_loses_them(xp: ModuleType, dtype: Any):
    """Once an eigenvalue has converged, rounding finds it again; not if made orthogonal."""
    values = np.r_[np.linspace(0, 1, 70), 10.0, 40.0]
    exact = xp.asarray(with_spectrum(values).astype(dtype))
    z = xp.asarray(np.random.default_rng(0).standard_normal((72, 3)).astype(dtype))

    def loss(orthogonal: bool) -> float:
        vectors, *_ = lanczos(
            lambda v: exact @ v, z, lambda alpha, beta: False, 50, orthogonal=orthogonal
        )
        every = np.stack([gh.devices.to_host(q) for q in vectors]).astype(float)
        return max(
            float(abs(every[:, :, j] @ every[:, :, j].T - np.eye(50)).max()) for j in range(3)
        )

    assert loss(orthogonal=False) > 0.5
    assert loss(orthogonal=True) < 100 * float(np.finfo(dtype).eps)


def test_the_rule_of_gauss_is_exact_for_polynomials():
    """Of degree 2 steps - 1; the residuals are those of Ritz vectors."""
    exact = with_spectrum(np.linspace(-1, 2, 50))
    z = np.random.default_rng(0).standard_normal((50, 2))
    vectors, alpha, beta, norms = lanczos(
        lambda v: exact @ v, z, lambda alpha, beta: False, 6, orthogonal=True
    )
    nodes, weights, residuals = quadrature(alpha, beta)
    np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=1e-12)
    for j in range(2):
        u = z[:, j] / norms[j]
        for degree in range(12):
            want = u @ np.linalg.matrix_power(exact, degree) @ u
            assert weights[:, j] @ nodes[:, j] ** degree == pytest.approx(want, rel=1e-10)
        Q = np.stack([v[:, j] for v in vectors], axis=1)
        _, S = np.linalg.eigh(Q.T @ exact @ Q)
        missed = np.linalg.norm(exact @ Q @ S - Q @ S * nodes[:, j], axis=0)
        np.testing.assert_allclose(residuals[:, j], missed, rtol=1e-8)


def test_the_rule_of_a_space_that_ends():
    """Two values are all that the first column sees; what follows has no weight."""
    alpha = np.array([[1.5, 1.0], [1.5, 1.0], [1.0, 2.0]])
    beta = np.array([[0.5, 1.0], [0.0, 1.0], [0.0, 0.5]])
    nodes, weights, residuals = quadrature(alpha, beta)
    np.testing.assert_allclose(nodes[:, 0], [1, 2, 1])
    np.testing.assert_allclose(weights[:, 0], [0.5, 0.5, 0], atol=1e-15)
    np.testing.assert_array_equal(residuals[:, 0], 0)
    assert (residuals[:, 1] > 0).all()


def test_the_rules_of_gauss_and_radau_bracket():
    """Of x / (x + d) for every vector; Radau's has a node at the end, and is exact for more."""
    exact = with_spectrum(np.geomspace(1e-4, 1, 60))
    z = np.random.default_rng(0).standard_normal((60, 3))
    _, alpha, beta, norms = lanczos(
        lambda v: exact @ v, z, lambda alpha, beta: False, 7, orthogonal=True
    )
    nodes, weights, _ = quadrature(alpha, beta)
    more, their = radau_quadrature(alpha, beta, 0.0)
    np.testing.assert_allclose(more[0], 0, atol=1e-14)
    np.testing.assert_allclose(their.sum(axis=0), 1, rtol=1e-12)
    assert (their > 0).all()
    for j in range(3):
        u = z[:, j] / norms[j]
        want = u @ np.linalg.matrix_power(exact, 14) @ u
        assert their[:, j] @ more[:, j] ** 14 == pytest.approx(want, rel=1e-10)
        for d in (1e-3, 1e-2, 0.1):
            want = u @ np.linalg.solve(exact + d * np.eye(60), exact @ u)
            high = weights[:, j] @ (nodes[:, j] / (nodes[:, j] + d))
            low = their[:, j] @ (more[:, j] / (more[:, j] + d))
            assert low < want < high
