"""Pruning of whole units and channels."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gpu_hodlr as gh

torch = pytest.importorskip("torch")
from pruning_cases import (  # noqa: E402
    DAMPING,
    EXACT,
    data,
    hessian,
    kept_of,
    trained,
    values,
    vector,
    whole_steps,  # noqa: F401  a fixture
)
from seeds import seeded  # noqa: E402
from torch import nn  # noqa: E402

from gpu_hodlr.applications.pruning import quadratic as module  # noqa: E402
from gpu_hodlr.applications.pruning import surgery  # noqa: E402
from gpu_hodlr.applications.pruning.choice import WholeUnits  # noqa: E402
from gpu_hodlr.applications.pruning.quadratic import Quadratic  # noqa: E402
from gpu_hodlr.applications.pruning.units import Units, units_of  # noqa: E402
from gpu_hodlr.applications.pruning.weights import Weights  # noqa: E402
from gpu_hodlr.distributed import communicator  # noqa: E402
from gpu_hodlr.networks.curvature import Reading  # noqa: E402


def test_units_cost_what_a_dense_matrix_says(monkeypatch: pytest.MonkeyPatch):
    model = trained(nn.ReLU)
    x, y = data()
    reading = Reading(
        model, "cross_entropy", x, y, params=None, output=None, reduction=None, num_data=None,
        dtype=None, entries="auto", seed=0,
    )  # fmt: skip
    units = units_of(Weights(model, None, False), reading.network, next(iter(reading.data)))
    assert units.layer.tolist() == [0] * 8 + [1] * 5
    names = {name: i for i, (name, _) in enumerate(model.named_parameters())}
    starts = np.cumsum([0] + [p.numel() for p in model.parameters()])
    own, readers = (
        [a[starts[names[n]] :][: p.numel()].reshape(p.shape) for n, p in model.named_parameters()]
        for a in (units.own, units.readers)
    )
    np.testing.assert_array_equal(own[0], np.arange(8)[:, None].repeat(6, 1))
    np.testing.assert_array_equal(own[3], 8 + np.arange(5))
    assert (own[4] == -1).all()
    assert (readers[0] == -1).all()
    np.testing.assert_array_equal(readers[2], np.arange(8) + np.zeros((5, 1)))
    op = gh.GGNOperator(model, "cross_entropy", x, y)
    options = {"seed": 0, **EXACT}
    quadratic = Quadratic(op, options, DAMPING, communicator(None, "cpu"), None)
    theta, H, kept = vector(model), hessian(model), np.ones(119, bool)
    kept[:3] = False
    theta[:3] = 0.0
    owners = np.where(kept, units.own, -1)
    rough = quadratic.unit_costs(theta, owners, units.count, kept)
    monkeypatch.setattr(module, "_UNIT_RTOL", 1e-10)
    monkeypatch.setattr(module, "_UNIT_STEPS", 1000)
    costs = quadratic.unit_costs(theta, owners, units.count, kept)
    assert (rough > 0.95 * costs).all()
    assert (rough < 1.3 * costs).all()
    index = np.nonzero(kept)[0]
    inverse = np.linalg.inv(H[np.ix_(index, index)])
    for unit in range(units.count):
        S = owners[index] == unit
        w = theta[index][S]
        want = 0.5 * w @ np.linalg.solve(inverse[np.ix_(S, S)], w)
        assert costs[unit] == pytest.approx(want, rel=1e-6)


def test_no_layer_loses_nearly_all_units():
    """Where one layer's are the cheapest of all, it still keeps half of what all keep."""
    layer = np.repeat([0, 1], [8, 12])
    choice = WholeUnits(Units(layer, own=np.arange(20), readers=np.full(20, -1)), fraction=0.5)
    costs = SimpleNamespace(unit_costs=lambda *args: np.arange(20.0))
    items = choice.cheapest(costs, np.ones(20), np.ones(20, bool), 10)
    np.testing.assert_array_equal(np.nonzero(items)[0], [0, 1, 2, 3, 4, 5, 8, 9, 10, 11])
    assert choice.least == 2
    layer = np.repeat([0, 1, 2, 3], [1, 1, 1, 40])  # half of 4 and one of each are 5
    choice = WholeUnits(Units(layer, np.arange(43), np.full(43, -1)), fraction=39 / 43)
    costs = SimpleNamespace(unit_costs=lambda *args: np.arange(43.0))
    items = choice.cheapest(costs, np.ones(43), np.ones(43, bool), 4)
    np.testing.assert_array_equal(np.nonzero(~items)[0], [0, 1, 2, 42])


