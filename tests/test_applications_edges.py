"""What Gaussian processes, influence and training give where a wrong number would look right."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from test_bad_input import refused

import gpu_hodlr as gh
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


# --- networks ----------------------------------------------------------------------------------

torch = pytest.importorskip("torch")
from seeds import seeded  # noqa: E402
from torch import nn  # noqa: E402

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
