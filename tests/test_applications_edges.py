"""What Gaussian processes, influence and training give where a wrong number would look right."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from test_bad_input import refused

import gpu_hodlr as gh
from gpu_hodlr.applications import likelihood
from gpu_hodlr.applications.gaussian_process.hyperparameters import Hyperparameters
from gpu_hodlr.errors import ArgumentError, ShapeError, UnsupportedLayerError

# --- Gaussian processes ------------------------------------------------------------------------


def samples() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.random((40, 1))
    return X, np.sin(6 * X[:, 0]) + 0.1 * rng.standard_normal(40)


def test_a_process_is_of_the_samples_as_they_were():
    X, y = samples()
    options = {"period": np.array([0.7])}
    process = gh.GaussianProcess(
        "periodic", kernel_options=options, lengthscale=1.0, noise=0.01, optimizer=None
    ).fit(X, y)
    new = np.linspace(0, 1, 5)[:, None]

    def said() -> list[Any]:
        value, slopes = process.log_marginal_likelihood(process.theta_, eval_gradient=True)
        return [process.predict(new), process.sample_y(new, 2), value, slopes]

    before = said()
    X *= 3
    y *= -2
    options["period"] *= 2
    for one, other in zip(before, said(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_scores_are_of_as_many_numbers_as_predictions():
    X, y = samples()
    process = gh.GaussianProcess(noise=0.01, optimizer=None).fit(X, y)
    found, w = process.predict(X), np.linspace(0, 1, 40)
    average = np.average(y, weights=w)
    want = 1 - w @ (y - found) ** 2 / (w @ (y - average) ** 2)
    assert process.score(X, y, w) == pytest.approx(want, rel=1e-12)
    assert process.score(X, y[:, None], w) == process.score(X, y, w)
    refused(ShapeError, lambda: process.score(X, y[:1]), "y must have shape (40,)")
    refused(ArgumentError, lambda: process.score(X, y * np.nan), "y has 40 entries that are NaN")
    refused(ShapeError, lambda: process.score(X, y, w[:1]), "sample_weight must have shape (40,)")
    refused(ArgumentError, lambda: process.score(X, y, w * np.nan), "sample_weight has 40")
    for bad in (-w, 0 * w):
        refused(ArgumentError, lambda w=bad: process.score(X, y, w), "sample_weight must be >= 0")


def read(**given: Any) -> Hyperparameters:
    """Of 5 points in two coordinates, one of which is constant."""
    points = np.c_[np.arange(5.0), np.ones(5)]
    usual: dict[str, Any] = {"variance": None, "lengthscale": "each", "noise": None}
    usual |= {f"{name}_bounds": None for name in usual}
    return Hyperparameters.read({**usual, **given}, points, np.arange(5.0))


def test_a_start_of_every_coordinate():
    """Half of its spread; 1 of a coordinate that is constant; bounds are round all of them."""
    found = read()
    np.testing.assert_allclose(found.lengthscale, [0.5 * np.sqrt(2), 1.0])
    assert found.bounds["lengthscale"] == pytest.approx((0.5 * np.sqrt(2) / 1e4, 1e4))
    for bounds in ((0.8, 2.0), (0.1, 0.9)):
        refused(ArgumentError, lambda b=bounds: read(lengthscale_bounds=b), "between them")


def test_the_least_noise_is_that_of_the_surest_sample():
    rows = np.array([0.3, 0.1, 0.5, 0.2, 0.4])
    assert read(noise=rows).least_noise == 0.1
    assert read(noise=0.2).least_noise == 0.2


def test_the_norm_of_a_kernel_by_its_entries():
    """Exact of few rows; near it of more."""
    rng = np.random.default_rng(0)
    for n, rtol in ((100, 1e-12), (600, 0.1)):
        op = gh.KernelOperator(rng.random((n, 2)), "matern32", 0.3, 0.1)
        want = np.linalg.norm(op.to_dense())
        assert likelihood._frobenius_norm(op, 0) == pytest.approx(want, rel=rtol)


def test_ends_are_as_exact_as_outliers_are():
    found = gh.spectrum(np.diag(np.r_[np.ones(60), 50.0, -20.0]), num_outliers=2)
    assert (found.largest, found.smallest) == (pytest.approx(50.0), pytest.approx(-20.0))
    assert found.largest_error == found.smallest_error == pytest.approx(50e-6)


def test_a_spectrum_in_other_units_is_the_same():
    """To the last bit, where they are a power of two: its errors, and its effective dimension."""
    A = np.diag(np.linspace(-0.3, 1.0, 80))
    options: dict[str, int] = {"steps": 6, "num_outliers": 3}
    one, other = (gh.spectrum(s * A, **options) for s in (1.0, 2.0**-20))
    for name in ("largest", "smallest", "frobenius"):
        for kind in (name, f"{name}_error"):
            assert getattr(other, kind) == 2.0**-20 * getattr(one, kind)
    for a, b in zip(one.effective_dimension(2.0), other.effective_dimension(2.0**-19), strict=True):
        assert a == b


# --- networks ----------------------------------------------------------------------------------

torch = pytest.importorskip("torch")
from seeds import seeded  # noqa: E402
from torch import nn  # noqa: E402

from gpu_hodlr.applications.training.preconditioner import (  # noqa: E402
    Kronecker,
    Moments,
    _inverse,
)
from gpu_hodlr.networks.model import choose  # noqa: E402
from gpu_hodlr.networks.unit_root import trained_linear  # noqa: E402

WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double())


def network() -> Any:
    with seeded():
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def data(n: int = 30) -> tuple[Any, Any]:
    with seeded(1):
        x = torch.randn(n, 6, dtype=torch.float64)
    return x, torch.arange(n) % 3


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_test_samples_scores_are_its_own(reduction: str):
    """Whichever others are tested, also where a mean is over the weights of classes."""
    model, (x, y) = network(), data()
    loss = copy.copy(WEIGHTED)
    loss.reduction = reduction

    def scores(samples: slice) -> np.ndarray:
        test = x[samples], y[samples]
        return gh.influence_of(
            model, loss, (x, y), test, 0.1, scheme="hss", atol=1e-10, leaf_size=16
        ).numpy()

    whole = scores(slice(None))
    np.testing.assert_allclose(whole, whole.T, rtol=0, atol=1e-9 * abs(whole).max())
    for part in (slice(0, 1), slice(1, 2), slice(5, 9)):
        np.testing.assert_allclose(scores(part), whole[part], rtol=0, atol=1e-9 * abs(whole).max())


class Centred(nn.Module):
    """Whose outputs depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3).double()

    def forward(self, x: Any) -> Any:
        return self.layer(x - x.mean(0, keepdim=True))


