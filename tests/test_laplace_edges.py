"""Laplace's approximation where a wrong number would look right: against dense float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_bad_input import refused

import gpu_hodlr as gh
from gpu_hodlr.errors import AccuracyWarning, ArgumentError

torch = pytest.importorskip("torch")
from seeds import seeded  # noqa: E402
from torch import nn  # noqa: E402

from gpu_hodlr.applications.laplace.curvature import Curvature  # noqa: E402
from gpu_hodlr.applications.laplace.prior import Prior  # noqa: E402

EXACT: dict[str, Any] = {"scheme": "hss", "rtol": 1e-13, "leaf_size": 10}


def problem() -> tuple[Any, Any]:
    """4 - 3 - 3, N = 27, and 20 samples of three classes."""
    with seeded():
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
        x = torch.randn(20, 4, dtype=torch.float64)
    return model, (x, torch.arange(20) % 3)


def dense_evidence(posterior: gh.Laplace, op: gh.GGNOperator, prior: float) -> float:
    G, theta = op.to_dense(), posterior.mean
    n = len(G)
    half = n * np.log(prior) - np.linalg.slogdet(G + prior * np.eye(n))[1]
    return float(posterior.log_likelihood - 0.5 * prior * theta @ theta + 0.5 * half)


def test_the_error_of_the_evidence_is_that_of_the_evidence_that_is_told():
    """Also after another prior has compressed the matrix again."""
    model, data = problem()
    op = gh.GGNOperator(model, "cross_entropy", *data, reduction="sum")
    options: dict[str, Any] = {"scheme": "lowrank", "max_rank": 27, "tail": "none"}
    posterior = gh.Laplace(model, "cross_entropy", data, 10.0, **options)
    wanted = dense_evidence(posterior, op, 10.0)
    coarse = posterior.log_marginal_likelihood()
    first = posterior.matrix
    posterior.log_marginal_likelihood(1e-3)
    assert posterior.matrix is not first
    off = posterior.log_marginal_likelihood() - wanted
    assert abs(off) < 1e-2 * abs(coarse - wanted)
    assert posterior.evidence_error(27)[0] == pytest.approx(off, rel=1e-2)


def test_an_array_that_changes_later_is_another_prior():
    model, data = problem()
    given = np.full(27, 2.0)
    posterior = gh.Laplace(model, "cross_entropy", data, given, **EXACT)
    value = posterior.log_marginal_likelihood()
    given[:] = 1e-2
    assert posterior.fit().log_marginal_likelihood() == value
    posterior.prior_precision[:] = 1e-2
    assert posterior.fit().log_marginal_likelihood() == value


@pytest.mark.parametrize("entries", ["auto", "khatri-rao", "root", "dense", "none"])
def test_likelihood_and_matrix_are_of_the_same_samples(entries: str):
    """A loader that draws with replacement gives others at every pass."""
    model, data = problem()
    pairs = torch.utils.data.TensorDataset(*data)
    drawn = torch.utils.data.RandomSampler(
        pairs, replacement=True, num_samples=20, generator=torch.Generator().manual_seed(0)
    )
    loader = torch.utils.data.DataLoader(pairs, batch_size=7, sampler=drawn)
    refused(
        ArgumentError,
        lambda: gh.Laplace(model, "cross_entropy", loader, entries=entries),
        "data gave other inputs in this pass than in the first",
    )
    shuffled = torch.utils.data.DataLoader(pairs, batch_size=7, shuffle=True)
    whole, parts = (
        gh.Laplace(model, "cross_entropy", d, entries=entries, **EXACT) for d in (data, shuffled)
    )
    assert parts.log_marginal_likelihood() == pytest.approx(
        whole.log_marginal_likelihood(), rel=1e-12
    )


class Pair(nn.Module):
    """Two heads of the same weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Any) -> tuple[Any, Any]:
        y = self.layer(x)
        return y, 2 * y


def test_a_file_is_of_layers_and_outputs_too(tmp_path: Path):
    """Others with the same weights are another function."""
    model, data = problem()
    path = tmp_path / "posterior.npz"
    gh.Laplace(model, "cross_entropy", data, **EXACT).save(path)
    gh.Laplace.load(path, model.train())
    for other in (nn.ReLU(), nn.LeakyReLU(0.3)):
        changed = nn.Sequential(model[0], other, model[2])
        refused(ArgumentError, lambda m=changed: gh.Laplace.load(path, m), "model: its weights")
    pair = Pair()
    for output in (0, None):
        given: Any = pair if output == 0 else pair.layer
        gh.Laplace(given, "cross_entropy", data, output=output, **EXACT).save(path)
        gh.Laplace.load(path, given, output=output)
        refused(ArgumentError, lambda: gh.Laplace.load(path, pair, output=1), "params= or output=")


