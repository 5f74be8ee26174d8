"""The log marginal likelihood and its gradient against dense float64."""

import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.applications.likelihood import _mean
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError, DtypeError, GpuHodlrError, InexactError, ShapeError

N = 150
RNG = np.random.default_rng(0)
POINTS, Y, NUGGET = RNG.random((N, 2)), RNG.standard_normal(N), 0.1 * RNG.random(N)
TIGHT: dict[str, Any] = {"rtol": 1e-12, "leaf_size": 20}
STEP = 1e-5

KERNELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gaussian": ("gaussian", {}),
    "laplace": ("laplace", {}),
    "matern32": ("matern32", {}),
    "matern52": ("matern52", {}),
    "rational_quadratic": ("rational_quadratic", {"alpha": 1.3}),
    "inverse_multiquadric": ("inverse_multiquadric", {}),
    "spherical": ("spherical", {}),
    "periodic": ("periodic", {"period": 1.7}),
    "own": (lambda r: 1 / (1 + r), {}),
}
LENGTHS: tuple[Any, ...] = (0.4, np.array([0.4, 0.7]))


def dense(A: np.ndarray, y: np.ndarray = Y) -> float:
    """log p(y) by LAPACK."""
    return float(
        -0.5 * (y @ np.linalg.solve(A, y) + np.linalg.slogdet(A)[1] + len(y) * np.log(2 * np.pi))
    )


def exact(
    name: str, lengthscale: Any, variance: float, nugget: float, noise: float, points: Any = POINTS
) -> float:
    """Of the dense matrix; factors multiply nugget and noise."""
    kernel, options = KERNELS[name]
    op = gh.KernelOperator(
        points, kernel, lengthscale, nugget * NUGGET, variance=variance, **options
    )
    return dense(op.to_dense() + noise * np.eye(len(points)))


def differences(name: str, lengthscale: Any) -> dict[str, Any]:
    """The gradient by central differences of dense values."""
    at: dict[str, Any] = {"lengthscale": lengthscale, "variance": 1.5, "nugget": 1.0, "noise": 0.1}

    def slope(which: str, direction: Any) -> float:
        ends = [
            exact(name, **{**at, which: at[which] * np.exp(e * direction)}) for e in (STEP, -STEP)
        ]
        return (ends[0] - ends[1]) / (2 * STEP)

    found: dict[str, Any] = {which: slope(which, 1.0) for which in at}
    if np.ndim(lengthscale):
        found["lengthscale"] = np.array([slope("lengthscale", unit) for unit in np.eye(2)])
    return found


@pytest.mark.parametrize("lengthscale", LENGTHS, ids=["one", "each"])
@pytest.mark.parametrize("name", KERNELS)
def test_exact_with_all_probes(name: str, lengthscale: Any):
    kernel, options = KERNELS[name]
    op = gh.KernelOperator(POINTS, kernel, lengthscale, NUGGET, variance=1.5, **options)
    found = gh.log_marginal_likelihood(op, Y, 0.1, num_probes=N, **TIGHT)
    np.testing.assert_allclose(found.value, exact(name, lengthscale, 1.5, 1.0, 0.1), rtol=1e-9)
    want = differences(name, lengthscale)
    assert set(found.gradient) == set(want) == set(found.standard_error)
    for which, slope in want.items():
        np.testing.assert_allclose(found.gradient[which], slope, rtol=1e-6, atol=1e-5)
        np.testing.assert_array_equal(found.standard_error[which], 0)
    A = op.to_dense() + 0.1 * np.eye(N)
    np.testing.assert_allclose(found.weights, np.linalg.solve(A, Y), rtol=1e-7, atol=1e-9)
    assert found.report is not None
    assert found.report.error < 3e-12