def test_samples_that_see_each_other_are_told_by_the_first_batch_of_several():
    x, y = data()
    optimizer = gh.GaussNewton(Centred(), "cross_entropy")
    optimizer.step(x[:1], y[:1])
    refused(
        UnsupportedLayerError, lambda: optimizer.step(x, y), "depends on the other samples of its"
    )


def test_a_state_of_another_preconditioner_is_not_taken():
    """Factors of layers are not what a compressed matrix was asked for."""
    model, (x, y) = network(), data()
    optimizer = gh.GaussNewton(model, "cross_entropy", preconditioner="kronecker")
    optimizer.step(x, y)
    models = copy.deepcopy(model), copy.deepcopy(model)
    other, fresh = (gh.GaussNewton(m, "cross_entropy", preconditioner="lowrank") for m in models)
    other.load_state_dict(optimizer.state_dict())
    other.step(x, y)
    assert other.info.refreshed
    fresh.load_state_dict(other.state_dict())
    fresh.step(x, y)
    assert fresh.info.refreshed


def square(decay: float = 0.0, **options: Any) -> tuple[Any, Any, Any]:
    """One layer under squares, of which the quadratic model is the loss itself."""
    with seeded():
        model = nn.Linear(6, 2).double()
    x, y = data()[0], data()[0][:, :2] ** 2
    optimizer = gh.GaussNewton(model, "mse", damping=1e-12, weight_decay=decay, **options)
    return model, optimizer, (x, y)


