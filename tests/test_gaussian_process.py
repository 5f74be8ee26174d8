"""Gaussian process regression against scikit-learn's and dense linear algebra."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from process_cases import AT, LENGTHS, NEW, ROWS, TIGHT, M, N, X, Y, exact, fixed, matern52
from test_bad_input import refused

import gpu_hodlr as gh
from gpu_hodlr.applications.gaussian_process import posterior
from gpu_hodlr.applications.gaussian_process.evidence import _stages
from gpu_hodlr.applications.gaussian_process.maximum import Likelihood, maximized
from gpu_hodlr.errors import AccuracyWarning, MemoryEstimateError, NotPositiveDefiniteError

# --- dense oracles -----------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.01, ROWS], ids=["number", "rows"])
@pytest.mark.parametrize("scheme", ["hss", "hodlr", "lowrank"])
def test_predictions_are_exact(noise: Any, scheme: str):
    process = fixed(noise=noise, scheme=scheme).fit(X, Y)
    mean, covariance, value = exact(Y, noise)
    np.testing.assert_allclose(process.predict(NEW), mean, rtol=1e-9)
    again, std = process.predict(NEW, return_std=True)
    np.testing.assert_array_equal(again, process.predict(NEW))
    np.testing.assert_allclose(std, np.sqrt(np.diag(covariance)), rtol=1e-7)
    _, found = process.predict(NEW, return_cov=True)
    np.testing.assert_allclose(found, covariance, atol=1e-10)
    np.testing.assert_array_equal(found, found.T)
    np.testing.assert_allclose(process.log_marginal_likelihood_value_, value, rtol=1e-9)
    np.testing.assert_allclose(process.kernel_.cross(NEW) @ process.weights_, mean, rtol=1e-9)
    np.testing.assert_array_equal(process.noise_, noise)
    assert (process.theta_.shape, process.n_iter_) == ((0,), 0)


def test_with_normalized_targets():
    process = fixed(normalize_y=True).fit(X, Y)
    mean, covariance, _ = exact((Y - Y.mean()) / Y.std(), 0.01)
    found, std = process.predict(NEW, return_std=True)
    np.testing.assert_allclose(found, mean * Y.std() + Y.mean(), rtol=1e-9)
    np.testing.assert_allclose(std, np.sqrt(np.diag(covariance)) * Y.std(), rtol=1e-7)
    _, found = process.predict(NEW, return_cov=True)
    np.testing.assert_allclose(found, covariance * Y.var(), atol=1e-10)


@pytest.mark.parametrize("lengthscale", [0.5, LENGTHS], ids=["one", "each"])
def test_likelihood_and_gradient_are_scikit_learns(lengthscale: Any):
    """Also the order of theta: variance, length scales, noise."""
    pytest.importorskip("sklearn")
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    kernel = ConstantKernel(1.5) * Matern(lengthscale, nu=2.5) + WhiteKernel(0.01)
    theirs = GaussianProcessRegressor(kernel, alpha=0.0, optimizer=None).fit(X, Y)
    process = gh.GaussianProcess(**{**AT, **TIGHT, "lengthscale": lengthscale, "max_iter": 1})
    process.fit(X, Y)
    rng = np.random.default_rng(1)
    for theta in (theirs.kernel_.theta, theirs.kernel_.theta + 0.5 * rng.standard_normal()):
        value, gradient = process.log_marginal_likelihood(theta, eval_gradient=True)
        want, slope = theirs.log_marginal_likelihood(theta, eval_gradient=True)
        np.testing.assert_allclose(value, want, rtol=1e-9)
        np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-6)
        assert process.log_marginal_likelihood(theta) == pytest.approx(want, rel=1e-9)
    value, gradient = process.log_marginal_likelihood(eval_gradient=True)
    assert value == pytest.approx(process.log_marginal_likelihood(), rel=1e-12)
    np.testing.assert_allclose(
        gradient, process.log_marginal_likelihood(process.theta_, eval_gradient=True)[1]
    )


def test_what_is_fixed_is_not_in_theta():
    process = fixed(optimizer="newton", variance_bounds="fixed", tol=1e-6).fit(X, Y)
    assert process.variance_ == 1.5
    np.testing.assert_allclose(process.theta_[:2], np.log(process.lengthscale_))
    np.testing.assert_allclose(process.theta_[2], np.log(process.noise_))
    value, gradient = process.log_marginal_likelihood(process.theta_, eval_gradient=True)
    step = 1e-5 * np.array([0.0, 1.0, -1.0])
    ends = [process.log_marginal_likelihood(process.theta_ + s) for s in (step, -step)]
    assert (ends[0] - ends[1]) / 2 == pytest.approx(gradient @ step, rel=1e-3, abs=1e-7)
    assert value >= max(ends) - 1e-6


def test_noise_of_every_sample_has_a_common_factor():
    process = fixed(optimizer="newton", noise=ROWS, tol=1e-6).fit(X, Y)
    factor = float(np.exp(process.theta_[-1]))
    np.testing.assert_allclose(process.noise_, factor * ROWS)
    value, gradient = process.log_marginal_likelihood(process.theta_, eval_gradient=True)
    K = matern52(X, X, process.variance_, process.lengthscale_) + np.diag(process.noise_)
    half = Y @ np.linalg.solve(K, Y) + np.linalg.slogdet(K)[1] + N * np.log(2 * np.pi)
    np.testing.assert_allclose(value, -0.5 * half, rtol=1e-9)
    step = np.array([0.0, 0.0, 0.0, 1e-5])
    ends = [process.log_marginal_likelihood(process.theta_ + s) for s in (step, -step)]
    assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(gradient[-1], rel=1e-3, abs=1e-2)


# --- fitting -----------------------------------------------------------------------------------


def test_the_maximum_is_scikit_learns():
    pytest.importorskip("sklearn")
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    y = Y - Y.mean()
    kernel = ConstantKernel(1.0) * Matern([0.5, 0.5], nu=2.5) + WhiteKernel(0.05)
    theirs = GaussianProcessRegressor(kernel, alpha=0.0).fit(X, y)
    process = gh.GaussianProcess(lengthscale="each", **TIGHT, tol=1e-5).fit(X, y)
    best = theirs.log_marginal_likelihood_value_
    assert best - 1e-2 < process.log_marginal_likelihood_value_ < best + 1e-3
    assert abs(process.theta_[-1] - theirs.kernel_.theta[-1]) < 0.1
    mean, std = process.predict(NEW, return_std=True)
    want, spread = theirs.predict(NEW, return_std=True)
    np.testing.assert_allclose(mean, want, atol=0.02)
    latent = np.sqrt(spread**2 - np.exp(theirs.kernel_.theta[-1]))
    np.testing.assert_allclose(std, latent, rtol=0.15)


def test_starts_are_of_the_data():
    """Whatever the units of points and targets."""
    one = gh.GaussianProcess().fit(X, Y)
    other = gh.GaussianProcess().fit(1e6 * X, 1e-3 * Y)
    np.testing.assert_allclose(other.lengthscale_, 1e6 * one.lengthscale_, rtol=1e-3)
    np.testing.assert_allclose(other.noise_, 1e-6 * one.noise_, rtol=1e-3)
    np.testing.assert_allclose(other.predict(1e6 * NEW), 1e-3 * one.predict(NEW), rtol=1e-4)
    constant = gh.GaussianProcess("gaussian").fit(np.ones((30, 2)), np.zeros(30))
    np.testing.assert_allclose(constant.predict(np.ones((1, 2))), 0, atol=1e-12)


def test_bounds_are_kept():
    process = gh.GaussianProcess(
        noise=1.0, noise_bounds=(0.5, 2.0), lengthscale=1.0, lengthscale_bounds=(0.9, 1.0), **TIGHT
    ).fit(X, Y)
    assert process.noise_ == pytest.approx(0.5)
    assert 0.9 <= process.lengthscale_ <= 1.0


def test_restarts_leave_a_poor_maximum():
    """From here all is noise, to a single start."""
    poor: dict[str, Any] = {
        "lengthscale": 1e3, "variance": 1e-3, "noise": 10.0, "lengthscale_bounds": (1e-2, 1e4),
        "variance_bounds": (1e-4, 1e2), "noise_bounds": (1e-3, 1e2), "max_iter": 3,
    }  # fmt: skip
    one = gh.GaussianProcess(**poor, **TIGHT).fit(X, Y)
    several = gh.GaussianProcess(**poor, **TIGHT, n_restarts_optimizer=4).fit(X, Y)
    assert several.log_marginal_likelihood_value_ > one.log_marginal_likelihood_value_ + 5
    again = gh.GaussianProcess(**poor, **TIGHT, n_restarts_optimizer=4).fit(X, Y)
    np.testing.assert_array_equal(again.theta_, several.theta_)


def test_some_points_first():
    rng = np.random.default_rng(5)
    x = rng.random((600, 2))
    y = np.sin(7 * x[:, 0]) * np.cos(5 * x[:, 1]) + 0.1 * rng.standard_normal(600)
    options: dict[str, Any] = {"compress_options": {"leaf_size": 64}, "tol": 1e-3}
    whole = gh.GaussianProcess(subset=None, **options).fit(x, y)
    staged = gh.GaussianProcess(subset=60, **options).fit(x, y)
    best = whole.log_marginal_likelihood_value_
    assert staged.log_marginal_likelihood_value_ == pytest.approx(best, abs=0.1)
    np.testing.assert_allclose(staged.theta_[-1], whole.theta_[-1], atol=0.05)
    assert len(staged.weights_) == 600
    noise = np.full(600, 0.01)
    rows = gh.GaussianProcess(subset=60, noise=noise, **options).fit(x, y)
    assert rows.log_marginal_likelihood_value_ == pytest.approx(best, abs=0.1)
    assert _stages(600, 60) == [60, 240, 600]
    assert _stages(80, 60) == [80]
    assert _stages(600, None) == [600]


# --- the optimizer -----------------------------------------------------------------------------

CENTER, SHAPE = np.array([0.3, -0.7]), np.array([[20.0, 6.0], [6.0, 5.0]])
START, WIDE = np.array([-0.5, 0.2]), np.array([[-3.0, 3.0], [-3.0, 3.0]])
LOGS = np.zeros(2, bool)


def bowl(theta: np.ndarray) -> Likelihood:
    d = theta - CENTER
    return Likelihood(-0.5 * float(d @ SHAPE @ d), -SHAPE @ d, SHAPE, f"at {theta}")


class Counted:
    def __init__(self, function: Callable[[np.ndarray], Likelihood]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, theta: np.ndarray) -> Likelihood:
        self.calls += 1
        return self.function(theta)


def test_the_information_makes_a_step_of_newton_and_nothing_is_evaluated_after_it():
    evaluate = Counted(bowl)
    found = maximized(evaluate, START, WIDE, LOGS, 1e-9, 50)
    np.testing.assert_allclose(found.theta, CENTER, atol=1e-12)
    assert found.likelihood.kept == f"at {found.theta}"
    assert (evaluate.calls, found.iterations) == (2, 1)
    there = maximized(Counted(bowl), CENTER + 1e-3, WIDE, LOGS, 1e-3, 50)  # at most 2e-5 to gain
    assert (there.iterations, there.likelihood.kept) == (0, f"at {CENTER + 1e-3}")
    assert maximized(bowl, START, WIDE, LOGS, 0.0, 0).iterations == 0


@pytest.mark.parametrize("factor", [0.2, 4.0])
def test_an_information_that_is_off_takes_more_steps(factor: float):
    evaluate = Counted(lambda theta: replace(bowl(theta), information=factor * SHAPE))
    found = maximized(evaluate, START, WIDE, LOGS, 1e-6, 80)
    np.testing.assert_allclose(found.theta, CENTER, atol=5e-3)
    assert 2 < found.iterations < 50
    assert evaluate.calls == found.iterations + 1


def test_a_step_is_no_longer_than_what_has_proved_good():
    """The first is one of one logarithm, whatever the information says, or of what is given."""
    tried = []

    def steep(theta: np.ndarray) -> Likelihood:
        tried.append(theta)
        at = bowl(theta)
        return replace(at, information=1e-3 * SHAPE)

    found = maximized(steep, np.array([-2.0, 2.0]), WIDE, LOGS, 1e-6, 200)
    np.testing.assert_allclose(found.theta, CENTER, atol=0.02)
    assert abs(tried[1] - tried[0]).max() == pytest.approx(1.0)
    values = [bowl(theta).value for theta in tried]
    assert found.likelihood.value == max(values)
    tried.clear()
    maximized(steep, np.array([-2.0, 2.0]), WIDE, LOGS, 1e-6, 1, 2.0)
    assert abs(tried[1] - tried[0]).max() == pytest.approx(2.0)


def test_steps_of_the_number_itself():
    """Of -(x - 1/2)^2 / 2 in x = exp(theta), one step, which in the logarithm takes several."""

    def in_numbers(theta: np.ndarray) -> Likelihood:
        x = np.exp(theta)
        value, slope = -0.5 * float(((x - 0.5) ** 2).sum()), -(x - 0.5) * x
        return Likelihood(value, slope, np.diag(x * x), None)

    wide = np.array([[-3.0, 3.0]])
    itself = maximized(in_numbers, np.zeros(1), wide, np.ones(1, bool), 1e-9, 50)
    np.testing.assert_allclose(itself.theta, np.log(0.5))
    assert itself.iterations == 1
    assert maximized(in_numbers, np.zeros(1), wide, np.zeros(1, bool), 1e-9, 50).iterations > 3
    low = np.array([[np.log(0.8), 3.0]])
    at = maximized(in_numbers, np.zeros(1), low, np.ones(1, bool), 1e-9, 50)
    np.testing.assert_array_equal(at.theta, low[:, 0])


def test_a_direction_that_does_not_matter():
    def valley(theta: np.ndarray) -> Likelihood:
        at = bowl(np.array([theta[0], CENTER[1]]))
        return replace(at, slope=at.slope * [1, 0], information=np.diag([20.0, 0.0]))

    found = maximized(valley, START, WIDE, LOGS, 1e-9, 50)
    np.testing.assert_allclose(found.theta, [CENTER[0], START[1]], atol=1e-9)
    flat = Likelihood(1.0, np.zeros(2), np.zeros((2, 2)), None)
    assert maximized(lambda theta: flat, START, WIDE, LOGS, 0.0, 50).iterations == 0


def test_steps_into_what_is_not_definite_are_taken_back():
    def partly(theta: np.ndarray) -> Likelihood:
        if theta[0] > 0.5:
            raise NotPositiveDefiniteError("too far")
        return replace(bowl(theta), information=0.5 * SHAPE)

    found = maximized(partly, np.array([-0.2, 0.0]), WIDE, LOGS, 1e-9, 50)
    np.testing.assert_allclose(found.theta, CENTER, atol=1e-3)
    with pytest.raises(NotPositiveDefiniteError):
        maximized(partly, np.ones(2), WIDE, LOGS, 1e-9, 50)


def test_the_maximum_within_bounds():
    """Of the bowl where the first is 0 at most, and where the second may not move."""
    narrow = np.array([[-1.0, 0.0], [-3.0, 1.0]])
    low = maximized(bowl, np.array([-0.9, 0.9]), narrow, LOGS, 1e-9, 50)
    np.testing.assert_allclose(low.theta, [0, -0.7 + 0.3 * 6 / 5], atol=1e-9)
    assert low.theta[0] <= 0
    still = maximized(bowl, START, np.array([[-3.0, 3.0], [0.2, 0.2]]), LOGS, 1e-9, 50)
    np.testing.assert_allclose(still.theta, [0.3 - 0.9 * 6 / 20, 0.2], atol=1e-9)
    fixed = maximized(bowl, START, np.stack([START, START], axis=1), LOGS, 0.0, 50)
    np.testing.assert_array_equal(fixed.theta, START)


# --- samples -----------------------------------------------------------------------------------


def test_samples_of_the_posterior():
    process = fixed(noise=0.1, rtol=1e-8).fit(X, Y)
    mean, covariance = process.predict(NEW, return_cov=True)
    found = process.sample_y(NEW, 20000, random_state=3)
    assert found.shape == (M, 20000)
    scale = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose((found.mean(axis=1) - mean) / scale, 0, atol=0.03)
    np.testing.assert_allclose(np.cov(found) / np.outer(scale, scale),
                               covariance / np.outer(scale, scale), atol=0.06)  # fmt: skip
    np.testing.assert_array_equal(process.sample_y(NEW, 20000, random_state=3), found)
    assert (process.sample_y(NEW, 2) != found[:, :2]).all()


def test_samples_and_predictions_of_the_prior():
    process = fixed(rtol=1e-8)
    found = process.sample_y(NEW, 20000)
    K = matern52(NEW, NEW, 1.5, LENGTHS)
    np.testing.assert_allclose(np.cov(found), K, atol=0.05)
    np.testing.assert_allclose(found.mean(axis=1), 0, atol=0.05)
    mean, covariance = process.predict(NEW, return_cov=True)
    np.testing.assert_array_equal(mean, np.zeros(M))
    np.testing.assert_allclose(covariance, K, rtol=1e-12)
    _, std = process.predict(NEW[:1], return_std=True)
    np.testing.assert_allclose(std, [np.sqrt(1.5)])
    assert process.sample_y(NEW[:1], 2).shape == (1, 2)
    assert process.predict(NEW[:1], return_cov=True)[1].shape == (1, 1)


def test_samples_are_in_the_units_of_the_targets():
    process = fixed(normalize_y=True, noise=0.1, rtol=1e-8).fit(X, Y)
    mean, std = process.predict(NEW, return_std=True)
    found = process.sample_y(NEW, 4000)
    np.testing.assert_allclose(found.mean(axis=1), mean, atol=0.1 * std.max())
    np.testing.assert_allclose(found.std(axis=1), std, rtol=0.1)


def test_random_states():
    process = fixed(noise=0.1, rtol=1e-8).fit(X, Y)
    same = [process.sample_y(NEW, random_state=np.random.RandomState(1)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    same = [process.sample_y(NEW, random_state=np.random.default_rng(1)) for _ in range(2)]
    np.testing.assert_array_equal(*same)
    other = [process.sample_y(NEW, random_state=None) for _ in range(2)]
    assert (other[0] != other[1]).all()


# --- accuracy ----------------------------------------------------------------------------------


def test_variances_are_within_a_tenth_whatever_the_tolerance():
    """Of old points too, whose variance is a small part of the noise."""
    rng = np.random.default_rng(2)
    x = rng.random((400, 1))
    at = np.concatenate([x[:50], rng.random((50, 1)), 1 + rng.random((20, 1))])
    for noise in (1e-2, 1e-4, 1e-6):
        process = gh.GaussianProcess(
            "gaussian", lengthscale=0.2, variance=1.0, noise=noise, optimizer=None, rtol=0.1,
            compress_options={"leaf_size": 32},
        ).fit(x, np.sin(9 * x[:, 0]))  # fmt: skip
        _, std = process.predict(at, return_std=True)
        op = process.kernel_
        C = op.cross(at).to_dense()
        want = 1 - np.sum(C * np.linalg.solve(op.to_dense() + noise * np.eye(400), C.T).T, axis=1)
        np.testing.assert_allclose(std**2, want, rtol=0.12)


def test_negative_variances_are_said():
    process = fixed().fit(X, Y)
    process.factor_ = (0.9 * process.matrix_).factorize(0.001)  # as if the error were that large
    with pytest.warns(
        AccuracyWarning, match=r"of 80 predicted variances are negative, the least -"
    ):
        _, std = process.predict(X, return_std=True)
    assert (std >= 0).all()
    assert (std == 0).any()


def test_a_rank_cap_that_is_too_small_is_said():
    process = gh.GaussianProcess(
        "laplace", lengthscale=0.3, variance=1.0, noise=2e-2, optimizer=None,
        compress_options={"max_rank": 8, "leaf_size": 20},
    )  # fmt: skip
    with pytest.warns(AccuracyWarning, match="spectral norm, more than a tenth of the noise"):
        process.fit(X, Y)


def test_columns_are_solved_for_some_at_a_time(monkeypatch: pytest.MonkeyPatch):
    process = fixed().fit(X, Y)
    new = np.random.default_rng(4).random((40, 2))
    mean, std = process.predict(new, return_std=True)
    covariance = process.predict(new, return_cov=True)[1]
    monkeypatch.setattr(posterior, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(posterior, "_ROWS", 9)
    ranks = process.factor_.owners.comm
    parts = posterior.Posterior(process.kernel_, process.weights_, process.factor_, ranks)
    assert len(parts._chunks(40)) == 3
    again, narrow = process.predict(new, return_std=True)
    np.testing.assert_allclose(again, mean, rtol=1e-12)
    np.testing.assert_allclose(narrow, std, rtol=1e-9)
    np.testing.assert_allclose(process.predict(new, return_cov=True)[1], covariance, atol=1e-13)


def test_covariances_that_do_not_fit(monkeypatch: pytest.MonkeyPatch):
    process = fixed().fit(X, Y)
    monkeypatch.setattr("gpu_hodlr.devices.free_bytes", lambda device="cpu": 1 << 20)
    refused(MemoryEstimateError, lambda: process.predict(
        np.zeros((1000, 2)), return_cov=True), "1000 x 1000 covariance")  # fmt: skip
