"""Pruning of models that are not plain: the loss told is that of the model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
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
from torch.nn.utils import parametrizations, prune  # noqa: E402

from gpu_hodlr.applications.pruning import quadratic, surgery  # noqa: E402
from gpu_hodlr.applications.pruning.choice import WholeUnits  # noqa: E402
from gpu_hodlr.applications.pruning.units import Units, units_of  # noqa: E402
from gpu_hodlr.applications.pruning.weights import Weights  # noqa: E402
from gpu_hodlr.networks.curvature import Reading  # noqa: E402

LOSS = nn.functional.cross_entropy


def data() -> tuple[Any, Any]:
    with seeded():
        x, y = torch.randn(30, 6, dtype=torch.float64), torch.arange(30) % 3
    x[:, 0] += 1.5 * y
    return x, y


def layers(act: Any = nn.Tanh) -> Any:
    made = nn.Linear(6, 6), act(), nn.Linear(6, 4), act(), nn.Linear(4, 3)
    return nn.Sequential(*made)


def fresh(make: Callable[..., Any] = layers, *args: Any) -> Any:
    """A model of weights that are always the same."""
    with seeded():
        return make(*args).double().eval()


class Scaled(nn.Module):
    """With a parameter that has no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.tensor(1.5)), nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        assert self.scale.ndim == 0
        return self.scale * self.layer(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.layer = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Any) -> Any:
        return self.layer(self.cell(x.reshape(len(x), 3, 2))[0][:, -1])


