"""Networks, losses and data that the Gauss-Newton operator refuses, and how it says so."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_bad_input import refused

import gpu_hodlr as gh
from gpu_hodlr.errors import (
    ArgumentError,
    DtypeError,
    UnsupportedLayerError,
)

torch = pytest.importorskip("torch")
nn = torch.nn
import torch.nn.utils.prune  # noqa: E402
from network_cases import data  # noqa: E402
from network_zoo import dense_ggn  # noqa: E402

from gpu_hodlr.networks.modules import flatten_modules  # noqa: E402

INPUTS = data((6,), 3, "mse")[0]
TARGETS = data((6,), 3, "mse")[1]


def build(model: Any, loss: Any = "mse", **changes: Any) -> gh.GGNOperator:
    """The operator of a model with six inputs and three outputs; changes replace arguments."""
    inputs, targets = data((6,), 3, loss if loss == "cross_entropy" else "mse")
    given = {"inputs": inputs, "targets": targets, **changes}
    return gh.GGNOperator(model, loss, **given)


def tied_module() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(6, 3))


def tied_weight() -> nn.Module:
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(6, 3))


def pruned() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    torch.nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
    return model


def hooked() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    model[1].register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def spectral() -> nn.Module:
    with warnings.catch_warnings():  # a deprecated function that is still in use
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 3)))


class OwnLinear(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class OwnActivation(nn.Module):
    def forward(self, x: Any) -> Any:
        return x * x.sum()


class Centred(nn.Module):
    def forward(self, x: Any) -> Any:
        return x - x.mean(0)


class Dropping(nn.Module):
    def forward(self, x: Any) -> Any:
        return nn.functional.dropout(x, 0.5)


class Summed(nn.Module):
    def forward(self, x: Any) -> Any:
        return torch.sin(x).sum(1)


class Scaled(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.ones(())), nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        return self.scale * self.inner(x)


class Holder(nn.Module):
    """Calls what it holds."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Any) -> Any:
        return self.inner(x)


class Reshaping(Holder):
    def forward(self, x: Any) -> Any:
        return self.inner(x.reshape(len(x), 2, 3).flatten(1))


class Doubled(Holder):
    def forward(self, x: Any) -> Any:
        return 2 * self.inner(x)


class InPlace(Holder):
    def forward(self, x: Any) -> Any:
        return self.inner(x).mul_(2)


class Twice(Holder):
    def forward(self, x: Any) -> Any:
        return self.inner(x + self.inner(x).sum(1, keepdim=True))


class Using(Holder):
    def forward(self, x: Any) -> Any:
        return self.inner(x + self.inner[2].bias.sum())


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.BatchNorm1d(5))
        self.head = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x: Any) -> Any:
        return self.head(torch.softmax(self.trunk(x), 1))


class Residual(nn.Sequential):
    """A Sequential that is none."""

    def forward(self, x: Any) -> Any:
        return x + super().forward(x)


class OwnCall(nn.Tanh):
    def __call__(self, x: Any) -> Any:
        return 2 * super().__call__(x)


class ReLU(nn.Module):  # of torch's name
    def forward(self, x: Any) -> Any:
        return x.cumsum(1)


class Halved(nn.Linear):
    """Its weight is not the parameter."""

    weight = property(lambda self: self._parameters["weight"] / 2)


class OwnFlatten(nn.Flatten):
    def forward(self, x: Any) -> Any:
        return 2 * super().forward(x)


class OwnDropout(nn.Dropout):
    def forward(self, x: Any) -> Any:
        return 2 * x


def halved() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.__class__ = Halved  # as torch's own parametrizations do it
    return layer


def with_forward(module: nn.Module) -> nn.Module:
    """A forward of its own, put into the object."""
    before = module.forward
    module.forward = lambda x: 2 * before(x)
    return module


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


def scripted() -> nn.Module:
    with warnings.catch_warnings():  # deprecated, and still in use
        warnings.simplefilter("ignore")
        return torch.jit.script(plain().double())