def test_one_class_and_one_sample():
    """One class tells nothing of the weights; one sample as much as its outputs."""
    model, (x, y) = problem()
    alone = nn.Sequential(*model[:2], nn.Linear(3, 1).double())
    posterior = gh.Laplace(alone, "cross_entropy", (x, 0 * y), 2.0)
    theta = posterior.mean
    assert posterior.log_marginal_likelihood() == pytest.approx(-theta @ theta, rel=1e-12)
    assert posterior.num_effective == pytest.approx(0, abs=1e-12)
    found = posterior.predict(x[:2])
    assert bool((found.probabilities == 1).all())
    J = torch.autograd.functional.jacobian(
        lambda *p: torch.func.functional_call(
            alone, dict(zip(dict(alone.named_parameters()), p, strict=True)), x[:1]
        )[0, 0],
        tuple(alone.parameters()),
    )
    square = float(sum((j**2).sum() for j in J))
    assert float(found.variance[0, 0]) == pytest.approx(square / 2, rel=1e-10)
    one = gh.Laplace(model, "cross_entropy", (x[:1], y[:1]), 1.0, **EXACT)
    op = gh.GGNOperator(model, "cross_entropy", x[:1], y[:1], reduction="sum")
    assert one.log_marginal_likelihood() == pytest.approx(dense_evidence(one, op, 1.0), rel=1e-10)
    assert one.num_data == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any):
    model, data = problem()
    want = gh.Laplace(model, "cross_entropy", data, **EXACT)
    with mode():
        posterior = gh.Laplace(model, "cross_entropy", data, **EXACT)
        found = posterior.predict(data[0][:3], link="mc", num_samples=10)
    assert posterior.log_marginal_likelihood() == want.log_marginal_likelihood()
    wanted = want.predict(data[0][:3], link="mc", num_samples=10)
    np.testing.assert_allclose(found.variance, wanted.variance, rtol=1e-12)
    np.testing.assert_allclose(found.probabilities, wanted.probabilities, rtol=1e-12)


def test_a_prior_of_no_layer_is_zero():
    model, data = problem()
    for name in ("0", "2"):
        zero = {"0": 1.0, "2": 1.0, name: 0.0}
        refused(
            ArgumentError,
            lambda p=zero: gh.Laplace(model, "cross_entropy", data, p),
            f"prior_precision['{name}'] must be > 0",
        )


def test_equal_precisions_are_one_number():
    """Which a factorization adds for less than one of every row."""
    sizes = {"0.weight": 4, "0.bias": 2, "2.weight": 3}
    assert Prior.read({"0": 2.0, "2": 2.0}, sizes).damping == 2.0
    np.testing.assert_array_equal(
        Prior.read({"0": 2.0, "2": 3.0}, sizes).damping, np.repeat([2.0, 3.0], [6, 3])
    )


@pytest.mark.parametrize(("n", "most"), [(53, 256), (1000, 500), (1_000_000, 2500)])
def test_ranks_by_default_are_half_of_all_within_bounds(n: int, most: int):
    op: Any = SimpleNamespace(shape=(n, n), has_diagonal=False)
    assert Curvature(op, None, {"scheme": "hss"})._options == {"scheme": "hss", "max_rank": most}


def test_an_error_of_more_than_a_tenth_of_the_prior_is_too_much():
    """A tenth more of it allowed, which it is measured within."""
    report = SimpleNamespace(spectral_error=1.0, damping=1.0)
    matrix: Any = SimpleNamespace(report=report)
    curvature = Curvature(None, matrix, {})
    assert [curvature._keeps(least) for least in (9.0, 9.2, 11.0)] == [False, True, True]


@pytest.mark.parametrize(("bounds", "end"), [((1e-6, 1e-3), 1e-3), ((1e3, 1e4), 1e3)])
def test_a_bound_is_all_that_is_said_of_it(bounds: tuple[float, float], end: float):
    """The evidence still grows there, which is no lack of convergence."""
    model, data = problem()
    posterior = gh.Laplace(model, "cross_entropy", data, 1.0, **EXACT)
    with pytest.warns(AccuracyWarning) as found:
        best = posterior.optimize_prior_precision(bounds=bounds)
    assert best == pytest.approx(end)
    assert len(found) == 1
    assert "ended at a bound" in str(found[0].message)
    assert found[0].filename == __file__


def test_a_likelihood_of_counts_has_its_constant():
    """log p of Poisson's distribution, with the factorial of every target."""
    model, (x, _) = problem()
    counts = (torch.arange(60) % 5).reshape(20, 3).double()
    with torch.no_grad():
        want = torch.distributions.Poisson(model(x).exp()).log_prob(counts).sum()
    loss = nn.PoissonNLLLoss()
    found = gh.Laplace(model, loss, (x, counts), **EXACT).log_likelihood
    assert found == pytest.approx(float(want), rel=1e-12)


CALLS: dict[str, Any] = {
    "num_effective": lambda p, _: p.num_effective,
    "factor": lambda p, _: p.factor,
    "log_marginal_likelihood": lambda p, _: p.log_marginal_likelihood(),
    "evidence_error": lambda p, _: p.evidence_error(2),  # as few as may be
    "sample": lambda p, _: p.sample(1),
    "predict": lambda p, x: p.predict(x),
}


@pytest.mark.filterwarnings("ignore::gpu_hodlr.errors.RankCapWarning")
@pytest.mark.parametrize("name", CALLS)
def test_a_warning_names_the_users_line(name: str):
    """Whichever call makes the factor of a prior that the matrix is too coarse for."""
    model, data = problem()
    options: dict[str, Any] = {"scheme": "lowrank", "max_rank": 5, "tail": "none"}
    with pytest.warns(AccuracyWarning):
        posterior = gh.Laplace(model, "cross_entropy", data, 1.0, **options)
    posterior.prior_precision = 0.02
    with pytest.warns(AccuracyWarning) as found:
        CALLS[name](posterior, data[0])
    own = [w for w in found if str(w.message).startswith("the Gauss-Newton")]
    where = __file__, CALLS[name].__code__.co_firstlineno
    assert {(warning.filename, warning.lineno) for warning in own} == {where}


def test_the_best_prior_is_one_to_a_thousandth():
    model, data = problem()
    posterior = gh.Laplace(model, "cross_entropy", data, 30.0, **EXACT)
    posterior.optimize_prior_precision()
    slope = posterior.log_marginal_likelihood(gradient=True)[1]
    assert abs(slope) <= 0.5e-3 * posterior.num_effective
