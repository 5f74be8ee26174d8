"""Which of torch's modules a network is made of: told by identity, never by a name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from gpu_hodlr.errors import UnsupportedLayerError

if TYPE_CHECKING:
    import torch

ELEMENTWISE = (
    "CELU",
    "ELU",
    "GELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "Identity",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "ReLU",
    "ReLU6",
    "SELU",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Threshold",
)

# What a subclass may not write: what it computes, and what torch's own computation reads.
_DECISIVE = {
    "forward", "__call__", "_call_impl", "__getattr__", "__getattribute__",
    "weight", "bias", "reduction", "ignore_index", "label_smoothing", "pos_weight", "log_input",
    "full", "eps", "delta", "beta",
}  # fmt: skip


class Step(NamedTuple):
    """A layer of a network.

    Attributes:
        name: as `named_modules` has it; "model" for a network of one layer.
        module: the layer.
        kind: torch's class, which says what it computes.
    """

    name: str
    module: Any
    kind: type[torch.nn.Module]


def torch_class(
    module: object, kinds: Iterable[type[torch.nn.Module]]
) -> type[torch.nn.Module] | None:
    """Of torch's classes the one that says what a module computes; None where its own class does.

    It is the module's class, or one that the module's class inherits from without a change to what
    is computed.
    """
    for kind in kinds:
        if isinstance(module, kind):
            above = type(module).__mro__
            written = {name for own in above[: above.index(kind)] for name in vars(own)}
            if not written & _DECISIVE and "forward" not in vars(module):
                return kind
    return None


def changed(module: object, kinds: Iterable[type[torch.nn.Module]]) -> str:
    """What a module is that `torch_class` does not know, in words."""
    own = type(module)
    said = own.__qualname__
    if own.__module__.partition(".")[0] not in ("torch", "builtins"):
        said = f"{own.__module__}.{said}"
    for kind in kinds:
        if isinstance(module, kind):
            said += f", which changes what torch's {kind.__name__} computes"
            break
    return said


def flatten_modules(model: torch.nn.Module, trained: Mapping[str, torch.Tensor]) -> list[Step]:
    """The layers of a nest of Sequential, in order.

    Args:
        model: the network.
        trained: the parameters that the matrix is of, by name.

    Raises:
        UnsupportedLayerError: a layer that is neither Linear, elementwise, Flatten nor Dropout in
            evaluation mode, or changes what they compute; a trained parameter used twice, or in no
            Linear layer; a Flatten after the first Linear layer.
    """
    import torch

    nn = torch.nn
    kinds = (nn.Linear, nn.Flatten, nn.Dropout, *(getattr(nn, name) for name in ELEMENTWISE))
    steps: list[Step] = []
    for name, module in _leaves(model, ""):
        kind = torch_class(module, kinds)
        if kind is None:
            raise UnsupportedLayerError(
                f"layer {name} is a {changed(module, kinds)}; entries='khatri-rao' knows Linear, "
                f"Flatten, Dropout and {', '.join(ELEMENTWISE)}"
            )
        if kind is nn.Flatten and (
            (module.start_dim, module.end_dim) != (1, -1)
            or any(step.kind is nn.Linear for step in steps)
        ):
            raise UnsupportedLayerError(f"layer {name} (Flatten) must come before any Linear")
        if kind is nn.Dropout and module.training and module.p > 0:
            raise UnsupportedLayerError(
                f"layer {name} (Dropout) is in training mode: call model.eval() first"
            )
        steps.append(Step(name, module, kind))
    linear = [step for step in steps if step.kind is nn.Linear]
    if not linear:
        raise UnsupportedLayerError("model must have at least one Linear layer")
    _check_parameters(trained, linear)
    return steps


def _leaves(module: torch.nn.Module, name: str) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules that are no Sequential.

    Raises:
        UnsupportedLayerError: something else computes than what can be seen.
    """
    import torch

    check_plain(module, name or "model")
    if torch_class(module, (torch.nn.Sequential,)) is None:
        yield name or "model", module
        return
    prefix = name + "." if name else ""
    # _modules, as named_children leaves out a module's second appearance
    for key, child in module._modules.items():
        if child is not None:
            yield from _leaves(child, prefix + key)


def check_plain(module: torch.nn.Module, name: str) -> None:
    """Refuse what stands around a module, or has not made it yet.

    Raises:
        UnsupportedLayerError: says what it is, and what to give.
    """
    said = None
    if "_orig_mod" in module._modules:
        said = "is compiled (torch.compile): give the module itself, its _orig_mod"
    elif "parametrizations" in module._modules:
        said = (
            "is parametrized (weight or spectral norm), which entries='khatri-rao' does not see; "
            "torch.nn.utils.parametrize.remove_parametrizations makes it plain"
        )
    elif module._forward_hooks or module._forward_pre_hooks:
        said = (
            "has forward hooks (pruning, weight or spectral norm), which entries='khatri-rao' does "
            "not see"
        )
    if said is not None:
        raise UnsupportedLayerError(f"layer {name} ({type(module).__name__}) {said}")


def _check_parameters(trained: Mapping[str, torch.Tensor], linear: list[Step]) -> None:
    """Refuse parameters for which the matrix has no rows of their own.

    Raises:
        UnsupportedLayerError: a trained one is used twice, or in no Linear layer.
    """
    ids = {id(p) for p in trained.values()}
    found: dict[int, str] = {}
    for name, module, _ in linear:
        for part in ("weight", "bias"):
            value = getattr(module, part)
            if value is None:
                continue
            if module._parameters.get(part) is not value:
                raise UnsupportedLayerError(f"layer {name}: its {part} is no torch Parameter")
            if id(value) in found and id(value) in ids:
                raise UnsupportedLayerError(
                    f"model shares parameters between layers (tied weights): {name}.{part} is "
                    f"{found[id(value)]}"
                )
            found[id(value)] = f"{name}.{part}"
    for name, p in trained.items():
        if id(p) not in found:
            raise UnsupportedLayerError(
                f"parameter {name}, {tuple(p.shape)}, is used in no Linear layer of the model: "
                "with requires_grad_(False) it is left out"
            )