def traced() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(plain().double(), torch.ones(2, 6, dtype=torch.float64))


def without_a_parameter() -> nn.Module:
    model = plain()
    weight = model[0].weight.detach().double()
    del model[0].weight
    model[0].weight = weight
    return model


def between(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 4), layer(), nn.Linear(4, 3))


# What the form by layers refuses, and how; entries="auto" takes the most of it in another form.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "Conv1d": (
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 3, 3), nn.Flatten()),
        ("layer 0", "Unflatten", "Linear"),
    ),
    "Softmax": (between(lambda: nn.Softmax(1)), ("layer 1", "Softmax")),
    "LayerNorm": (between(lambda: nn.LayerNorm(4)), ("layer 1", "LayerNorm")),
    "BatchNorm1d": (between(lambda: nn.BatchNorm1d(4).eval()), ("layer 1", "BatchNorm1d")),
    "PReLU": (between(nn.PReLU), ("layer 1", "PReLU")),
    "RReLU": (between(lambda: nn.RReLU().eval()), ("layer 1", "RReLU")),
    "own Linear": (between(lambda: OwnLinear(4, 4)), ("layer 1", "OwnLinear")),
    "own call": (between(OwnCall), ("layer 1", "OwnCall, which changes what torch's Tanh")),
    "torch's name": (between(ReLU), ("layer 1 is a test_bad_network.ReLU",)),
    "own weight": (between(halved), ("layer 1", "Halved, which changes")),
    "own Flatten": (between(OwnFlatten), ("layer 1", "OwnFlatten")),
    "own Dropout": (between(lambda: OwnDropout().eval()), ("layer 1", "OwnDropout")),
    "a forward put in": (
        between(lambda: with_forward(nn.Linear(4, 4))),
        ("layer 1 is a Linear, which changes",),
    ),
    "a forward put into the model": (lambda: with_forward(plain()), ("layer model", "Sequential")),
    "a compiled layer": (
        between(lambda: torch.compile(nn.Linear(4, 4), backend="eager")),
        ("layer 1", "compiled"),
    ),
    "a weight that is none": (without_a_parameter, ("layer 0", "weight is no torch Parameter")),
    "own Sequential": (between(lambda: Residual(nn.Linear(4, 4))), ("layer 1", "Residual")),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(6, 3), nn.Sequential(nn.Tanh(), nn.Softmax(1)))
        ),
        ("layer 0.1.1", "Softmax"),
    ),
    "AlphaDropout": (between(lambda: nn.AlphaDropout().eval()), ("layer 1", "AlphaDropout")),
    "Flatten after Linear": (between(nn.Flatten), ("layer 1", "Flatten", "before any Linear")),
    "partial Flatten": (between(lambda: nn.Flatten(1, 1)), ("layer 1", "Flatten")),
    "a module twice": (tied_module, ("shares parameters", "tied")),
    "a weight twice": (tied_weight, ("shares parameters", "tied")),
    "pruned": (pruned, ("layer 0",)),
    "a forward hook": (hooked, ("layer 1", "hook")),
    "spectral norm": (lambda: spectral().eval(), ("layer 0",)),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))),
        ("layer 0", "is parametrized", "remove_parametrizations"),
    ),
    "no Linear": (
        lambda: nn.Sequential(nn.PReLU(6), nn.Unflatten(1, (2, 3)), Summed()),
        ("layer 0", "PReLU"),
    ),
    "scaled": (lambda: Scaled(), ("layer model", "Scaled")),
}


