"""Losses: torch's own, told by identity, with their reductions, weights and smoothing."""

from functools import partial
from typing import Any

import dense_oracles
import numpy as np
import pytest
from test_bad_input import refused

import gpu_hodlr as gh
from gpu_hodlr.errors import ArgumentError, DtypeError, ShapeError

torch = pytest.importorskip("torch")
nn = torch.nn

from network_cases import NETWORKS, SAMPLES, case  # noqa: E402
from test_ggn import LOSSES, check  # noqa: E402


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["deep", "wide output"])
def test_reductions(name: str, loss: str, reduction: str):
    model, inputs, targets = case(name, loss)
    want = dense_oracles.ggn(model, dense_oracles.loss_function(loss, reduction), inputs, targets)
    check(gh.GGNOperator(model, loss, inputs, targets, reduction=reduction), want)
    module = {"mse": nn.MSELoss, "cross_entropy": nn.CrossEntropyLoss}[loss](reduction=reduction)
    check(gh.GGNOperator(model, module, inputs, targets), want)


def test_reduction_argument_overrides_the_modules():
    model, inputs, targets = case("two layers", "mse")
    op = gh.GGNOperator(model, nn.MSELoss(reduction="sum"), inputs, targets, reduction="mean")
    loss = dense_oracles.loss_function("mse", "mean")
    check(op, dense_oracles.ggn(model, loss, inputs, targets))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [-100, 1])
def test_ignore_index(reduction: str, ignored: int):
    model, inputs, targets = case("two layers", "cross_entropy")
    targets = targets.clone()
    targets[[1, 4]] = ignored
    module = nn.CrossEntropyLoss(reduction=reduction, ignore_index=ignored)
    loss = dense_oracles.loss_function("cross_entropy", reduction, ignore_index=ignored)
    check(
        gh.GGNOperator(model, module, inputs, targets),
        dense_oracles.ggn(model, loss, inputs, targets),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["two layers", "wide output"])
def test_soft_targets(name: str, reduction: str):
    """Class probabilities; torch does not ask that they sum to 1."""
    model, inputs, _ = case(name, "mse")
    outputs = NETWORKS[name][2]
    generator = torch.Generator().manual_seed(5)
    targets = torch.rand(SAMPLES, outputs, generator=generator, dtype=torch.float64)
    loss = dense_oracles.loss_function("cross_entropy", reduction)
    check(
        gh.GGNOperator(model, "cross_entropy", inputs, targets, reduction=reduction),
        dense_oracles.ggn(model, loss, inputs, targets),
    )


W = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weights": {"weight": W},
    "a weight of 0": {"weight": torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)},
    "smoothing": {"label_smoothing": 0.3},
    "all smoothing": {"label_smoothing": 1.0},
    "weights and smoothing": {"weight": W, "label_smoothing": 0.3},
    "float32 weights": {"weight": W.float()},
    "ignored": {"ignore_index": 1},
    "ignored, weights": {"ignore_index": 1, "weight": W},
    "ignored, weights and smoothing": {"ignore_index": 1, "weight": W, "label_smoothing": 0.3},
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", ["classes", "probabilities", "any sum"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_cross_entropy(options: dict[str, Any], kind: str, reduction: str):
    """torch does not ask that probabilities sum to 1: s becomes s (1 - eps) + eps."""
    if kind != "classes" and "ignore_index" in options:
        pytest.skip("torch ignores classes alone")
    model, inputs, targets = case("two layers", "cross_entropy")
    module = nn.CrossEntropyLoss(reduction=reduction, **options)
    if kind != "classes":
        generator = torch.Generator().manual_seed(5)
        targets = 2 * torch.rand(SAMPLES, 3, generator=generator, dtype=torch.float64)
        if kind == "probabilities":
            targets /= targets.sum(1, keepdim=True)
    double = {k: v.double() if torch.is_tensor(v) else v for k, v in options.items()}
    loss = dense_oracles.loss_function("cross_entropy", reduction, **double)
    check(
        gh.GGNOperator(model, module, inputs, targets),
        dense_oracles.ggn(model, loss, inputs, targets),
    )


def test_class_weights_are_targets_that_do_not_sum_to_one():
    model, inputs, y = case("two layers", "cross_entropy")
    soft = nn.functional.one_hot(y, 3) * W[y][:, None] / W[y].sum()
    want = gh.GGNOperator(model, nn.CrossEntropyLoss(reduction="sum"), inputs, soft).to_dense()
    got = gh.GGNOperator(model, nn.CrossEntropyLoss(weight=W), inputs, y).to_dense()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-14 * np.abs(want).max())


class Renamed(nn.CrossEntropyLoss):
    """A subclass that changes nothing."""

    def extra(self) -> int:
        return 1


class Times10(nn.MSELoss):
    def forward(self, outputs: Any, targets: Any) -> Any:
        return 10 * super().forward(outputs, targets)


class Called(nn.MSELoss):
    def __call__(self, outputs: Any, targets: Any) -> Any:
        return 10 * super().__call__(outputs, targets)


class Weighted(nn.CrossEntropyLoss):
    """Its weights are computed."""

    weight = property(lambda self: W)


class MSELoss(nn.Module):
    """Of torch's name: a sum over outputs, a mean over samples."""

    reduction = "mean"

    def forward(self, outputs: Any, targets: Any) -> Any:
        return ((outputs - targets) ** 2).sum(1).mean()


