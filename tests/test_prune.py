"""Pruning of networks: against dense linear algebra, with torch's masks, on ranks."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_bad_input import refused
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.errors import AccuracyWarning, ArgumentError, DtypeError

torch = pytest.importorskip("torch")
from seeds import seeded  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parameters_to_vector, prune  # noqa: E402

from gpu_hodlr.applications.pruning import quadratic as module  # noqa: E402
from gpu_hodlr.applications.pruning import surgery  # noqa: E402
from gpu_hodlr.applications.pruning.choice import WholeUnits  # noqa: E402
from gpu_hodlr.applications.pruning.quadratic import Quadratic  # noqa: E402
from gpu_hodlr.applications.pruning.units import Units, units_of  # noqa: E402
from gpu_hodlr.applications.pruning.weights import Weights  # noqa: E402
from gpu_hodlr.distributed import communicator  # noqa: E402
from gpu_hodlr.networks.curvature import Reading  # noqa: E402

DAMPING = 1e-3
EXACT: dict[str, Any] = {"scheme": "hss", "rtol": 1e-12, "leaf_size": 16, "max_rank": 200}


def data(num: int = 60, kind: Any = torch.float64) -> tuple[Any, Any]:
    """Three clouds."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(num) % 3
    x = torch.randn(num, 6, dtype=kind, generator=generator)
    x[:, 0] += 1.5 * y
    return x, y


