"""A loss by its name, as torch's module or function, or one's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.networks.losses.cross_entropy import NLL, CrossEntropy
from gpu_hodlr.networks.losses.elementwise import (
    MSE,
    BinaryCrossEntropy,
    GaussianNLL,
    Huber,
    PoissonNLL,
)
from gpu_hodlr.networks.losses.loss import Loss
from gpu_hodlr.networks.losses.own import OwnLoss
from gpu_hodlr.networks.modules import changed, torch_class

if TYPE_CHECKING:
    import torch


class _Known(NamedTuple):
    """One of torch's losses.

    Attributes:
        module: its class in torch.nn.
        function: its name in torch.nn.functional.
        options: what both know besides the reduction.
        make: the loss of a reduction and these options.
        only_function: options of the function alone.
    """

    module: str
    function: str
    options: tuple[str, ...]
    make: Callable[..., Loss]
    only_function: tuple[str, ...] = ()


def _smooth_l1(reduction: str, beta: float = 1.0) -> Huber:
    return Huber(reduction, beta, beta, "smooth_l1")


LOSSES = {
    "mse": _Known("MSELoss", "mse_loss", (), MSE),
    "cross_entropy": _Known(
        "CrossEntropyLoss",
        "cross_entropy",
        ("weight", "ignore_index", "label_smoothing"),
        CrossEntropy,
    ),
    "binary_cross_entropy_with_logits": _Known(
        "BCEWithLogitsLoss",
        "binary_cross_entropy_with_logits",
        ("weight", "pos_weight"),
        BinaryCrossEntropy,
    ),
    "nll": _Known("NLLLoss", "nll_loss", ("weight", "ignore_index"), NLL),
    "poisson_nll": _Known(
        "PoissonNLLLoss", "poisson_nll_loss", ("log_input", "full", "eps"), PoissonNLL
    ),
    "gaussian_nll": _Known(
        "GaussianNLLLoss", "gaussian_nll_loss", ("full", "eps"), GaussianNLL, ("var",)
    ),
    "huber": _Known("HuberLoss", "huber_loss", ("delta",), Huber),
    "smooth_l1": _Known("SmoothL1Loss", "smooth_l1_loss", ("beta",), _smooth_l1),
}

_FORMS = (
    f"loss must be one of {', '.join(LOSSES)}, torch's module or function of one, or an object "
    "with value and hessian_matmat or hessian_root, got"
)


def read_loss(loss: Any, reduction: str | None = None) -> Loss:
    """A loss given by its name, as torch's module or function, or an object of one's own.

    Torch's own are told by what they are, never by a name: its classes, subclasses that change
    nothing, its functions in `torch.nn.functional`, and `functools.partial` of these with options.

    Args:
        loss: one of `LOSSES`, torch's module or function, a `Loss`, or see `LossLike`.
        reduction: "mean", "sum" or "none"; the loss's own, or "mean", by default.

    Raises:
        ArgumentError: another loss, reduction, or option.

    Example:
        >>> import torch
        >>> from gpu_hodlr.networks.losses import read_loss
        >>> loss = read_loss(torch.nn.HuberLoss(delta=2.0), reduction="sum")
        >>> outputs, targets = torch.tensor([[1.0, 4.0]]), torch.zeros(1, 2)
        >>> loss.value(outputs, targets)
        tensor(6.5000)
        >>> loss.hessian_root(outputs, targets)  # of e^2 / 2 inside, of 2 |e| - 2 outside
        tensor([[[1., 0.],
                 [0., 0.]]])
    """
    import torch

    if isinstance(loss, str):
        if loss not in LOSSES:
            raise ArgumentError(f"{_FORMS} {loss!r}")
        return LOSSES[loss].make("mean" if reduction is None else reduction)
    if isinstance(loss, type):
        raise ArgumentError(f"{_FORMS} the class {loss.__name__}")
    if isinstance(loss, Loss):
        return loss if reduction is None else loss.reduced(reduction)
    options = loss.keywords if type(loss) is partial else {}
    function = loss.func if type(loss) is partial else loss
    for known in LOSSES.values():
        if function is getattr(torch.nn.functional, known.function):
            return _of_function(loss, known, options, reduction)
    modules = {getattr(torch.nn, known.module): known for known in LOSSES.values()}
    kind = torch_class(loss, modules)
    if kind is not None:
        return _of_module(loss, modules[kind], reduction)
    if not isinstance(loss, tuple(modules)) and callable(getattr(loss, "value", None)):
        return OwnLoss(loss, reduction)
    if hasattr(loss, "__qualname__"):
        raise ArgumentError(f"{_FORMS} the function {loss.__qualname__}")
    raise ArgumentError(f"{_FORMS} {changed(loss, modules)}")


def _of_function(loss: Any, known: _Known, options: dict[str, Any], reduction: str | None) -> Loss:
    """Torch's function, or a partial of it.

    Raises:
        ArgumentError: an option that cannot be.
    """
    if getattr(loss, "args", ()):
        raise ArgumentError(f"loss: a partial of {known.function} must give its options by name")
    given = {name: value for name, value in options.items() if value is not None}
    said = given.pop("reduction", "mean")
    allowed = (*known.options, *known.only_function)
    other = sorted(set(given) - {*allowed})
    if other:
        raise ArgumentError(
            f"loss: {known.function} may have the options {', '.join((*allowed, 'reduction'))}, "
            f"got {other[0]}"
        )
    return known.make(said if reduction is None else reduction, **given)


def _of_module(loss: torch.nn.Module, known: _Known, reduction: str | None) -> Loss:
    """Torch's module.

    Raises:
        ArgumentError: it has hooks, or an option that cannot be.
    """
    if loss._forward_hooks or loss._forward_pre_hooks:
        raise ArgumentError(f"{_FORMS} {known.module} with forward hooks")
    given = {name: getattr(loss, name) for name in known.options}
    return known.make(loss.reduction if reduction is None else reduction, **given)