# Of these all parameters are in Linear layers that every sample goes through once.
BY_UNITS = {
    "Softmax", "RReLU", "own call", "torch's name", "own Flatten", "own Dropout",
    "a forward put into the model", "a compiled layer", "a weight that is none", "own Sequential",
    "nested", "AlphaDropout", "Flatten after Linear", "partial Flatten", "a forward hook",
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_unsupported_layers_are_named_and_computed_otherwise(name: str):
    make, words = LAYERS[name]
    torch.manual_seed(0)
    model = make().double()
    given = model._orig_mod if hasattr(model, "_orig_mod") else model
    named = dict(given.named_parameters())
    refused(UnsupportedLayerError, lambda: flatten_modules(given, named), *words)
    if name not in BY_UNITS:
        refused(UnsupportedLayerError, lambda: build(model, entries="khatri-rao"), *words)
        assert build(model).access != "khatri-rao"
    op = build(model, entries="khatri-rao" if name in BY_UNITS else "auto")
    with torch.compiler.set_stance("force_eager"):
        want = dense_ggn(model, "mse", INPUTS, TARGETS, {})
    np.testing.assert_allclose(op.to_dense(), want, rtol=0, atol=1e-12)


# What no form can take.
REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "scripted": (scripted, ("layer model", "is scripted or traced (torch.jit)", "made of")),
    "traced": (traced, ("layer model", "is scripted or traced (torch.jit)")),
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(3)),
        ("layer 0 (LazyLinear) has no weights yet", "call the model"),
    ),
    "BatchNorm1d in training": (
        between(lambda: nn.BatchNorm1d(4)),
        ("layer 1 (BatchNorm1d) is in training mode", "depends on the batch", "model.eval()"),
    ),
    "BatchNorm1d without statistics": (
        between(lambda: nn.BatchNorm1d(4, track_running_stats=False).eval()),
        ("layer 1 (BatchNorm1d)", "no running statistics", "track_running_stats=True"),
    ),
    "Dropout in training": (
        between(nn.Dropout),
        ("layer 1 (Dropout) is in training mode", "left to chance", "model.eval()"),
    ),
    "AlphaDropout in training": (between(nn.AlphaDropout), ("layer 1 (AlphaDropout)", "chance")),
    "RReLU in training": (between(nn.RReLU), ("layer 1 (RReLU)", "chance", "model.eval()")),
    "a function's dropout": (between(lambda: Dropping()), ("left to chance", "two evaluations")),
    "spectral norm in training": (spectral, ("changes 0.weight_u", "while it computes", "eval()")),
    "own activation": (between(OwnActivation), ("depends on the other samples of its batch",)),
    "the batch's mean": (between(lambda: Centred()), ("depends on the other samples",)),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("kind", [gh.GGNOperator, gh.HessianOperator, gh.FisherOperator])
def test_what_no_form_can_take(kind: Any, make: Callable[[], nn.Module], words: tuple[str, ...]):
    model = make().double()
    refused(UnsupportedLayerError, lambda: kind(model, "mse", INPUTS, TARGETS), *words)


@pytest.mark.parametrize("make", [nn.Sequential, lambda: nn.Sequential(nn.Tanh())])
def test_nothing_to_differentiate(make: Callable[[], nn.Module]):
    refused(ArgumentError, lambda: build(make()), "model has no parameter that requires grad")


def test_a_model_that_fails_at_the_inputs():
    model = nn.Sequential(nn.Conv2d(1, 2, 3)).double()
    refused(ArgumentError, lambda: build(model), "the model fails at the first sample", "conv2d")


HIDING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    "an attribute": lambda model: Holder(model),
    "attributes": lambda model: Holder(Holder(model)),
    "a Sequential": nn.Sequential,
    "what reshapes": lambda model: Reshaping(model),
}


@pytest.mark.parametrize("hide", HIDING.values(), ids=HIDING)
def test_layers_that_hide_in_what_only_calls_them(hide: Callable[[nn.Module], nn.Module]):
    """They are found, to the bits."""
    torch.manual_seed(0)
    model = plain().double()
    want = build(model)
    assert want.access == "khatri-rao"
    got = build(hide(model))
    assert got.access == "khatri-rao"
    np.testing.assert_array_equal(got.to_dense(), want.to_dense())
    np.testing.assert_array_equal(got @ np.eye(43), want @ np.eye(43))


