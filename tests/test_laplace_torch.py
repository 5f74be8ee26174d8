"""The structure for laplace-torch against its own full matrix."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import numpy as np
import pytest

from gpu_hodlr.errors import AccuracyWarning, ArgumentError

torch = pytest.importorskip("torch")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    laplace = pytest.importorskip("laplace")
    from gpu_hodlr.laplace_torch import CompressedLaplace
from network_cases import case  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:By default `link_approx`", "default::FutureWarning")
N, SAMPLES = 53, 40
ROUNDED = 1e-6  # laplace-torch multiplies by an identity in float32, and adds to a diagonal
TIGHT = {"rtol": 1e-13, "leaf_size": 10}
KINDS = {"classification": "cross_entropy", "regression": "mse"}


def problem(likelihood: str, dtype: Any = torch.float64) -> tuple[Any, Any, Any]:
    """6 - 5 - 3, its data as a DataLoader, whose batches come in another order every time."""
    model, x, y = case("two layers", KINDS[likelihood], dtype, SAMPLES)
    data = torch.utils.data.TensorDataset(x, y)
    return model, torch.utils.data.DataLoader(data, batch_size=16, shuffle=True), x


def fitted(likelihood: str, **given: Any) -> tuple[Any, Any, Any]:
    """Ours, theirs, inputs."""
    model, loader, x = problem(likelihood)
    pair = []
    for structure, more in (("gpu_hodlr", {"compression": TIGHT}), ("full", {})):
        found = laplace.Laplace(
            copy.deepcopy(model), likelihood, subset_of_weights="all",
            hessian_structure=structure, **given, **more,
        )  # fmt: skip
        found.fit(loader)
        pair.append(found)
    return pair[0], pair[1], x


def close(found: Any, wanted: Any, rtol: float = ROUNDED) -> None:
    found, wanted = (np.asarray(part.detach()) for part in (found, wanted))
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * abs(wanted).max())


LAYERS = torch.tensor([0.7, 1.2, 2.5, 0.4], dtype=torch.float64)
PRIORS = {
    "number": 1.3,
    "layers": LAYERS,
    "every": torch.linspace(0.5, 1.5, N, dtype=torch.float64),
}
GIVEN: dict[str, dict[str, Any]] = {
    "classification": {"temperature": 0.8},
    "regression": {"sigma_noise": 0.6, "prior_mean": 0.1},
}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("likelihood", KINDS)
def test_like_the_full_matrix(likelihood: str, prior: str):
    ours, theirs, x = fitted(likelihood, prior_precision=PRIORS[prior], **GIVEN[likelihood])
    assert isinstance(ours, CompressedLaplace)
    close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    J = ours.backend.jacobians(x[:4])[0]
    inverse, flat = torch.linalg.inv(theirs.posterior_precision), J.flatten(0, 1)
    close(ours.functional_variance(J), J @ inverse @ J.mT)
    close(ours.functional_covariance(J), flat @ inverse @ flat.T)
    other = theirs.mean + 0.1 * torch.cos(torch.arange(N, dtype=torch.float64))
    close(ours.log_prob(other), theirs.log_prob(other))
    (H, scale), P = ours.posterior_precision
    close(torch.as_tensor(scale * H.to_dense()) + torch.diag(P), theirs.posterior_precision)
    if likelihood == "classification":
        close(ours(x), theirs(x))
    else:
        for found, wanted in zip(ours(x), theirs(x), strict=True):
            close(found, wanted)


@pytest.mark.parametrize("prior", PRIORS)
def test_gradients_in_prior_and_noise(prior: str):
    found = []
    for each in fitted("regression")[:2]:
        precision = torch.as_tensor(PRIORS[prior], dtype=torch.float64).reshape(-1).clone()
        sigma = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
        each.log_marginal_likelihood(precision.requires_grad_(), sigma).backward()
        found.append((precision.grad, sigma.grad))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


@pytest.mark.parametrize("structure", ["scalar", "layerwise", "diag"])
def test_their_optimization_of_the_prior(structure: str):
    ours, theirs, _ = fitted("classification")
    for each in (ours, theirs):
        each.optimize_prior_precision(pred_type="glm", prior_structure=structure, n_steps=10)
    close(ours.prior_precision, theirs.prior_precision)
    assert len(ours.prior_precision) == {"scalar": 1, "layerwise": 4, "diag": N}[structure]


def test_samples_have_the_posterior_covariance_and_follow_the_generator():
    ours, theirs, _ = fitted("regression", sigma_noise=0.6)
    draws = [ours.sample(4000, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    close(draws[0].mean(0), ours.mean, 0.1)
    covariance = theirs.posterior_covariance
    off = torch.cov(draws[0].T) - covariance
    assert torch.linalg.norm(off) < 0.2 * torch.linalg.norm(covariance)


def test_a_state_is_loaded_and_a_smaller_prior_is_warned_of():
    model, loader, x = problem("classification")
    ours = CompressedLaplace(model, "classification")
    ours.fit(loader)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    again = CompressedLaplace(model, "classification")
    again.load_state_dict(torch.load(file, weights_only=False))
    close(again.log_marginal_likelihood(), ours.log_marginal_likelihood(), 1e-14)
    close(again(x), ours(x), 1e-14)
    error = again.H.report.spectral_error
    if error > 1e-9:
        with pytest.warns(AccuracyWarning, match="make it again"):
            again.log_marginal_likelihood(torch.tensor(error))


def test_parameters_that_need_no_gradient_are_left_out():
    model, loader, x = problem("classification")
    for p in model[0].parameters():
        p.requires_grad_(False)
    found = []
    for structure, more in (("gpu_hodlr", {"compression": TIGHT}), ("full", {})):
        each = laplace.Laplace(
            copy.deepcopy(model), "classification", "all", structure, prior_precision=0.4, **more
        )
        each.fit(loader)
        found.append((each.log_marginal_likelihood(), each(x)))
    close(found[0][0], found[1][0])
    close(found[0][1], found[1][1])


def test_float32():
    model, loader, x = problem("classification", torch.float32)
    ours = CompressedLaplace(model, "classification")
    ours.fit(loader)
    assert ours.log_marginal_likelihood().dtype == torch.float32
    assert ours.sample(2).dtype == ours(x).dtype == torch.float32


def test_refusals():
    model, loader, _ = problem("classification")
    with pytest.raises(ArgumentError, match="enable_backprop"):
        CompressedLaplace(model, "classification", enable_backprop=True)
    with pytest.raises(ArgumentError, match="likelihood must be one of"):
        CompressedLaplace(model, "reward_modeling")
    ours = CompressedLaplace(model, "classification")
    with pytest.raises(AttributeError, match="not fitted"):
        ours.log_marginal_likelihood()
    with pytest.raises(AttributeError, match="not fitted"):
        ours.state_dict()
    with pytest.raises(ArgumentError, match="override must be True"):
        ours.fit(loader, override=False)
    with pytest.raises(ArgumentError, match="pairs of tensors"):
        ours.fit([{"input_ids": 1}])
