"""What curvature matrices are made of: batches, chosen parameters, picked outputs, ranks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from test_bad_input import refused

import gpu_hodlr as gh
from gpu_hodlr.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    ShapeError,
    UnsupportedLayerError,
)

torch = pytest.importorskip("torch")
nn = torch.nn

from network_models import Language, Recurrent, made, parts  # noqa: E402
from network_zoo import dense_ggn  # noqa: E402
from test_networks_operator import close, function, products  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

UNEVEN = (slice(0, 5), slice(5, 7), slice(7, 13))


def batches(inputs: Any, targets: Any) -> list[Any]:
    return [(parts(inputs, part), parts(targets, part)) for part in UNEVEN]


@pytest.mark.parametrize("entries", ["root", "dense", "none"])
@pytest.mark.parametrize("name", ["lenet", "two inputs", "language model", "lstm"])
def test_a_mean_is_over_all_batches(name: str, entries: str):
    """Of uneven ones; inputs are tensors, tuples and dicts."""
    model, loss, inputs, targets, options = made(name, n=13)
    want = dense_ggn(model, loss, inputs, targets, options)
    op = gh.GGNOperator(model, loss, batches(inputs, targets), entries=entries, **options)
    close(products(op), want)
    close(op.diagonal(), want.diagonal())
    assert op.num_samples == 13


@pytest.mark.parametrize("entries", ["none", "dense"])
def test_hessian_and_fisher_of_batches(entries: str):
    model, loss, inputs, targets, _ = made("lenet", n=13)
    data = batches(inputs, targets)
    for kind, options in (
        (gh.HessianOperator, {}),
        (gh.FisherOperator, {"kind": "empirical"}),
    ):
        want = products(kind(model, loss, inputs, targets, entries=entries, **options))
        close(products(kind(model, loss, data, entries=entries, **options)), want)
    stored = gh.FisherOperator(model, loss, data, samples=2, entries="root")
    close(products(gh.FisherOperator(model, loss, data, samples=2, entries=entries)),
          products(stored))  # fmt: skip


def test_a_weighted_mean_is_over_the_weight_of_all_batches():
    """Torch divides by the weight of the targets' classes, which batches have unevenly."""
    model, _, inputs, targets, _ = made("lenet", n=13)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64),
                               ignore_index=0)  # fmt: skip
    want = products(gh.GGNOperator(model, loss, inputs, targets, entries="none"))
    weight = loss.weight[targets[targets != 0]].sum()
    torch_sum = nn.CrossEntropyLoss(weight=loss.weight, ignore_index=0, reduction="sum")
    whole = products(gh.GGNOperator(model, torch_sum, inputs, targets, entries="none"))
    close(want, whole / float(weight))
    close(products(gh.GGNOperator(model, loss, batches(inputs, targets), entries="none")), want)


