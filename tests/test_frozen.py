"""Gauss-Newton matrices of networks of which only some parameters are trained."""

from collections.abc import Callable
from typing import Any

import dense_oracles
import numpy as np
import pytest
from test_bad_input import refused

import gpu_hodlr as gh
from gpu_hodlr.errors import ArgumentError, ShapeError, UnsupportedLayerError

torch = pytest.importorskip("torch")
nn = torch.nn

from network_cases import case, data, network  # noqa: E402
from test_ggn import check, close  # noqa: E402
from thread_ranks import on_threads  # noqa: E402

LOSSES = ("mse", "cross_entropy")


def freeze(model: Any, names: Callable[[str], bool]) -> Any:
    """The model with the parameters frozen whose names are told."""
    for name, p in model.named_parameters():
        if names(name):
            p.requires_grad_(False)
    return model


def linear_names(model: Any) -> list[str]:
    """Layers in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters()))


# What is frozen of the layers, in order.
FROZEN: dict[str, Callable[[list[str]], Callable[[str], bool]]] = {
    "all but the last layer": lambda layers: lambda name: not name.startswith(layers[-1]),
    "the last layer": lambda layers: lambda name: name.startswith(layers[-1]),
    "all but the first layer": lambda layers: lambda name: not name.startswith(layers[0]),
    "a layer between": lambda layers: lambda name: name.startswith(layers[len(layers) // 2]),
    "weights": lambda layers: lambda name: name.endswith("weight"),
    "biases": lambda layers: lambda name: name.endswith("bias"),
    "one bias": lambda layers: lambda name: name == f"{layers[0]}.bias",
    "the first layer, the last's bias": lambda layers: (
        lambda name: name.startswith(layers[0]) or name == f"{layers[-1]}.bias"
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("name", ["deep", "wide output, deep", "activation last", "nested"])
def test_what_is_frozen_is_a_constant(name: str, frozen: Any, loss: str):
    """Products, entries, diagonal and padding, with both tables of the units' Gram matrix."""
    model, inputs, targets = case(name, loss)
    freeze(model, frozen(linear_names(model)))
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        pytest.skip("nothing is left to train")
    op = gh.GGNOperator(model, loss, inputs, targets)
    n = sum(p.numel() for p in trained)
    assert op.shape == (n, n)
    want = dense_oracles.ggn(model, dense_oracles.loss_function(loss, "mean"), inputs, targets)
    check(op, want)
    v = torch.nn.utils.parameters_to_vector(trained).detach()
    np.testing.assert_allclose((op @ v).numpy(), want @ v.numpy(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["deep", "wide output, deep"])
def test_the_matrix_is_a_block_of_the_whole_one(name: str, loss: str):
    model, inputs, targets = case(name, loss)
    whole = gh.GGNOperator(model, loss, inputs, targets).to_dense()
    names = linear_names(model)
    freeze(model, lambda name: name.startswith(names[1]))
    kept = np.concatenate([np.full(p.numel(), p.requires_grad) for p in model.parameters()])
    op = gh.GGNOperator(model, loss, inputs, targets)
    np.testing.assert_allclose(op.to_dense(), whole[np.ix_(kept, kept)], rtol=0, atol=1e-14)


def test_layers_before_the_first_that_is_trained_cost_nothing():
    """The operator is that of the rest, at what they make of the inputs, bit by bit."""
    model, inputs, targets = case("deep", "cross_entropy")
    names = linear_names(model)
    start = 1 + [name for name, _ in model.named_children()].index(names[-2])
    freeze(model, lambda name: not name.startswith(names[-1]))
    op = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    rest = gh.GGNOperator(model[start:], "cross_entropy", model[:start](inputs), targets)
    np.testing.assert_array_equal(op.to_dense(), rest.to_dense())
    assert op._access.gram.num_hidden == 0
    assert len(op._access.layers) == 1


def test_units_of_a_frozen_layer_are_not_stored():
    model, inputs, targets = case("deep", "cross_entropy")
    names = linear_names(model)
    whole = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    width = len(dict(model.named_parameters())[f"{names[1]}.weight"])
    freeze(model, lambda name: name.startswith(names[1]))
    part = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    assert part._access.gram.num_hidden == whole._access.gram.num_hidden - width


@pytest.mark.parametrize("loss", LOSSES)
def test_orderings_sketches_and_compression(loss: str):
    model, inputs, targets = case("deep", loss)
    names = linear_names(model)
    freeze(model, lambda name: name.startswith(names[1]) or name == f"{names[0]}.bias")
    op = gh.GGNOperator(model, loss, inputs, targets)
    dense = op.to_dense()
    n = len(dense)
    runs = op.runs()
    assert sorted(runs.permutation) == list(range(n))
    assert list(runs.starts) == sorted(set(runs.starts))
    sketch = op.gram_vectors(4000, seed=0)
    assert dense_oracles.frobenius_error(sketch @ sketch.T, dense) < 0.2
    np.testing.assert_allclose(
        sum(op.summand(i, 2).to_dense() for i in range(2)), dense, atol=1e-14
    )
    for ordering in ("natural", "gram", "angle"):
        K = gh.compress(op, rtol=1e-8, leaf_size=8, ordering=ordering)
        assert dense_oracles.frobenius_error(K.to_dense(), dense) <= 3e-8


def test_on_every_library(xp: Any):
    model, inputs, targets = case("deep", "cross_entropy")
    names = linear_names(model)
    freeze(model, lambda name: name.startswith(names[1]) or name.endswith("0.weight"))
    op = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    there = op if xp is np else op.to("cuda")
    n = op.shape[0]
    v = np.random.default_rng(0).standard_normal((n, 3))
    for got, want in (
        (there @ xp.asarray(v), op @ v),
        (there.to_dense(), op.to_dense()),
        (there.diagonal(), op.diagonal()),
    ):
        got = got if xp is np else got.get()
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-13)