def test_the_ratio_of_a_shortened_step():
    """It is that of the model at what lr makes of the step."""
    _, optimizer, (x, y) = square(lr=0.5)
    optimizer.step(x, y)
    assert optimizer.info.ratio == pytest.approx(1.0, rel=1e-6)


def test_losses_have_the_weight_decay_and_what_is_returned_has_not():
    model, optimizer, (x, y) = square(decay=0.3)

    def losses() -> tuple[float, float]:
        with torch.no_grad():
            loss = float(nn.functional.mse_loss(model(x), y))
            return loss, loss + 0.15 * float(sum((p**2).sum() for p in model.parameters()))

    loss, objective = losses()
    assert optimizer.step(x, y) == pytest.approx(loss, rel=1e-12)
    assert optimizer.info.loss == pytest.approx(objective, rel=1e-12)
    assert optimizer.info.new_loss == pytest.approx(losses()[1], rel=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("preconditioner", ["lowrank", "hss"])
def test_the_damping_begins_at_the_mean_of_a_compressed_diagonal(
    preconditioner: str, reduction: str
):
    """Of half of a batch that has everything twice."""
    model, (x, y) = network(), data()
    x, y = torch.cat([x, x]), torch.cat([y, y])
    op = gh.GGNOperator(model, "cross_entropy", x, y, reduction=reduction)
    optimizer = gh.GaussNewton(
        model, "cross_entropy", preconditioner=preconditioner, reduction=reduction, rtol=1e-6,
        curvature_samples=30,
    )  # fmt: skip
    optimizer.step(x, y)
    assert optimizer.info.damping == pytest.approx(float(op.diagonal().mean()), rel=1e-4)


@pytest.mark.parametrize("units", ["matrix", "diagonal", "dead"])
def test_the_damping_of_a_layer_is_shared(units: str):
    """(G + sqrt(d) / p I) x (A + p sqrt(d) I), p^2 the ratio of their mean eigenvalues."""
    rng, damping = np.random.default_rng(0), 0.3
    A, G = (m @ m.T / 20 for m in (rng.standard_normal((4, 4)), rng.standard_normal((2, 2))))
    if units != "matrix":
        G = np.diag(np.diag(G)) * (units == "diagonal")
    model = nn.Linear(3, 2).double()
    given = torch.from_numpy(G.diagonal().copy() if units == "diagonal" else G)
    linear = trained_linear(choose(model, None))
    matrix = Kronecker(linear, [Moments(torch.from_numpy(A), given)])
    b = rng.standard_normal(8)
    found = matrix.solve(torch.from_numpy(b), damping).numpy()
    p = np.sqrt(np.trace(A) / 4 / (np.trace(G) / 2)) if units != "dead" else 1.0
    damped = np.kron(
        G + np.sqrt(damping) / p * np.eye(2), A + p * np.sqrt(damping) * np.eye(4)
    )  # of units of three weights and a bias
    order = np.r_[0:3, 6, 3:6, 7]
    np.testing.assert_allclose(found[order], np.linalg.solve(damped, b[order]), rtol=1e-10)
    assert matrix.mean_diagonal == pytest.approx(np.trace(A) * np.trace(G) / 8)


def test_a_damping_that_rounding_takes_is_raised():
    """Of a moment of rank one in float32."""
    v = torch.ones(5) * 1e3
    found = _inverse(torch.outer(v, v), 1e-12)
    assert bool(found.isfinite().all())
    assert float(found.diagonal().min()) > 0


class Unused(nn.Module):
    """With a parameter that the outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(6, 3), nn.Parameter(torch.ones(2))

    def forward(self, x: Any) -> Any:
        return self.layer(x)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_an_unused_parameter_only_decays(decay: float):
    model, (x, y) = Unused().double(), data()
    optimizer = gh.GaussNewton(model, "cross_entropy", damping=1e-9, weight_decay=decay)
    before = float(optimizer.step(x, y))
    assert optimizer.step(x, y) < before
    other = model.other.detach().numpy()
    if decay:
        assert bool((other < 1).all())
    else:
        np.testing.assert_allclose(other, 1.0, rtol=1e-12)
