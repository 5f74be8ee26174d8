"""Laplace's approximation of networks that are no chain of layers."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.applications.laplace import curvature

torch = pytest.importorskip("torch")
from laplace_cases import Dense, problem  # noqa: E402
from seeds import seeded  # noqa: E402
from torch import nn  # noqa: E402

TIGHT: dict[str, Any] = {"rtol": 1e-12, "leaf_size": 10, "scheme": "hss"}


def drawn(*shape: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def evidence(op: gh.GGNOperator, fit: float, theta: Any, prior: float) -> float:
    """Dense."""
    n, G = op.shape[0], op.to_dense()
    half = n * np.log(prior) - np.linalg.slogdet(G + prior * np.eye(n))[1]
    return float(fit - 0.5 * prior * (theta**2).sum() + 0.5 * half)


class Sentences(nn.Module):
    """(n, T, 4) -> (n, T, classes), every token on its own but for its sentence's mean."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Any) -> Any:
        h = torch.tanh(self.inner(x))
        return self.outer(h + h.mean(dim=1, keepdim=True))


def test_classes_last():
    torch.manual_seed(0)
    model = Sentences().double()
    x, y = drawn(9, 6, 4), torch.randint(3, (9, 6))
    posterior = gh.Laplace(model, "cross_entropy", (x, y), 0.5, **TIGHT)
    fit = -nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum")
    theta = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    op = gh.GGNOperator(model, "cross_entropy", x, y, reduction="sum")
    want = evidence(op, float(fit.detach()), theta, 0.5)
    np.testing.assert_allclose(posterior.log_marginal_likelihood(), want, rtol=1e-9)
    for link in ("probit", "mc"):
        found = posterior.predict(x[:2], link=link, covariance=True, num_samples=50)
        assert found.probabilities.shape == (2, 6, 3)
        np.testing.assert_allclose(found.probabilities.sum(2), 1.0, rtol=1e-12)
    J = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(
            model,
            {"inner.weight": w[:20].reshape(5, 4), "inner.bias": w[20:25],
             "outer.weight": w[25:40].reshape(3, 5), "outer.bias": w[40:]},
            x[:2],
        ).reshape(2, 18),
        torch.from_numpy(theta),
    ).numpy()  # fmt: skip
    inverse = np.linalg.inv(op.to_dense() + 0.5 * np.eye(43))
    want_covariance = np.einsum("ndp,pq,neq->nde", J, inverse, J)
    np.testing.assert_allclose(found.covariance, want_covariance, rtol=1e-7, atol=1e-9)


def test_a_function_of_a_dict():
    params = {"w": drawn(3, 2, seed=1), "b": drawn(2, seed=2)}
    x, y = drawn(20, 3), drawn(20, 2, seed=3)

    def model(p: Any, x: Any) -> Any:
        return x @ p["w"] + p["b"]

    posterior = gh.Laplace(model, "mse", (x, y), {"w": 0.5, "b": 2.0}, params=params, **TIGHT)
    features = torch.cat([x, torch.ones(20, 1, dtype=x.dtype)], 1)
    block = 2 * features.T @ features + torch.diag(torch.tensor([0.5] * 3 + [2.0]))
    new = torch.tensor([[1.0, -1.0, 0.5, 1.0]], dtype=torch.float64)
    want = new @ torch.linalg.inv(block) @ new.T
    found = posterior.predict(new[:, :3]).variance
    np.testing.assert_allclose(found, want.expand(1, 2), rtol=1e-9)
    best = posterior.optimize_prior_precision("layer")
    assert sorted(best) == ["b", "w"]


@pytest.mark.parametrize("entries", ["root", "none"])
def test_a_convolution(entries: str):
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 1)
    model = nn.Sequential(*layers).double()
    x, y = drawn(25, 1, 6, 6), (drawn(25, 1, seed=1) > 0).double()
    loss = nn.BCEWithLogitsLoss()
    pairs = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=10)
    posterior = gh.Laplace(model, loss, pairs, 0.3, entries=entries, **TIGHT)
    theta = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    op = gh.GGNOperator(model, loss, x, y, reduction="sum", entries="dense")
    fit = -float(
        nn.functional.binary_cross_entropy_with_logits(model(x), y, reduction="sum").detach()
    )
    np.testing.assert_allclose(
        posterior.log_marginal_likelihood(), evidence(op, fit, theta, 0.3), rtol=1e-8
    )
    assert posterior.num_data == 25
    assert posterior.predict(x[:3]).probabilities.shape == (3, 1)


def test_batch_normalization_keeps_its_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = drawn(30, 3)
    model(x)
    with pytest.raises(gh.errors.UnsupportedLayerError, match=r"model\.eval"):
        gh.Laplace(model, "mse", (x, x[:, :1]))
    before = {name: t.clone() for name, t in model.eval().state_dict().items()}
    posterior = gh.Laplace(model, "mse", (x, x[:, :1]), 0.3, **TIGHT)
    posterior.predict(x)
    posterior.optimize_prior_precision("layer")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert sorted(posterior.prior_precision) == ["0", "1", "3"]


