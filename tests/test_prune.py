"""Pruning of networks: against dense linear algebra, with torch's masks, on ranks."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
from test_bad_input import refused
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.errors import AccuracyWarning, ArgumentError, DtypeError

torch = pytest.importorskip("torch")
from pruning_cases import (  # noqa: E402
    DAMPING,
    EXACT,
    constrained,
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
from torch.nn.utils import prune  # noqa: E402

from gpu_hodlr.applications.pruning import surgery  # noqa: E402
from gpu_hodlr.applications.pruning.quadratic import Quadratic  # noqa: E402


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