def trained(act: Any = nn.Tanh, kind: Any = torch.float64) -> Any:
    """A classifier of the clouds, N = 6 * 8 + 8 + 8 * 5 + 5 + 5 * 3 + 3 = 119."""
    x, y = data(kind=kind)
    with seeded():
        layers = nn.Linear(6, 8), act(), nn.Linear(8, 5), act(), nn.Linear(5, 3)
    model = nn.Sequential(*layers).to(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def vector(model: Any) -> np.ndarray:
    return parameters_to_vector(model.parameters()).detach().numpy().astype(np.float64)


def kept_of(model: Any, masks: dict[str, Any]) -> np.ndarray:
    """(N,) bool, of a model that is not pruned."""
    parts = [
        masks[name].numpy().ravel() if name in masks else np.ones(p.numel(), bool)
        for name, p in model.named_parameters()
    ]
    return np.concatenate(parts)


def values(model: Any) -> np.ndarray:
    """(N,) of a pruned model, by the names of one that is not."""
    own = {name.removesuffix("_orig"): p for name, p in model.named_parameters()}
    order = [f"{i}.{kind}" for i in range(len(model)) for kind in ("weight", "bias")]
    return torch.cat([own[x].detach().ravel() for x in order if x in own]).double().numpy()


def constrained(H: np.ndarray, theta: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """The step that minimizes delta^T H delta / 2 with delta = -theta where pruned: by the inverse
    and multipliers, as Hassibi and Stork write it."""
    inverse = np.linalg.inv(H)[:, pruned]
    return -inverse @ np.linalg.solve(inverse[pruned], theta[pruned])


def hessian(model: Any, damping: float = DAMPING) -> np.ndarray:
    return gh.GGNOperator(model, "cross_entropy", *data()).to_dense() + damping * np.eye(119)


@pytest.fixture
def whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they go too far."""
    monkeypatch.setattr(surgery._Run, "_mended", lambda self, theta, step: theta + step)


@pytest.mark.usefixtures("whole_steps")
@pytest.mark.parametrize(
    "options", [EXACT, {}, {"scheme": "hodlr"}, {"scheme": "hss", "rtol": 0.3}]
)
def test_one_part(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """The update is that of the constrained quadratic problem, whatever the compression; the costs
    are those of an exact one."""
    monkeypatch.setattr(surgery, "_STEPS", 1)
    model = trained()
    plain = copy.deepcopy(model)
    found = gh.prune(model, "cross_entropy", data(), 0.6, damping=DAMPING, **options)
    theta, H = vector(plain), hessian(plain)
    kept = kept_of(plain, found.masks)
    weights = np.concatenate([np.full(p.numel(), p.ndim > 1) for p in plain.parameters()])
    assert (~kept).sum() == round(0.6 * weights.sum()) == round(found.fraction * found.count)
    assert kept[~weights].all()
    if options is EXACT:
        costs = np.where(weights, theta**2 / np.diag(np.linalg.inv(H)), np.inf)
        np.testing.assert_array_equal(~kept, costs <= np.sort(costs)[(~kept).sum() - 1])
    delta = constrained(H, theta, ~kept)
    np.testing.assert_allclose(values(model), theta + delta, rtol=0, atol=1e-6)
    G = H - DAMPING * np.eye(119)
    assert found.predicted_increase == pytest.approx(0.5 * delta @ G @ delta, rel=1e-5)
    losses = [
        float(nn.functional.cross_entropy(m(data()[0]), data()[1]).detach()) for m in (plain, model)
    ]
    assert found.increase == pytest.approx(losses[1] - losses[0], rel=1e-9)


@pytest.mark.usefixtures("whole_steps")
def test_parts_and_rounds():
    """Each part tells what the weights left cost; a round takes the matrix of what is left."""
    model = trained()
    plain = copy.deepcopy(model)
    rounds = 2
    found = gh.prune(model, "cross_entropy", data(), 0.7, rounds=rounds, damping=DAMPING, **EXACT)
    work = copy.deepcopy(plain)
    weights = np.concatenate([np.full(p.numel(), p.ndim > 1) for p in plain.parameters()])
    theta, kept, predicted = vector(plain), np.ones(119, bool), 0.0
    total, parts = int(weights.sum()), rounds * surgery._STEPS
    final = total - round(0.7 * total)
    for r in range(rounds):
        nn.utils.vector_to_parameters(torch.from_numpy(theta), work.parameters())
        start, H, was = theta, hessian(work), kept
        for part in range(surgery._STEPS):
            left = round(total * (final / total) ** ((r * surgery._STEPS + part + 1) / parts))
            index = np.nonzero(kept)[0]
            costs = theta[index] ** 2 / np.diag(np.linalg.inv(H[np.ix_(index, index)]))
            costs[~weights[index]] = np.inf
            gone = index[np.argsort(costs)[: int((kept & weights).sum()) - left]]
            kept = kept.copy()
            kept[gone] = False
            active = np.nonzero(was)[0]
            theta = np.zeros(119)
            block = H[np.ix_(active, active)]
            theta[active] = start[active] + constrained(block, start[active], ~kept[active])
        delta = theta - start
        predicted += 0.5 * delta @ (H - DAMPING * np.eye(119)) @ delta
    np.testing.assert_array_equal(kept_of(plain, found.masks), kept)
    np.testing.assert_allclose(values(model), theta, rtol=0, atol=1e-6)
    assert found.predicted_increase == pytest.approx(predicted, rel=1e-5)


def test_without_update_the_weights_stay():
    model = trained()
    plain = copy.deepcopy(model)
    found = gh.prune(model, "cross_entropy", data(), 0.5, update=False)
    np.testing.assert_array_equal(values(model), vector(plain) * kept_of(plain, found.masks))


def test_an_update_that_goes_too_far(monkeypatch: pytest.MonkeyPatch):
    """Is shortened: with it the loss is less than without."""
    monkeypatch.setattr(surgery, "_STEPS", 1)
    losses = {}
    for name, options in {"plain": {"update": False}, "halved": {}, "whole": {}}.items():
        if name == "whole":
            monkeypatch.setattr(surgery._Run, "_mended", lambda self, theta, step: theta + step)
        model = trained()
        losses[name] = gh.prune(
            model, "cross_entropy", data(), 0.6, damping=DAMPING, **options
        ).increase
    assert losses["halved"] < losses["plain"] < losses["whole"]


def test_better_than_magnitude():
    """And than the costs without the update; more rounds are no worse."""
    plain = trained()
    x, y = data()
    found = {}
    for name, options in {
        "surgeon": {}, "rounds": {"rounds": 4}, "no update": {"update": False},
    }.items():  # fmt: skip
        model = copy.deepcopy(plain)
        found[name] = gh.prune(model, "cross_entropy", (x, y), 0.5, damping=0.01, **options)
    model = copy.deepcopy(plain)
    places = [(model[i], "weight") for i in (0, 2, 4)]
    prune.global_unstructured(places, prune.L1Unstructured, amount=0.5)
    loss = nn.functional.cross_entropy
    magnitude = float((loss(model(x), y) - loss(plain(x), y)).detach())
    assert found["rounds"].increase < found["surgeon"].increase < magnitude
    assert found["surgeon"].increase < found["no update"].increase


def test_masks_are_torchs():
    """In place, kept while training goes on, permanent by `remove`, taken by another copy."""
    model = trained()
    plain = copy.deepcopy(model)
    found = gh.prune(model, "cross_entropy", data(), 0.5)
    assert prune.is_pruned(model)
    assert repr(found).startswith("Pruning(50.5 % of 103 weights, loss predicted +")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    nn.functional.cross_entropy(model(data()[0]), data()[1]).backward()
    optimizer.step()
    model(data()[0])
    for name, mask in found.masks.items():
        layer, kind = name.split(".")
        assert mask.dtype == torch.bool
        assert bool((getattr(model[int(layer)], kind)[~mask] == 0).all())
        prune.custom_from_mask(plain[int(layer)], kind, mask)
        assert bool((getattr(plain[int(layer)], f"{kind}_mask") == mask).all())
        prune.remove(model[int(layer)], kind)
    assert not prune.is_pruned(model)


def test_what_is_pruned_already_counts():
    model = trained()
    gh.prune(model, "cross_entropy", data(), 0.4)
    zero = {n: b.clone() == 0 for n, b in model.named_buffers()}
    with torch.no_grad():
        model[0].weight_orig += 1.0  # torch keeps what a mask hides
    found = gh.prune(model, "cross_entropy", data(), 0.6, damping=DAMPING)
    assert found.fraction == pytest.approx(0.6, abs=0.01)
    for name, mask in found.masks.items():
        assert not bool((mask & zero[f"{name}_mask"]).any())
    assert int(sum((~m).sum() for m in found.masks.values())) == round(0.6 * 103)
    assert bool((model[0].weight_orig[~found.masks["0.weight"]] == 0).all())
    refused(
        ArgumentError, lambda: gh.prune(model, "cross_entropy", data(), 0.3),
        "fraction must be at least 0.6019, which is pruned already, got 0.3",
    )  # fmt: skip


def test_params_biases_and_frozen():
    model = trained()
    plain = copy.deepcopy(model)
    model[0].requires_grad_(False)
    found = gh.prune(model, "cross_entropy", data(), 0.5)
    assert found.count == 55
    assert not any(name.startswith("0.") for name in found.masks)
    assert bool((model[0].weight == plain[0].weight).all())
    some = copy.deepcopy(plain)
    found = gh.prune(some, "cross_entropy", data(), 0.5, params=["2.weight"])
    assert (found.count, list(found.masks)) == (40, ["2.weight"])
    for name, p in plain.named_parameters():
        if name != "2.weight":
            assert bool((dict(some.named_parameters())[name] == p).all())
    every = copy.deepcopy(plain)
    assert gh.prune(every, "cross_entropy", data(), 0.9, biases=True).count == 119
    refused(
        ArgumentError,
        lambda: gh.prune(plain, "cross_entropy", data(), 0.5, params=["2.bias"]),
        "params: nothing can be pruned of 2.bias",
    )


class Tied(nn.Module):
    """A decoder with the weight of its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)
        self.outer.weight = self.inner.weight

    def forward(self, x: Any) -> Any:
        return self.outer(torch.tanh(self.inner(x)))


def test_tied_weights_and_batches_in_float32():
    with seeded():
        model = Tied()
    x, y = data(kind=torch.float32)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=17)
    found = gh.prune(model, "cross_entropy", loader, 0.5, rounds=2, damping=1e-2)
    assert list(found.masks) == ["inner.weight"]
    assert model.inner.weight_orig is model.outer.weight_orig
    for layer in (model.inner, model.outer):
        assert int((layer.weight == 0).sum()) == 18
    assert model.inner.weight.dtype == torch.float32


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