@pytest.mark.parametrize("lengthscale", LENGTHS, ids=["one", "each"])
def test_estimates_are_within_their_errors(xp: ModuleType, dtype: Any, lengthscale: Any):
    op = gh.KernelOperator(
        xp.asarray(POINTS.astype(dtype)), "matern32", lengthscale,
        xp.asarray(NUGGET.astype(dtype)), variance=1.5,
    )  # fmt: skip
    rtol = 1e-9 if dtype == np.float64 else 1e-5
    y = xp.asarray(Y.astype(dtype))
    found = gh.log_marginal_likelihood(op, y, 0.1, num_probes=40, rtol=rtol, leaf_size=20)
    value = exact("matern32", lengthscale, 1.5, 1.0, 0.1)
    np.testing.assert_allclose(found.value, value, rtol=1e-7 if dtype == np.float64 else 1e-3)
    for which, slope in differences("matern32", lengthscale).items():
        error = np.asarray(found.standard_error[which])
        if which != "lengthscale":  # exact
            np.testing.assert_array_equal(error, 0)
            close = {"rtol": 1e-6, "atol": 1e-5} if dtype == np.float64 else {"rtol": 2e-2}
            np.testing.assert_allclose(found.gradient[which], slope, **close)
            continue
        assert (error > 0).all()
        assert (error < 0.2 * np.abs(slope) + 3).all()
        assert (np.abs(found.gradient[which] - slope) <= 4 * error).all()
    assert to_host(found.weights).dtype == dtype
    again = gh.log_marginal_likelihood(op, y, 0.1, num_probes=40, rtol=rtol, leaf_size=20)
    assert again.value == found.value
    np.testing.assert_array_equal(again.gradient["lengthscale"], found.gradient["lengthscale"])
    other = gh.log_marginal_likelihood(op, y, 0.1, num_probes=40, seed=1, rtol=rtol, leaf_size=20)
    assert np.all(other.gradient["lengthscale"] != found.gradient["lengthscale"])


@pytest.mark.parametrize("lengthscale", LENGTHS, ids=["one", "each"])
@pytest.mark.parametrize("name", KERNELS)
def test_information_is_the_dense_one(name: str, lengthscale: Any):
    """1/2 a^T dA_i A^-1 dA_j a with dA by central differences; few probes do not matter."""
    kernel, options = KERNELS[name]

    def matrix(lengthscale: Any) -> np.ndarray:
        op = gh.KernelOperator(POINTS, kernel, lengthscale, NUGGET, variance=1.5, **options)
        return op.to_dense()

    op = gh.KernelOperator(POINTS, kernel, lengthscale, NUGGET, variance=1.5, **options)
    found = gh.log_marginal_likelihood(op, Y, 0.1, num_probes=2, **TIGHT)
    K, noise = matrix(lengthscale), 0.1 * np.eye(N)
    a = np.linalg.solve(K + noise, Y)
    slopes = [
        (matrix(lengthscale * np.exp(STEP * e)) - matrix(lengthscale * np.exp(-STEP * e)))
        / (2 * STEP)
        for e in (np.eye(2) if np.ndim(lengthscale) else (1.0,))
    ]
    moved = np.stack([d @ a for d in (K - np.diag(NUGGET), *slopes, np.diag(NUGGET), noise)])
    want = 0.5 * moved @ np.linalg.solve(K + noise, moved.T)
    information = found.information("variance", "lengthscale", "nugget", "noise")
    np.testing.assert_allclose(information, want, rtol=1e-6, atol=1e-6 * abs(want).max())
    np.testing.assert_array_equal(information, information.T)
    some = found.information("noise", "variance")
    np.testing.assert_allclose(some, want[np.ix_([-1, 0], [-1, 0])], rtol=1e-6)


def test_information_is_near_the_second_derivatives_of_data_of_the_model():
    op = gh.KernelOperator(POINTS, "matern32", 0.4, variance=1.5)
    L = np.linalg.cholesky(op.to_dense() + 0.1 * np.eye(N))
    y = L @ np.random.default_rng(5).standard_normal(N)

    def slope(variance: float, noise: float) -> np.ndarray:
        op = gh.KernelOperator(POINTS, "matern32", 0.4, variance=variance)
        found = gh.log_marginal_likelihood(op, y, noise, num_probes=2, **TIGHT)
        return np.array([found.gradient["variance"], found.gradient["noise"]])

    found = gh.log_marginal_likelihood(op, y, 0.1, num_probes=2, **TIGHT)
    up, down = np.exp(STEP), np.exp(-STEP)
    rows = (
        slope(1.5 * up, 0.1) - slope(1.5 * down, 0.1),
        slope(1.5, 0.1 * up) - slope(1.5, 0.1 * down),
    )
    second = np.stack(rows) / (2 * STEP)
    np.testing.assert_allclose(found.information("variance", "noise"), -second, rtol=0.5, atol=3)