class CrossEntropyLoss(nn.Module):
    """Of torch's name, as libraries have it."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_weight, self.reduction, self.ignore_index = 0.4, "mean", -100

    def forward(self, outputs: Any, targets: Any) -> Any:
        return self.loss_weight * nn.functional.cross_entropy(outputs, targets)


def test_subclasses_that_change_nothing():
    model, inputs, targets = case("two layers", "cross_entropy")
    got = gh.GGNOperator(model, Renamed(label_smoothing=0.1), inputs, targets).to_dense()
    want = gh.GGNOperator(model, nn.CrossEntropyLoss(label_smoothing=0.1), inputs, targets)
    np.testing.assert_array_equal(got, want.to_dense())


def replaced() -> Any:
    loss = nn.MSELoss()
    loss.forward = lambda outputs, targets: 10 * ((outputs - targets) ** 2).mean()
    return loss


def reclassed() -> Any:
    loss = nn.CrossEntropyLoss()
    loss.__class__ = Weighted  # as torch's own parametrizations do it
    return loss


def hooked() -> Any:
    loss = nn.MSELoss()
    loss.register_forward_hook(lambda module, inputs, output: 2 * output)
    return loss


UNKNOWN = {
    "own forward": (Times10, ("Times10, which changes what torch's MSELoss computes",)),
    "own call": (Called, ("Called, which changes what torch's MSELoss computes",)),
    "own weights": (reclassed, ("Weighted, which changes what torch's CrossEntropyLoss computes",)),
    "a forward put in": (replaced, ("MSELoss, which changes what torch's MSELoss computes",)),
    "hooks": (hooked, ("MSELoss with forward hooks",)),
    "torch's name": (MSELoss, ("got test_losses.MSELoss",)),
    "torch's other name": (CrossEntropyLoss, ("got test_losses.CrossEntropyLoss",)),
    "another of torch's": (nn.L1Loss, ("got L1Loss",)),
    "a class": (lambda: nn.CrossEntropyLoss, ("got the class CrossEntropyLoss",)),
    "a function": (lambda: nn.functional.l1_loss, ("got the function l1_loss",)),
    "a name": (lambda: "CrossEntropyLoss", ("got 'CrossEntropyLoss'",)),
    "nothing": (lambda: None, ("got NoneType",)),
}


@pytest.mark.parametrize(("make", "words"), UNKNOWN.values(), ids=UNKNOWN)
def test_losses_of_others_are_refused(make: Any, words: tuple[str, ...]):
    model, inputs, targets = case("two layers", "mse")
    wanted = "loss must be one of mse, cross_entropy, "
    refused(ArgumentError, lambda: gh.GGNOperator(model, make(), inputs, targets), wanted, *words)


WRONG: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "weights of other classes": (ShapeError, {"weight": W[:2]}, ("loss.weight", "(3,)", "(2,)")),
    "a negative weight": (ArgumentError, {"weight": -W}, ("loss.weight", ">= 0")),
    "NaN": (ArgumentError, {"weight": W * float("nan")}, ("loss.weight", "finite")),
    "weights that leave nothing": (ArgumentError, {"weight": 0 * W}, ("loss.weight is 0",)),
    "smoothing": (ArgumentError, {"label_smoothing": 1.5}, ("label_smoothing", "0 .. 1", "1.5")),
}


@pytest.mark.parametrize(("kind", "options", "words"), WRONG.values(), ids=WRONG)
def test_options_that_cannot_be(kind: Any, options: dict[str, Any], words: tuple[str, ...]):
    model, inputs, targets = case("two layers", "cross_entropy")
    loss = nn.CrossEntropyLoss()
    for name, value in options.items():  # torch checks some of them itself
        setattr(loss, name, value)
    refused(kind, lambda: gh.GGNOperator(model, loss, inputs, targets), *words)


def test_complex_targets():
    model, inputs, targets = case("two layers", "mse")
    wrong = targets.to(torch.complex128)
    refused(DtypeError, lambda: gh.GGNOperator(model, "mse", inputs, wrong), "targets", "complex")


def counts() -> Any:
    return torch.randint(5, (SAMPLES, 3), generator=torch.Generator().manual_seed(0)).double()


OTHERS: dict[str, tuple[Any, Any]] = {
    "binary": (nn.BCEWithLogitsLoss(pos_weight=W), (counts() > 1).double()),
    "poisson": (nn.PoissonNLLLoss(), counts()),
    "gaussian": (partial(nn.functional.gaussian_nll_loss, var=0.3), counts()),
    "huber": (nn.HuberLoss(delta=2.0), counts()),
    "smooth_l1": (nn.functional.smooth_l1_loss, counts()),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_over_outputs(name: str, reduction: str):
    """Their entries too come from the Khatri-Rao form."""
    loss, targets = OTHERS[name]
    model, inputs, _ = case("two layers", "mse")

    def of_torch(outputs: Any, y: Any) -> Any:
        if name == "gaussian":
            return loss(outputs, y, reduction=reduction)
        function = {
            "binary": partial(nn.functional.binary_cross_entropy_with_logits, pos_weight=W),
            "poisson": nn.functional.poisson_nll_loss,
            "huber": partial(nn.functional.huber_loss, delta=2.0),
            "smooth_l1": nn.functional.smooth_l1_loss,
        }[name]
        return function(outputs, y, reduction=reduction)

    want = dense_oracles.ggn(model, of_torch, inputs, targets)
    check(gh.GGNOperator(model, loss, inputs, targets, reduction=reduction), want)