def test_in_the_eigenbasis():
    """Determinant and traces are estimates there, with their standard errors."""
    model, loss, data = problem()
    dense = Dense(model, "cross_entropy", data)
    posterior = gh.Laplace(model, loss, data, 1.0, "kfe", rtol=1e-8)
    value, slope = posterior.log_marginal_likelihood(gradient=True)
    F = posterior.factor
    assert abs(value - dense.evidence(1.0)) <= 2 * F.logdet_error + 1e-6
    step = 1e-5
    ends = (dense.evidence(np.exp(e)) for e in (step, -step))
    want = float(np.diff(list(ends))[0]) / (-2 * step)
    assert abs(slope - want) <= 2 * F.logdet_gradient_error + 1e-5
    J = dense.jacobian(model, data[0][:4])
    covariance = dense.covariance(1.0, J)
    found = posterior.predict(data[0][:4], covariance=True)
    np.testing.assert_allclose(found.covariance, covariance, rtol=1e-4, atol=1e-5)


def test_a_near_field_has_no_evidence():
    model, loss, data = problem()
    options: dict[str, Any] = {"scheme": "fmm", "budget": 0.3, "leaf_size": 10, "rtol": 1e-8}
    posterior = gh.Laplace(model, loss, data, 1.0, **options)
    with pytest.raises(gh.errors.InexactError):
        posterior.log_marginal_likelihood()


def falling() -> Any:
    """A network of N = 1,323 and 50 samples: 100 rows, whose eigenvalues fall fast."""
    with seeded():
        model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 3)).double()
    return model, drawn(50, 40) * torch.logspace(0, -4, 40), torch.arange(50) % 3


@pytest.mark.parametrize("scheme", ["auto", "lowrank"])
def test_few_rows_of_a_root(monkeypatch: pytest.MonkeyPatch, scheme: str):
    """Beyond what HSS is taken for: next to nothing is left out, and the evidence right to 0.01."""
    monkeypatch.setattr(curvature, "_SMALL", 100)
    model, x, y = falling()
    op = gh.GGNOperator(model, "cross_entropy", x, y, reduction="sum", entries="dense")
    values, vectors = np.linalg.eigh(op.to_dense())
    theta = nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    fit = -nn.functional.cross_entropy(model(x), y, reduction="sum").item()
    posterior = gh.Laplace(model, "cross_entropy", (x, y), 1.0, scheme)
    assert posterior.matrix.report.scheme == "lowrank"
    assert posterior.matrix.structure.D is None
    for prior in (1.0, 7.0, 0.2, 1e-3):
        half = np.log1p(values.clip(0) / prior).sum()
        want = fit - 0.5 * prior * theta @ theta - 0.5 * half
        assert abs(posterior.log_marginal_likelihood(prior) - want) < 1e-2
        assert posterior.matrix.report.damping <= prior  # made again for a smaller one
    assert posterior.evidence_error()[0] < 1e-2
    gradient = torch.autograd.grad(model(x[:1])[0, 0], list(model.parameters()))
    j = torch.cat([g.flatten() for g in gradient]).numpy() @ vectors
    found = posterior.predict(x[:1]).variance[0, 0]
    np.testing.assert_allclose(found, (j**2 / (values.clip(0) + 1)).sum(), rtol=1e-3)


def test_what_is_given_of_low_rank_counts():
    """Few rows do not change a tolerance, a rank or a tail that a user gives."""
    model, *data = falling()
    rank = {}
    for name, options in {"none": {}, "rtol": {"rtol": 0.3}, "tail": {"tail": "diagonal"}}.items():
        found = gh.Laplace(model, "cross_entropy", tuple(data), 1.0, "lowrank", **options)
        rank[name] = found.matrix.ranks[0][0]
    assert rank["rtol"] < rank["none"]
    assert rank["tail"] < rank["none"]
    found = gh.Laplace(model, "cross_entropy", tuple(data), 1.0, "lowrank", max_rank=101)
    assert found.matrix.structure.D is not None


def test_few_rows_on_ranks():
    """Every rank has the same; the tolerance is not what the ranks' number changes."""
    model, *data = falling()

    def run(comm: Any) -> list[float]:
        posterior = gh.Laplace(
            copy.deepcopy(model), "cross_entropy", tuple(data), 1.0, "lowrank", comm=comm
        )
        value, slope = posterior.log_marginal_likelihood(0.2, gradient=True)
        return [value, slope, posterior.optimize_prior_precision(), posterior.num_effective]

    alone, every = run(None), on_threads(2, run)
    assert every[0] == every[1]
    np.testing.assert_allclose(every[0], alone, rtol=1e-8)


def test_few_rows_in_float32():
    """There is no warning of a tolerance that float32 cannot reach, which nobody asked for."""
    model, x, y = falling()
    wide = gh.Laplace(model, "cross_entropy", (x, y), 5e-3, "lowrank").log_marginal_likelihood()
    posterior = gh.Laplace(model.float(), "cross_entropy", (x.float(), y), 5e-3, "lowrank")
    assert posterior.matrix.dtype == np.float32
    assert abs(posterior.log_marginal_likelihood() - wide) < 0.1