def test_information_needs_a_gradient():
    K = gh.compress(gh.KernelOperator(POINTS, "laplace", 0.3), **TIGHT)
    found = gh.log_marginal_likelihood(K, Y, 0.1)
    a = np.linalg.solve(K.to_dense() + 0.1 * np.eye(N), Y)
    want = 0.005 * a @ np.linalg.solve(K.to_dense() + 0.1 * np.eye(N), a)
    np.testing.assert_allclose(found.information("noise"), [[want]], rtol=1e-8)
    with pytest.raises(ArgumentError, match="names must be of noise, got 'lengthscale'"):
        found.information("noise", "lengthscale")
    alone = gh.log_marginal_likelihood(K, Y, 0.1, gradient=False)
    with pytest.raises(ArgumentError, match="names must be of a gradient, got 'noise'"):
        alone.information("noise")
    with pytest.raises(ArgumentError, match="names must be of noise, got None"):
        found.information()


def test_what_probes_miss_of_a_known_trace_they_miss_of_the_others():
    rng = np.random.default_rng(0)
    missed, own = rng.standard_normal((2, 16)), 0.01 * rng.standard_normal((1, 16))
    samples = 5.0 + 3.0 * missed[:1] - 2.0 * missed[1:] + own
    plain, spread = _mean(samples, np.zeros((0, 16)))
    assert plain == pytest.approx(samples.mean(axis=1))
    assert spread == pytest.approx(samples.std(ddof=1) / 4)
    for controls in (missed, np.concatenate([missed, -2.0 * missed[:1], 0 * missed])):
        mean, error = _mean(samples, controls)
        assert abs(mean[0] - 5.0) < 4 * error[0]
        assert 0.001 < error[0] < 0.004
    few, _ = _mean(samples[:, :7], missed[:, :7])  # too few to tell
    assert few == pytest.approx(samples[:, :7].mean(axis=1))


def test_length_scales_are_told_from_the_variance_by_few_probes():
    """Where they are hardly told apart by the data, the known trace of the variance helps."""
    x = np.sort(np.random.default_rng(0).random(400))
    op = gh.KernelOperator(x, "matern52", 0.5, variance=2.0)
    y = np.sin(6 * x)  # hardly any noise
    exact = gh.log_marginal_likelihood(op, y, 1e-5, num_probes=400, rtol=1e-9, leaf_size=50)
    found = [
        gh.log_marginal_likelihood(
            op, y, 1e-5, num_probes=k, rtol=1e-9, leaf_size=50, seed=seed
        ).gradient["lengthscale"]
        for k in (16, 7)
        for seed in range(8)
    ]
    off = np.abs(np.array(found) - exact.gradient["lengthscale"]).reshape(2, 8)
    assert np.mean(off[0] ** 2) < 0.1 * np.mean(off[1] ** 2)


def test_standard_errors_are_the_spread_over_seeds():
    op = gh.KernelOperator(POINTS, "laplace", 0.3)
    found = [
        gh.log_marginal_likelihood(op, Y, 0.1, num_probes=8, seed=seed, **TIGHT)
        for seed in range(40)
    ]
    spread = np.std([f.gradient["lengthscale"] for f in found], ddof=1)
    said = np.sqrt(np.mean([np.square(f.standard_error["lengthscale"]) for f in found]))
    assert 0.6 < said / spread < 1.6
    # Of the square root of the information the 1 / sqrt(8)th part at most.
    K, up, down = (
        gh.KernelOperator(POINTS, "laplace", 0.3 * np.exp(e)).to_dense() for e in (0.0, STEP, -STEP)
    )
    moved = np.linalg.solve(K + 0.1 * np.eye(N), up - down) / (2 * STEP)
    assert spread < 1.2 * np.sqrt(0.5 * np.trace(moved @ moved) / 8)


def test_a_factor_without_an_exact_diagonal_has_estimates():
    """Of a network in its eigenbasis: the noise alone, from probes."""
    pytest.importorskip("torch")
    from eigenbasis_cases import operator

    K = gh.compress(operator("autoencoder"), "kfe", rtol=1e-6)
    n = K.shape[0]
    y = np.random.default_rng(2).standard_normal(n)
    F = K.factorize(0.1)
    found = gh.log_marginal_likelihood(F, y)
    a = np.linalg.solve(K.to_dense() + 0.1 * np.eye(n), y)
    slope = 0.05 * (a @ a - np.trace(np.linalg.inv(K.to_dense() + 0.1 * np.eye(n))))
    assert list(found.gradient) == ["noise"]
    assert found.standard_error["noise"] > 0
    assert abs(found.gradient["noise"] - slope) < 4 * found.standard_error["noise"]