class Tied(nn.Module):
    """Two hidden layers of one weight; one of them may have a mask of its own."""

    def __init__(self, last: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.last = nn.Identity() if last else nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def half_masked() -> Any:
    model = Tied()
    prune.l1_unstructured(model.first, "weight", amount=0.3)
    return model


def spectral(wrap: Callable[[Any], Any]) -> Any:
    model = layers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old one is deprecated
        model[0] = wrap(model[0])
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "a scalar": Scaled,
    "recurrent": Recurrent,
    "tied": Tied,
    "a mask in one of two places": half_masked,
    "spectral norm": lambda: spectral(parametrizations.spectral_norm),
    "spectral norm as it was": lambda: spectral(nn.utils.spectral_norm),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_increase_is_that_of_the_model(name: str):
    x, y = data()
    model = fresh(MODELS[name])
    before = float(LOSS(model(x), y).detach())
    found = gh.prune(model, "cross_entropy", (x, y), 0.5, damping=1e-2)
    assert found.increase == pytest.approx(float(LOSS(model(x), y).detach()) - before, abs=1e-12)
    assert sum(int((~mask).sum()) for mask in found.masks.values()) == round(
        found.fraction * found.count
    )
    buffers = dict(model.named_buffers())
    for mask_name, mask in found.masks.items():
        assert bool((buffers[f"{mask_name}_mask"].bool() <= mask).all())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_as_it_is_stored(kind: Any):
    """The update is rounded to what the model holds."""
    x = data()[0].to(kind)
    y, loss = torch.tanh(x[:, :3]), nn.functional.mse_loss
    model = fresh().to(kind)
    plain, wide = copy.deepcopy(model).float(), x.float()
    found = gh.prune(model, "mse", (x, y), 0.3, damping=1e-2)
    for layer in (model[0], model[2], model[4]):
        prune.remove(layer, "weight")
        assert layer.weight.dtype == kind
    with torch.no_grad():
        increase = float(loss(model.float()(wide), y.float()) - loss(plain(wide), y.float()))
    assert increase < 0
    assert found.increase == pytest.approx(increase, abs=1e-6)


def test_a_norm_of_nothing_is_refused():
    """A row of zeros has no direction: the model stays as it is, and others can be pruned."""
    model = fresh()
    model[0] = parametrizations.weight_norm(model[0])
    before = {name: p.clone() for name, p in model.state_dict().items()}
    refused(
        ArgumentError,
        lambda: gh.prune(model, "cross_entropy", data(), 0.9, damping=1e-2, update=False),
        "the loss of the pruned network would be nan",
    )
    assert all(bool((model.state_dict()[name] == p).all()) for name, p in before.items())
    assert not prune.is_pruned(model)
    found = gh.prune(model, "cross_entropy", data(), 0.5, params=["2.weight"])
    assert np.isfinite(found.increase)


def test_units_of_a_weight_in_two_places_are_one():
    model = fresh(Tied)
    x, y = data()
    before = float(LOSS(model(x), y).detach())
    found = gh.prune(model, "cross_entropy", (x, y), 0.5, structured=True, damping=1e-2)
    assert (found.count, found.fraction) == (6, 0.5)
    assert found.increase == pytest.approx(float(LOSS(model(x), y).detach()) - before, abs=1e-12)
    dead = model.first.weight.abs().sum(1) == 0
    assert int(dead.sum()) == 3
    for layer in (model.first, model.second):
        np.testing.assert_array_equal(layer.bias.detach() == 0, dead)
    np.testing.assert_array_equal((model.last.weight == 0).all(0), dead)
    live = model.first.weight[~dead]  # its columns read the data in one of the two places
    assert bool((live != 0).all())
    model = fresh(Tied, True)
    refused(
        ArgumentError,
        lambda: gh.prune(model, "cross_entropy", (x, y % 3), 0.5, structured=True),
        "structured=True prunes units of",
    )


class Tokens(nn.Module):
    """The table of the embedding reads the hidden units as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Any) -> Any:
        return self.head(torch.relu(self.hidden(self.table(tokens).mean(1))))


def test_what_reads_a_unit_and_is_a_table_too_is_not_idle():
    model = fresh(Tokens)
    with seeded():
        tokens = torch.randint(7, (30, 3))
    found = gh.prune(
        model, "cross_entropy", (tokens, tokens[:, 0]), 0.5, structured=True, damping=1e-2
    )
    assert sorted(found.masks) == ["hidden.bias", "hidden.weight"]


def test_units_are_pruned_again_with_their_biases():
    """Which have masks since the first time."""
    x, y = data()
    model = fresh(layers, nn.ReLU)
    for fraction in (0.3, 0.6):
        found = gh.prune(model, "cross_entropy", (x, y), fraction, structured=True, damping=1e-2)
    assert (found.count, round(10 * found.fraction)) == (10, 6)
    dead = 0
    for i in (0, 2):
        rows = model[i].weight.abs().sum(1) == 0
        assert bool((model[i].bias[rows] == 0).all())
        assert bool((model[i + 2].weight[:, rows] == 0).all())
        dead += int(rows.sum())
    assert dead == 6


@pytest.mark.parametrize("structured", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any, structured: bool):
    """The same masks and weights, which can be trained afterwards."""
    x, y = data()
    models = fresh(layers, nn.ReLU), fresh(layers, nn.ReLU)
    options: dict[str, Any] = {"damping": 1e-2, "structured": structured}
    want = gh.prune(models[0], "cross_entropy", (x, y), 0.5, **options)
    with mode():
        found = gh.prune(models[1], "cross_entropy", (x, y), 0.5, **options)
    assert found.increase == want.increase
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        assert torch.equal(one, other)
    LOSS(models[1](x), y).backward()
    torch.optim.SGD(models[1].parameters(), lr=0.1).step()


def test_the_prediction_of_units_leaves_out_what_reads_them(monkeypatch: pytest.MonkeyPatch):
    """Without those units it does nothing, and costs nothing."""
    monkeypatch.setattr(surgery, "_STEPS", 1)
    x, y = data()
    model = fresh(layers, nn.ReLU)
    G = gh.GGNOperator(model, "cross_entropy", x, y).to_dense()
    before = [p.detach().clone() for p in model.parameters()]
    found = gh.prune(
        model, "cross_entropy", (x, y), 0.5, structured=True, damping=1e-2, update=False
    )
    parts = []
    for i in (0, 2, 4):
        weight, bias = before[i], before[i + 1]
        rows = (model[i].weight == 0).all(1)
        parts += [(weight * rows[:, None]).ravel(), bias * rows]
    delta = torch.cat(parts).numpy()
    assert delta.any()
    assert found.predicted_increase == pytest.approx(0.5 * delta @ G @ delta, rel=1e-9)


def test_the_damping_is_three_per_cent_of_the_mean_of_the_diagonal():
    x, y = data()
    models = fresh(), fresh()
    damping = 0.03 * float(gh.GGNOperator(models[0], "cross_entropy", x, y).diagonal().mean())
    found = [
        gh.prune(model, "cross_entropy", (x, y), 0.5, **options)
        for model, options in zip(models, ({}, {"damping": damping}), strict=True)
    ]
    assert found[0].predicted_increase == pytest.approx(found[1].predicted_increase, rel=1e-6)
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        np.testing.assert_allclose(one.detach(), other.detach(), rtol=0, atol=1e-7)


def test_units_are_solved_for_some_at_a_time(monkeypatch: pytest.MonkeyPatch):
    x, y = data()
    models = fresh(layers, nn.ReLU), fresh(layers, nn.ReLU)
    for model in models:
        gh.prune(model, "cross_entropy", (x, y), 0.5, structured=True, damping=1e-2)
        monkeypatch.setattr(quadratic, "_UNITS_BYTES", 8 * 8 * 85 * 3)  # three units of ten
    for one, other in zip(*(m.parameters() for m in models), strict=True):
        np.testing.assert_allclose(one.detach(), other.detach(), rtol=0, atol=1e-9)


def test_a_warning_names_the_users_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quadratic, "_MOST", 1)
    with pytest.warns(AccuracyWarning, match="the residual of the weights' update") as found:
        gh.prune(fresh(), "cross_entropy", data(), 0.5, rtol=0.5)
    assert {warning.filename for warning in found} == {__file__}


class Mixed(nn.Module):
    """Hidden units, read in another order."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.first, self.last, self.order = nn.Linear(6, 4), nn.Linear(4, 3), order

    def forward(self, x: Any) -> Any:
        return self.last(torch.relu(self.first(x))[:, self.order])


def convolution() -> Any:
    layers = nn.Conv1d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3)
    return nn.Sequential(nn.Unflatten(1, (1, 6)), *layers)


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (lambda: Mixed([0, 1, 2, 3]), [0, 1, 2, 3]),
        (lambda: Mixed([0, 2, 1, 3]), [0, 2, 1, -1]),  # nothing says where the last one is read
        (convolution, np.repeat([0, 1, 2], 4)),
    ],
    ids=["in order", "in another", "several each"],
)
def test_what_reads_a_unit_that_is_silent(make: Callable[[], Any], want: Any):
    """At every sample: as it would by the order of the others, if they are in order."""
    model, (x, y) = fresh(make), data()
    hidden = next(m for m in model.modules() if hasattr(m, "weight"))
    with torch.no_grad():
        hidden.bias[-1] = -100.0
    reading = Reading(
        model, "cross_entropy", x, y, params=None, output=None, reduction=None, num_data=None,
        dtype=None, entries="auto", seed=0,
    )  # fmt: skip
    weights = Weights(model, None, False)
    units = units_of(weights, reading.network, next(iter(reading.data)))
    last = weights.split(units.readers)[[*weights.tensors][2]]
    np.testing.assert_array_equal(last, np.broadcast_to(want, last.shape))


@pytest.mark.parametrize(
    ("sizes", "left", "kept"),
    [
        ([2, 20], 11, [1, *range(12, 22)]),  # a layer keeps half of half, one of two
        ([1] * 9 + [40], 10, [*range(9), 48]),  # half of 40 and one of each were too many
    ],
)
def test_every_layer_keeps_a_unit(sizes: list[int], left: int, kept: list[int]):
    count = sum(sizes)
    units = Units(np.repeat(np.arange(len(sizes)), sizes), np.arange(count), np.full(count, -1))
    choice = WholeUnits(units, fraction=(count - left) / count)
    costs: Any = SimpleNamespace(unit_costs=lambda *_: np.arange(float(count)))
    items = choice.cheapest(costs, np.ones(count), np.ones(count, bool), left)
    np.testing.assert_array_equal(np.nonzero(~items)[0], kept)