SEEMING: dict[str, Callable[[nn.Module], nn.Module]] = {
    "twice its output": lambda model: Doubled(model),
    "changed in place": lambda model: InPlace(model),
    "called twice": lambda model: Twice(model),
    "its weights used before": lambda model: Using(model),
}


@pytest.mark.parametrize("name", SEEMING)
def test_what_does_more_than_call_its_layers(name: str):
    torch.manual_seed(0)
    model = SEEMING[name](plain().double())
    op = build(model)
    once = name in ("twice its output", "changed in place")
    assert (op.access == "khatri-rao") == once
    if not once:
        words = "once" if name == "called twice" else "more of its Linear layers' parameters"
        refused(UnsupportedLayerError, lambda: build(model, entries="khatri-rao"), words)
    want = dense_ggn(model, "mse", INPUTS, TARGETS, {})
    np.testing.assert_allclose(op.to_dense(), want, rtol=0, atol=1e-12)


def test_layers_behind_a_trunk_that_is_not_trained():
    """The trunk is any network: what it makes of the inputs are the layers' inputs."""
    torch.manual_seed(0)
    model = Trunk().double().eval()
    model.trunk.requires_grad_(False)
    op = build(model)
    assert op.access == "khatri-rao"
    want = dense_ggn(model, "mse", INPUTS, TARGETS, {})
    np.testing.assert_allclose(op.to_dense(), want, rtol=0, atol=1e-12)
    model.trunk.requires_grad_(True)
    assert build(model).access != "khatri-rao"


class SameLinear(nn.Linear):
    """A subclass that changes nothing."""


class SameTanh(nn.Tanh):
    """Likewise."""

    def extra_repr(self) -> str:
        return "as it was"


class SameSequential(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(SameLinear(6, 4), SameTanh(), nn.Linear(4, 3))


def test_subclasses_that_change_nothing():
    torch.manual_seed(0)
    model = SameSequential().double()
    same = plain().double()
    same.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(build(model).to_dense(), build(same).to_dense())


def test_a_lazy_layer_that_has_its_weights():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(3)).double()
    model(INPUTS)
    assert build(model).shape == (43, 43)


def test_autocast_changes_nothing():
    """It would compute in half precision what is asked for in double."""
    model = plain()
    inputs, targets = (x.float() for x in data((6,), 3, "mse"))
    want = gh.GGNOperator(model, "mse", inputs, targets).to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gh.GGNOperator(model, "mse", inputs, targets).to_dense()
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(half: Any):
    """And the operator says so; no other does."""
    model = plain().to(half)
    inputs, targets = (x.to(half) for x in data((6,), 3, "mse"))
    got = gh.GGNOperator(model, "mse", inputs, targets)
    said = str(half).removeprefix("torch.")
    assert (got.dtype, got.widened) == (np.float32, said)
    assert f"float32 of a model in {said}, cpu" in repr(got)
    want = gh.GGNOperator(model.float(), "mse", inputs.float(), targets.float())
    assert want.widened is None
    assert "model in" not in repr(want)
    np.testing.assert_array_equal(got.to_dense(), want.to_dense())


def test_the_widest_parameter_says_in_what_is_computed():
    model = nn.Sequential(nn.Linear(6, 4).half(), nn.Tanh(), nn.Linear(4, 3).double())
    op = gh.GGNOperator(model, "mse", INPUTS, TARGETS)
    assert (op.dtype, op.widened) == (np.float64, "float16")
    head = gh.GGNOperator(model.float(), "mse", INPUTS, TARGETS, params=["2.weight"])
    assert (head.dtype, head.widened) == (np.float32, None)


def test_dropout_of_nothing_may_train():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.0), nn.Linear(4, 3)).double()
    assert build(model).shape == (43, 43)


@pytest.mark.parametrize("model", [None, "model", np.eye(3), lambda x: x])
def test_what_is_no_network(model: Any):
    refused(DtypeError, lambda: build(model), "model", type(model).__name__)