def test_compressed_again_where_the_noise_is_small():
    """With rtol alone the error is more than the noise, and the matrix not positive definite."""
    op = gh.KernelOperator(POINTS, "gaussian", 0.5)
    found = gh.log_marginal_likelihood(op, Y, 1e-4, rtol=1e-2, leaf_size=20)
    assert found.report is not None
    assert found.report.spectral_error <= 1e-5
    assert found.report.rtol < 1e-2
    of_rows = np.linspace(1e-4, 1, N)
    found = gh.log_marginal_likelihood(op, Y, of_rows, rtol=1e-2, leaf_size=20)
    np.testing.assert_allclose(found.value, dense(op.to_dense() + np.diag(of_rows)), rtol=1e-2)
    enough = gh.log_marginal_likelihood(op, Y, 10.0, rtol=1e-2, leaf_size=20)
    assert enough.report is not None
    assert enough.report.rtol == 1e-2


def test_noise_of_every_row(xp: ModuleType):
    noise = 0.05 + NUGGET
    op = gh.KernelOperator(xp.asarray(POINTS), "laplace", 0.3)
    found = gh.log_marginal_likelihood(
        op, xp.asarray(Y), xp.asarray(noise), num_probes=N, rtol=1e-10, leaf_size=20
    )
    K = to_host(op.to_dense())
    np.testing.assert_allclose(found.value, dense(K + np.diag(noise)), rtol=1e-9)
    ends = [dense(K + np.diag(noise) * np.exp(e)) for e in (STEP, -STEP)]
    slope = (ends[0] - ends[1]) / (2 * STEP)
    np.testing.assert_allclose(found.gradient["noise"], slope, rtol=1e-6)


def test_of_a_matrix_and_of_a_factor():
    op = gh.KernelOperator(POINTS, "laplace", 0.3)
    wanted = gh.log_marginal_likelihood(op, Y, 0.1, **TIGHT)
    K = gh.compress(op, **TIGHT)
    for given, damping in ((K, 0.1), (K.factorize(0.1), None), (op.to_dense(), 0.1)):
        options = TIGHT if isinstance(given, np.ndarray) else {}
        found = gh.log_marginal_likelihood(given, Y, damping, **options)
        np.testing.assert_allclose(found.value, wanted.value, rtol=1e-9)
        assert list(found.gradient) == ["noise"]
        np.testing.assert_allclose(found.gradient["noise"], wanted.gradient["noise"], rtol=1e-6)
    assert gh.log_marginal_likelihood(K.factorize(0.1), Y).report is None
    alone = gh.log_marginal_likelihood(op, Y, 0.1, gradient=False, **TIGHT)
    assert (alone.value, dict(alone.gradient)) == (wanted.value, {})


@pytest.mark.parametrize("scheme", ["hodlr", "lowrank"])
def test_other_schemes(scheme: str):
    op = gh.KernelOperator(POINTS, "gaussian", 0.5)
    found = gh.log_marginal_likelihood(op, Y, 0.1, scheme=scheme, **TIGHT)
    np.testing.assert_allclose(found.value, dense(op.to_dense() + 0.1 * np.eye(N)), rtol=1e-8)


def test_torch_vectors():
    torch = pytest.importorskip("torch")
    op = gh.KernelOperator(POINTS, "laplace", 0.3)
    found = gh.log_marginal_likelihood(op, torch.from_numpy(Y), 0.1, **TIGHT)
    assert isinstance(found.weights, torch.Tensor)
    assert found.value == gh.log_marginal_likelihood(op, Y, 0.1, **TIGHT).value