@pytest.mark.parametrize("entries", ["auto", "khatri-rao", "none"])
def test_linear_layers_of_batches(entries: str):
    """Gathered, where they fit, and read by their layers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(13, 4, dtype=torch.float64), torch.arange(13) % 3
    want = gh.GGNOperator(model, "cross_entropy", inputs, targets)
    got = gh.GGNOperator(model, "cross_entropy", batches(inputs, targets), entries=entries)
    assert got.access == ("none" if entries == "none" else "khatri-rao")
    close(products(got), products(want))


def test_batches_of_linear_layers_are_not_gathered_where_they_do_not_fit(
    monkeypatch: pytest.MonkeyPatch,
):
    from gpu_hodlr.networks import curvature, layered

    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    inputs, targets = torch.randn(13, 4, dtype=torch.float64), torch.arange(13) % 3
    for module in (curvature, layered):
        monkeypatch.setattr(module, "free_bytes", lambda device: 100)
    op = gh.GGNOperator(model, "cross_entropy", batches(inputs, targets))
    assert op.access == "none"


@pytest.mark.parametrize("shuffle", [False, True])
def test_loaders(shuffle: bool):
    """One that shuffles gives the same sum, in another order."""
    model, loss, inputs, targets, _ = made("lenet", n=13)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=4, shuffle=shuffle)
    want = dense_ggn(model, loss, inputs, targets, {})
    for entries in ("root", "none"):
        op = gh.GGNOperator(model, loss, loader, entries=entries)
        close(products(op), want)
        assert (op.summand(0, 2) is None) == (shuffle and entries == "none")
    if shuffle:
        refused(
            ArgumentError,
            lambda: gh.FisherOperator(model, loss, loader, entries="none"),
            "kind='mc'", "shuffle=False", "entries='root'",
        )  # fmt: skip
        assert gh.FisherOperator(model, loss, loader, entries="root").access == "root"


def test_memory_does_not_grow_with_the_data():
    """Batches are read again at every product, and none is kept."""
    model, loss, inputs, targets, _ = made("lenet", n=13)
    read: list[int] = []

    class Reading:
        def __iter__(self) -> Iterator[Any]:
            for i, batch in enumerate(batches(inputs, targets)):
                read.append(i)
                yield batch

    op = gh.GGNOperator(model, loss, Reading(), entries="none")
    assert read == [0, 1, 2]
    v = np.ones((op.shape[0], 200))
    op @ v
    assert read == [0, 1, 2] * 2
    held = [x for x in vars(op._access.problem.data).values() if isinstance(x, torch.Tensor)]
    assert held == []


def test_other_data_in_a_later_pass():
    """Fewer samples, other numbers, flipped images."""
    model, loss, inputs, targets, _ = made("lenet", n=13)
    data = batches(inputs, targets)
    op = gh.GGNOperator(model, loss, data, entries="none")
    v = np.ones(op.shape[0])
    op @ v
    last = data.pop()
    refused(ArgumentError, lambda: op @ v, "7 samples", "13 in the first")
    data.append((last[0].flip(3), last[1]))
    refused(ArgumentError, lambda: op @ v, "other inputs", "augmentation")
    data[-1] = (last[0], last[1].roll(1) if bool((last[1].roll(1) != last[1]).any()) else last[1])
    data[-1] = (last[0], (last[1] + 1) % 3)
    refused(ArgumentError, lambda: op @ v, "other targets", "augmentation")
    data[-1] = last
    op @ v
    data.reverse()
    op @ v  # the same samples in another order
    data.clear()
    refused(ArgumentError, lambda: op @ v, "no batch any more")


def test_data_that_cannot_be_used():
    model, loss, inputs, targets, _ = made("lenet", n=13)

    def build(data: Any, *given: Any, **options: Any) -> Any:
        return lambda: gh.GGNOperator(model, loss, data, *given, **options)

    data = batches(inputs, targets)
    refused(ArgumentError, build(x for x in data), "generator", "once only", "DataLoader")
    refused(ArgumentError, build(iter(data)), "list_iterator", "once only")
    refused(ArgumentError, build(inputs), "targets are missing")
    refused(ArgumentError, build({"x": inputs}), "targets are missing")
    refused(ArgumentError, build(TensorDataset(inputs, targets)), "DataLoader", "single samples")
    refused(DtypeError, build(7), "data must be an iterable", "int")
    refused(ArgumentError, build([]), "data gave no batch")
    refused(ShapeError, build([inputs]), "data[0]", "pair (inputs, targets)", "Tensor")
    refused(ShapeError, build([(inputs,)]), "data[0]", "tuple of 1")
    refused(DtypeError, build([(inputs, "x")]), "targets")
    refused(ArgumentError, build([(inputs * np.nan, targets)]), "data[0] inputs", "NaN")
    refused(ArgumentError, build(inputs * np.nan, targets), "NaN")
    refused(ShapeError, build(inputs[:0], targets[:0]), "inputs", "n >= 1")
    refused(ShapeError, build(inputs, targets[:5]), "targets")
    refused(ArgumentError, build(inputs, targets + 7), "targets must lie in 0 .. 2")
    refused(ArgumentError, build(inputs, targets, num_data=0), "num_data", ">= 1")
    refused(DtypeError, build(inputs, targets, num_data=2.5), "num_data", "float")
    refused(ArgumentError, build(inputs, targets, entries="all"), "entries", "'all'", "root")
    refused(DtypeError, build(inputs, targets, seed=0.5), "seed", "float")
    refused(ArgumentError, build(inputs, targets, seed=-1), "seed", "-1")
    refused(DeviceError, build(inputs.to("meta"), targets), "inputs", "model's device", "meta")


def test_num_data():
    """Of a part of the data: the mean is over all, and the parts add up."""
    model, loss, inputs, targets, _ = made("lenet", n=13)
    want = dense_ggn(model, loss, inputs, targets, {})
    found = [
        products(gh.GGNOperator(model, loss, x, y, num_data=13, entries="none"))
        for x, y in batches(inputs, targets)
    ]
    close(sum(found), want)
    layers = nn.Sequential(nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    half = gh.GGNOperator(layers, "cross_entropy", x, y, num_data=12)
    assert half.access == "khatri-rao"
    close(2 * products(half), products(gh.GGNOperator(layers, "cross_entropy", x, y)))
    whole = gh.GGNOperator(layers, "cross_entropy", x, y, reduction="sum", num_data=12)
    close(products(half) * 12, products(whole))


# --- parameters ------------------------------------------------------------------------------


def test_chosen_parameters():
    """In the order of the model, whatever the order they are named in; others are constants."""
    model, loss, inputs, targets, _ = made("lenet")
    names = [name for name, _ in model.named_parameters()]
    kept = ["5.weight", "0.bias"]
    whole = products(gh.GGNOperator(model, loss, inputs, targets, entries="none"))
    mask = np.concatenate([np.full(p.numel(), n in kept) for n, p in model.named_parameters()])
    want = whole[np.ix_(mask, mask)]
    named = dict(model.named_parameters())
    for params in (
        kept,
        tuple(reversed(kept)),
        (name for name in kept),
        [named[name] for name in kept],
        [named["0.bias"], "5.weight"],
        lambda name: name in kept,
        lambda name, p, kept=kept: name in kept and p.requires_grad,
    ):
        op = gh.GGNOperator(model, loss, inputs, targets, params=params, entries="none")
        assert op._access.problem.network.names == ("0.bias", "5.weight")
        close(products(op), want)
    model.requires_grad_(False)  # params= says what is trained
    close(products(gh.GGNOperator(model, loss, inputs, targets, params=kept)), want)
    assert len(names) == 8


def test_chosen_parameters_of_linear_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
    for params in (["2.weight", "2.bias"], ["0.weight"], lambda name: name.endswith("bias")):
        op = gh.GGNOperator(model, "cross_entropy", x, y, params=params)
        assert op.access == "khatri-rao"
        close(products(op), dense_ggn(model, "cross_entropy", x, y, {"params": params}))


def test_a_module_stands_for_its_parameters():
    model, loss, inputs, targets, _ = made("lenet")
    for part, prefix in ((model, ""), (model[5], "5."), (model[:6], "")):
        names = [prefix + name for name, _ in part.named_parameters()]
        op = gh.GGNOperator(model, loss, inputs, targets, params=part, entries="none")
        assert op._access.problem.network.names == tuple(names)


def test_names_of_what_only_passes_on():
    """With and without what it puts before them."""
    model, loss, inputs, targets, _ = made("lenet")
    want = products(gh.GGNOperator(model, loss, inputs, targets, params=["5.weight"]))
    parallel = nn.DataParallel(model)
    for name in ("5.weight", "module.5.weight"):
        got = gh.GGNOperator(parallel, loss, inputs, targets, params=[name])
        close(products(got), want)


def test_tied_weights_are_one_parameter_under_both_names():
    model, loss, inputs, targets, _ = made("language model")
    assert isinstance(model, Language)
    found = [
        products(gh.GGNOperator(model, loss, inputs, targets, params=[name]))
        for name in ("tokens.weight", "head.weight")
    ]
    np.testing.assert_array_equal(*found)
    assert found[0].shape == (42, 42)


def test_parameters_that_cannot_be_chosen():
    model, loss, inputs, targets, _ = made("lenet")

    def build(params: Any) -> Any:
        return lambda: gh.GGNOperator(model, loss, inputs, targets, params=params)

    refused(ArgumentError, build(["5.wieght"]), "no parameter '5.wieght'", "near it", "5.weight")
    refused(ArgumentError, build([torch.ones(3)]), "tensor (3,)", "no parameter of the model")
    refused(ArgumentError, build([]), "got none")
    refused(ArgumentError, build(nn.Tanh()), "got none")
    refused(ArgumentError, build(nn.Linear(1, 1)), "no parameter of the model")
    refused(ArgumentError, build(lambda name: False), "the predicate is true of no parameter")
    refused(DtypeError, build("5.weight"), "str", "['5.weight']")
    refused(DtypeError, build([5]), "names or tensors", "int")
    refused(DtypeError, build(5), "names, tensors, a module or a predicate", "int")
    refused(DtypeError, build({"5.weight": 1}), "dict")


def test_functions_that_are_no_networks():
    x, y = torch.ones(3, 3).double(), torch.ones(3, 2).double()
    refused(DtypeError, lambda: gh.GGNOperator(function, "mse", x, y), "params a dict", "function")
    refused(ArgumentError, lambda: gh.GGNOperator(function, "mse", x, y, params={}), "empty dict")
    whole = {"w": torch.ones(2, 2, dtype=torch.int64)}
    refused(
        DtypeError,
        lambda: gh.GGNOperator(function, "mse", x, y, params=whole),
        "params['w'] must be floating",
    )


# --- outputs ---------------------------------------------------------------------------------


def test_outputs_that_cannot_be_picked():
    model, loss, inputs, targets, _ = made("lstm")
    assert isinstance(model, Recurrent)
    refused(
        DtypeError,
        lambda: gh.GGNOperator(model, loss, inputs, targets),
        "the model returns a tuple of Tensor, tuple", "output= says",
    )  # fmt: skip
    for output in (2, "logits"):
        refused(
            ArgumentError,
            lambda output=output: gh.GGNOperator(model, loss, inputs, targets, output=output),
            f"output: there is no {output!r}", "tuple of Tensor, tuple",
        )  # fmt: skip
    refused(
        ShapeError,
        lambda: gh.GGNOperator(model, loss, inputs, targets, output=lambda made: made[0].T),
        "(n, ...) with n = 3", "(2, 3)", "output= can move axes",
    )  # fmt: skip


def test_a_loss_that_is_not_convex():
    class Saturating:
        """One's own: l'' changes sign."""

        convex = False

        def value(self, outputs: Any, targets: Any) -> Any:
            return (1 - torch.exp(-((outputs - targets) ** 2))).sum()

        def hessian_matmat(self, outputs: Any, targets: Any, z: Any) -> Any:
            r = outputs - targets
            return 2 * (1 - 2 * r**2) * torch.exp(-(r**2)) * z

    model, _, inputs, targets, _ = made("resnet")
    refused(
        ArgumentError,
        lambda: gh.GGNOperator(model, Saturating(), inputs, targets),
        "Saturating", "not convex", "gh.HessianOperator",
    )  # fmt: skip
    op = gh.HessianOperator(model, Saturating(), inputs, targets, entries="none")
    v = np.random.default_rng(0).standard_normal((op.shape[0], 2))
    parameters = list(model.parameters())
    value = Saturating().value(model(inputs), targets) / len(targets)  # a mean is over samples
    slope = torch.cat([
        g.reshape(-1) for g in torch.autograd.grad(value, parameters, create_graph=True)
    ])  # fmt: skip
    product = torch.autograd.grad(slope @ torch.from_numpy(v[:, 0]), parameters)
    close((op @ v)[:, 0], torch.cat([g.reshape(-1) for g in product]).numpy())