def test_ranks():
    """Each prunes its own model, all to the same bits, and as one rank does."""
    x, y = data()
    one = trained()
    plain = copy.deepcopy(one)
    options: dict[str, Any] = {"damping": DAMPING, "leaf_size": 16}
    for scheme, sizes in (("lowrank", (2, 3)), ("hss", (2,))):
        one = copy.deepcopy(plain)
        alone = gh.prune(one, "cross_entropy", (x, y), 0.6, scheme=scheme, **options)
        for size in sizes:
            models = [copy.deepcopy(plain) for _ in range(size)]

            def run(comm: Any, models: Any = models, scheme: str = scheme) -> Any:
                return gh.prune(
                    models[comm.rank], "cross_entropy", (x, y), 0.6, scheme=scheme, comm=comm,
                    **options,
                )  # fmt: skip

            results = on_threads(size, run)
            for model, found in zip(models, results, strict=True):
                np.testing.assert_array_equal(values(model), values(models[0]))
                assert found.increase == results[0].increase
                for name, mask in found.masks.items():
                    assert bool((mask == alone.masks[name]).all())
                np.testing.assert_allclose(values(model), values(one), rtol=0, atol=1e-5)


def test_other_arguments_on_another_rank():
    plain = trained()

    def run(comm: Any) -> Any:
        model = copy.deepcopy(plain)
        if comm.rank:
            with torch.no_grad():
                model[0].weight += 1.0
        return gh.prune(model, "cross_entropy", data(), 0.5, comm=comm)

    for error in on_threads(2, run):
        assert isinstance(error, ArgumentError)
        assert "network differs between ranks" in str(error)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"fraction": 0.0}, ArgumentError, "fraction must be > 0"),
        ({"fraction": 1.0}, ArgumentError, "fraction must be above 0 and below 1, got 1.0"),
        ({"fraction": 90}, ArgumentError, "fraction must be above 0 and below 1, got 90"),
        ({"fraction": -0.1}, ArgumentError, "fraction must be > 0"),
        ({"fraction": float("nan")}, ArgumentError, "fraction"),
        ({"fraction": "half"}, DtypeError, "fraction must be a real number, got str"),
        ({"rounds": 0}, ArgumentError, "rounds must be >= 1, got 0"),
        ({"rounds": 1.5}, DtypeError, "rounds must be an integer"),
        ({"damping": 0.0}, ArgumentError, "damping must be > 0"),
        ({"update": "no"}, DtypeError, "update must be True or False, got 'no'"),
        ({"structured": 2}, DtypeError, "structured must be True or False, got 2"),
        ({"fraction": 0.9, "structured": True}, ArgumentError, "leave one of the 13 units"),
        ({"scheme": "svd"}, ArgumentError, "scheme"),
        ({"max_rank": 0}, ArgumentError, "max_rank"),
        ({"params": ["4.weight"], "structured": True}, ArgumentError, "structured=True prunes"),
    ],
)
def test_refusals_leave_the_model(options: dict[str, Any], error: Any, said: str):
    model = trained()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    refused(
        error,
        lambda: gh.prune(model, "cross_entropy", data(), **{"fraction": 0.5, **options}),
        said,
    )
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(bool((after[name] == p).all()) for name, p in before.items())