def test_an_optimizer_finds_the_parameters():
    """Data of a known Gaussian process: the maximum lies near, and the gradient leads there."""
    rng = np.random.default_rng(3)
    points = rng.random((300, 1)) * 10
    truth = gh.KernelOperator(points, "matern52", 0.5, variance=2.0)
    y = np.linalg.cholesky(truth.to_dense() + 0.05 * np.eye(300)) @ rng.standard_normal(300)

    def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        lengthscale, variance, noise = np.exp(logs)
        op = gh.KernelOperator(points, "matern52", float(lengthscale), variance=float(variance))
        found = gh.log_marginal_likelihood(
            op, y, float(noise), rtol=1e-8, leaf_size=32, num_probes=16
        )
        slopes = [found.gradient[name] for name in ("lengthscale", "variance", "noise")]
        return -found.value, -np.array(slopes)

    best = minimize(loss, np.log([2.0, 1.0, 0.5]), jac=True, method="L-BFGS-B",
                    bounds=[(-4, 4)] * 3, options={"maxiter": 25})  # fmt: skip
    np.testing.assert_allclose(np.exp(best.x), [0.5, 2.0, 0.05], rtol=0.6)
    assert -best.fun > -loss(np.log([0.5, 2.0, 0.05]))[0] - 1


def test_the_same_on_any_number_of_ranks(monkeypatch: pytest.MonkeyPatch):
    """Strips of dK are shared out; 1,100 rows are three of them when few entries are held."""
    monkeypatch.setattr("gpu_hodlr.operators.point_blocks._HELD", 1 << 10)
    points = np.random.default_rng(1).random((1100, 2))
    op = gh.KernelOperator(points, "laplace", [0.3, 0.6])
    y = np.sin(9 * points[:, 0])

    def both(comm: Any = None) -> tuple[gh.LogMarginalLikelihood, np.ndarray]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = gh.log_marginal_likelihood(
                op, y, 0.1, rtol=1e-3, leaf_size=64, num_probes=4, comm=comm
            )
        return found, found.information("variance", "lengthscale", "noise")

    alone, information = both()
    for size in (2, 4):
        for result in on_threads(size, both):
            assert not isinstance(result, Exception), result
            theirs, same = result
            np.testing.assert_allclose(same, information, rtol=1e-9)
            assert theirs.value == pytest.approx(alone.value, rel=1e-12)  # of another elimination
            for name, slope in alone.gradient.items():
                np.testing.assert_allclose(theirs.gradient[name], slope, rtol=1e-9)


def test_what_fails_on_one_rank_fails_on_all():
    op = gh.KernelOperator(POINTS, "laplace", 0.3)

    def found(comm: Any) -> Any:
        return gh.log_marginal_likelihood(op, Y[: N - comm.rank], 0.1, comm=comm, leaf_size=40)

    for error in on_threads(2, found):
        assert isinstance(error, ShapeError)
        assert "y must have shape (150,)" in str(error)


BAD: dict[str, tuple[type[GpuHodlrError], dict[str, Any], str]] = {
    "no damping": (ArgumentError, {"damping": None}, "damping must be given"),
    "damping < 0": (ArgumentError, {"damping": -1.0}, "damping"),
    "two columns": (ShapeError, {"y": np.ones((N, 2))}, r"y must have shape \(150,\)"),
    "too few": (ShapeError, {"y": Y[:9]}, r"y must have shape \(150,\)"),
    "NaN": (ArgumentError, {"y": Y * np.nan}, "y has 150 entries"),
    "a list": (DtypeError, {"y": list(Y)}, "y must be"),
    "one probe": (ArgumentError, {"num_probes": 1}, "num_probes must be >= 2"),
    "half a probe": (DtypeError, {"num_probes": 2.5}, "num_probes"),
    "seed < 0": (ArgumentError, {"seed": -1}, "seed"),
    "scheme fmm": (InexactError, {"scheme": "fmm", "budget": 0.2}, "log-determinant"),
}


@pytest.mark.parametrize(("kind", "arguments", "words"), BAD.values(), ids=BAD)
def test_refused(kind: type[GpuHodlrError], arguments: dict[str, Any], words: str):
    given = {"y": Y, "damping": 0.1, "leaf_size": 40, **arguments}
    with pytest.raises(kind, match=words):
        gh.log_marginal_likelihood(gh.KernelOperator(POINTS, "laplace", 0.3), **given)


def test_options_of_what_is_compressed_already():
    K = gh.compress(gh.KernelOperator(POINTS, "laplace", 0.3), leaf_size=40)
    with pytest.raises(ArgumentError, match="rtol, leaf_size: options of compress"):
        gh.log_marginal_likelihood(K, Y, 0.1, rtol=1e-3, leaf_size=3)
    with pytest.raises(ArgumentError, match=r"damping must be None.*0\.1"):
        gh.log_marginal_likelihood(K.factorize(0.1), Y, 0.2)