def test_whole_units():
    """Rows, biases and what reads them; the pruned network is the one without those units."""
    model = trained(nn.ReLU)
    found = gh.prune(model, "cross_entropy", data(), 6 / 13, structured=True, damping=DAMPING)
    assert (found.count, found.what, round(13 * found.fraction)) == (13, "units", 6)
    x = data()[0]
    first, second = (model[i].weight.detach().abs().sum(1) > 0 for i in (0, 2))
    assert int(first.sum() + second.sum()) == 7
    assert bool((model[0].bias[~first] == 0).all())
    assert bool((model[2].bias[~second] == 0).all())
    for layer, gone in ((2, ~first), (4, ~second)):
        assert bool((model[layer].weight.detach()[:, gone] == 0).all())
    smaller = nn.functional.linear(x, model[0].weight[first], model[0].bias[first]).relu()
    smaller = nn.functional.linear(
        smaller, model[2].weight[second][:, first], model[2].bias[second]
    )
    smaller = nn.functional.linear(smaller.relu(), model[4].weight[:, second], model[4].bias)
    np.testing.assert_allclose(smaller.detach(), model(x).detach(), rtol=1e-12, atol=1e-12)
    assert "4.bias" not in found.masks


@pytest.mark.usefixtures("whole_steps")
def test_the_update_of_units_leaves_what_reads_them():
    """What reads a unit of zeros cannot make good anything: it is no part of the update."""
    one = surgery._STEPS
    model = trained(nn.ReLU)
    plain = copy.deepcopy(model)
    surgery._STEPS = 1
    try:
        found = gh.prune(
            model, "cross_entropy", data(), 5 / 13, structured=True, damping=DAMPING, **EXACT
        )
    finally:
        surgery._STEPS = one
    theta, H = vector(plain), hessian(plain)
    kept = kept_of(plain, found.masks)
    rows = np.zeros(119, bool)  # pruned rows and biases
    start = 0
    gone: list[Any] = [None, None, None]
    for i, layer in enumerate((plain[0], plain[2], plain[4])):
        for p in (layer.weight, layer.bias):
            block = ~kept[start : start + p.numel()].reshape(len(p), -1)
            if p is layer.weight:
                gone[i] = block.all(1)
            rows[start : start + p.numel()] = np.repeat(gone[i], block.shape[1])
            start += p.numel()
    assert rows.any()
    want = np.zeros(119)
    index = np.nonzero(kept)[0]
    want[index] = theta[index] + np.linalg.solve(
        H[np.ix_(index, index)], (H[:, rows] @ theta[rows])[index]
    )
    np.testing.assert_allclose(values(model), want, rtol=0, atol=1e-6)


def test_channels_of_a_convolution():
    with seeded():
        layers = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten()
        model = nn.Sequential(*layers, nn.Linear(12, 3)).double()
    x = torch.rand(40, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = gh.prune(model, "cross_entropy", (x, data(40)[1]), 3 / 7, structured=True, damping=0.1)
    assert (found.count, round(7 * found.fraction)) == (7, 3)
    first, second = (model[i].weight.detach().flatten(1).abs().sum(1) > 0 for i in (0, 2))
    assert int(first.sum() + second.sum()) == 4
    made = model[3](model[2](model[1](model[0](x)))).detach()
    read = (made != 0).any(0).flatten()
    dead = ~second.repeat_interleave(4)
    assert not bool((read & dead).any())
    assert bool((model[2].weight.detach()[:, ~first] == 0).all())


class Heads(nn.Module):
    """Two layers that both have outputs, one beside or one added to the other."""

    def __init__(self, beside: bool) -> None:
        super().__init__()
        self.trunk, self.beside = nn.Linear(6, 8), beside
        self.heads = nn.ModuleList([nn.Linear(8, 2 if beside else 3), nn.Linear(8, 3)])

    def forward(self, x: Any) -> Any:
        h = torch.relu_(self.trunk(x))
        one, other = (head(h) for head in self.heads)
        return torch.cat([other, one], 1) if self.beside else one + other


@pytest.mark.parametrize("beside", [True, False])
def test_units_that_are_outputs_stay_in_every_layer(beside: bool):
    with seeded():
        model = Heads(beside).double()
    x, y = data()
    found = gh.prune(model, "cross_entropy", (x, y % 3), 0.5, structured=True)
    assert found.count == 8  # the trunk's
    kept = model.trunk.weight_mask.bool().all(1)
    assert int(kept.sum()) == 4
    for head in model.heads:
        np.testing.assert_array_equal(head.weight_mask.bool(), kept.expand(len(head.weight), 8))