def test_no_module_and_modes():
    w = {"w": torch.ones(6, 3, dtype=torch.float64)}
    refused(
        DtypeError,
        lambda: gh.prune(lambda p, x: x @ p["w"], "cross_entropy", data(), 0.5, params=w),
        "model must be a torch.nn.Module",
    )


def test_an_error_in_a_later_round_leaves_the_model(monkeypatch: pytest.MonkeyPatch):
    model = trained()
    before = vector(model)
    calls = []
    update = Quadratic.update

    def failing(self: Any, slope: Any, kept: Any) -> Any:
        calls.append(1)
        if len(calls) > surgery._STEPS + 1:
            raise RuntimeError("stopped")
        return update(self, slope, kept)

    monkeypatch.setattr(Quadratic, "update", failing)
    with pytest.raises(RuntimeError, match="stopped"):
        gh.prune(model, "cross_entropy", data(), 0.5, rounds=2)
    np.testing.assert_array_equal(vector(model), before)
    assert not prune.is_pruned(model)


def test_an_update_that_does_not_converge_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("gpu_hodlr.applications.pruning.quadratic._MOST", 1)
    with pytest.warns(AccuracyWarning, match="the residual of the weights' update"):
        gh.prune(trained(), "cross_entropy", data(), 0.5, rtol=0.5)


def test_the_same_on_a_gpu(cupy: Any, monkeypatch: pytest.MonkeyPatch):
    """The matrix and its factor there, the network where it is."""
    monkeypatch.setattr(surgery, "_STEPS", 1)
    plain = trained()
    models = copy.deepcopy(plain), copy.deepcopy(plain)
    options = {"damping": DAMPING, "rtol": 1e-10, "max_rank": 119}
    host, there = (
        gh.prune(model, "cross_entropy", data(), 0.5, device=device, **options)
        for model, device in zip(models, ("cpu", "cuda"), strict=True)
    )
    for name, mask in host.masks.items():
        assert bool((mask == there.masks[name]).all())
    np.testing.assert_allclose(values(models[0]), values(models[1]), rtol=0, atol=1e-5)