def test_entries_that_cannot_be():
    model, loss, inputs, targets, _ = made("lenet")
    refused(
        UnsupportedLayerError,
        lambda: gh.GGNOperator(model, loss, inputs, targets, entries="khatri-rao"),
        "layer 0", "Conv2d",
    )  # fmt: skip
    refused(
        ArgumentError,
        lambda: gh.HessianOperator(model, loss, inputs, targets, entries="khatri-rao"),
        "entries must be one of", "'khatri-rao'",
    )  # fmt: skip
    refused(
        UnsupportedLayerError,
        lambda: gh.FisherOperator(model, loss, inputs, targets, entries="khatri-rao"),
        "all parameters in Linear layers",
    )
    refused(
        ArgumentError,
        lambda: gh.HessianOperator(model, loss, inputs, targets, entries="root"),
        "auto, dense, none",
    )
    refused(
        ArgumentError,
        lambda: gh.FisherOperator(model, loss, inputs, targets, kind="exact"),
        "mc, empirical", "'exact'",
    )  # fmt: skip
    refused(
        ArgumentError,
        lambda: gh.FisherOperator(model, loss, inputs, targets, kind="empirical", samples=2),
        "samples",
    )
    refused(
        DtypeError,
        lambda: gh.FisherOperator(model, loss, inputs, targets, samples=1.5),
        "samples", "float",
    )  # fmt: skip


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch):
    from gpu_hodlr import devices

    model, loss, inputs, targets, _ = made("lenet")
    ops = {way: gh.GGNOperator(model, loss, inputs, targets, entries=way) for way in ("none",)}
    monkeypatch.setattr(devices, "free_bytes", lambda device="cpu": 10_000)
    for entries, words in (("root", "15 x 137"), ("dense", "dense 137 x 137")):
        refused(
            gh.errors.MemoryEstimateError,
            lambda entries=entries: gh.GGNOperator(model, loss, inputs, targets, entries=entries),
            words, "entries='none'",
        )  # fmt: skip
    ops["none"] @ np.ones(137)