def test_on_many_ranks():
    model, inputs, targets = case("deep", "cross_entropy")
    names = linear_names(model)
    freeze(model, lambda name: name.startswith(names[1]) or name == f"{names[0]}.bias")
    op = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    alone = gh.compress(op, rtol=1e-6, leaf_size=8)
    v = np.random.default_rng(0).standard_normal(op.shape[0])

    def run(comm: Any) -> Any:
        K = gh.compress(op, rtol=1e-6, leaf_size=8, comm=comm)
        return K @ v

    for got in on_threads(2, run):
        np.testing.assert_array_equal(got, alone @ v)


def test_shared_weights_may_be_frozen():
    """They are constants, of which any number of layers may have the same."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(6, 3)).double()
    inputs, targets = data((6,), 3, "mse")
    loss = dense_oracles.loss_function("mse", "mean")
    close(
        gh.GGNOperator(model, "mse", inputs, targets).to_dense(),
        dense_oracles.ggn(model, loss, inputs, targets),
    )
    refused(
        UnsupportedLayerError,
        lambda: gh.GGNOperator(model, "mse", inputs, targets, entries="khatri-rao"),
        "shares parameters between layers (tied weights)", "2.weight is 0.weight",
    )  # fmt: skip
    first.weight.requires_grad_(False)
    op = gh.GGNOperator(model, "mse", inputs, targets)
    check(op, dense_oracles.ggn(model, loss, inputs, targets))


def test_parameters_that_no_layer_uses():
    model = network("two layers")
    model.register_parameter("unused", nn.Parameter(torch.zeros(4, dtype=torch.float64)))
    inputs, targets = data((6,), 3, "mse")
    every = gh.GGNOperator(model, "mse", inputs, targets)  # a row of zeros for each
    assert every.access != "khatri-rao"
    assert not every.diagonal()[:4].any()
    refused(
        UnsupportedLayerError,
        lambda: gh.GGNOperator(model, "mse", inputs, targets, entries="khatri-rao"),
        "parameter unused, (4,), is used in no Linear layer", "requires_grad_(False)",
    )  # fmt: skip
    model.unused.requires_grad_(False)
    want = gh.GGNOperator(network("two layers"), "mse", inputs, targets)
    np.testing.assert_array_equal(
        gh.GGNOperator(model, "mse", inputs, targets).to_dense(), want.to_dense()
    )


def test_nothing_to_train():
    model, inputs, targets = case("two layers", "mse")
    model.requires_grad_(False)
    refused(
        ArgumentError,
        lambda: gh.GGNOperator(model, "mse", inputs, targets),
        "model has no parameter that requires grad", "requires_grad_()",
    )  # fmt: skip


def test_vectors_are_of_the_trained_parameters():
    model, inputs, targets = case("two layers", "mse")
    freeze(model, lambda name: name.startswith("0"))
    op = gh.GGNOperator(model, "mse", inputs, targets)
    every = sum(p.numel() for p in model.parameters())
    refused(ShapeError, lambda: op @ np.ones(every), f"({op.shape[0]},)", f"({every},)")


def test_a_training_step_of_what_is_trained():
    """What a user does: gradient, damped solve, step; the frozen ones stay."""
    model, inputs, targets = case("deep", "cross_entropy")
    freeze(model, lambda name: not name.startswith(linear_names(model)[-1]))
    trained = [p for p in model.parameters() if p.requires_grad]
    before = {name: p.clone() for name, p in model.named_parameters()}
    loss = nn.CrossEntropyLoss()
    value = loss(model(inputs), targets)
    gradient = nn.utils.parameters_to_vector(torch.autograd.grad(value, trained))
    K = gh.compress(gh.GGNOperator(model, loss, inputs, targets), rtol=1e-8, leaf_size=8)
    step = K.factorize(damping=1e-2).solve(gradient)
    point = nn.utils.parameters_to_vector(trained).detach()
    nn.utils.vector_to_parameters(point - step, trained)
    assert loss(model(inputs), targets) < value
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert moved == [name for name, p in model.named_parameters() if p.requires_grad]
