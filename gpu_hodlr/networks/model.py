"""A torch model as a function of some of its parameters."""

from __future__ import annotations

import difflib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

import numpy as np

from gpu_hodlr.arrays import as_array, check_finite
from gpu_hodlr.devices import is_torch
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, UnsupportedLayerError
from gpu_hodlr.networks.data import Inputs
from gpu_hodlr.operators import Runs

if TYPE_CHECKING:
    import torch

P = ParamSpec("P")
T = TypeVar("T")
# torch puts parameters into the module while it computes, and how attention is computed is a
# setting of the process: one thread at a time.
_LOCK = threading.RLock()

# What torch says of itself while it makes its first forward mode, or has no rule for `vmap`.
_SAID = "There is a performance drop because we have not", r"`torch\.jit\.script` is"

Model: TypeAlias = "torch.nn.Module | Callable[..., Any]"
Theta: TypeAlias = "tuple[torch.Tensor, ...]"
Output: TypeAlias = "int | str | Callable[[Any], Any] | None"
# Names, tensors, a module, a predicate of names (and tensors); or, of a function, its tensors.
Params: TypeAlias = "Iterable[str | torch.Tensor] | Callable[..., bool] | Mapping[str, Any] | None"


def reads_model(function: Callable[P, T]) -> Callable[P, T]:
    """Of what must not look at a model in which another thread is computing."""

    @wraps(function)
    def alone(*args: P.args, **kwargs: P.kwargs) -> T:
        with _LOCK:
            return function(*args, **kwargs)

    return alone


@dataclass(frozen=True)
class Chosen:
    """A model, and which of its parameters the matrix is of.

    Attributes:
        model: without what only passes on (DataParallel, torch.compile).
        named: the parameters by name, in the order of `named_parameters`.
        fixed: the other parameters and the buffers.
        module: whether it is a torch module; else a function of a dict of tensors and the inputs.
    """

    model: Model
    named: dict[str, torch.Tensor]
    fixed: dict[str, torch.Tensor]
    module: bool

    @property
    def first(self) -> torch.Tensor:
        """Of the model's parameters the first."""
        if self.module:
            return next(self.model.parameters())  # type: ignore[union-attr]
        return next(iter(self.named.values()))

    @property
    def ids(self) -> frozenset[int]:
        """Of the tensors chosen."""
        return frozenset(id(p) for p in self.named.values())


@reads_model
def choose(model: Model, params: Params) -> Chosen:
    """Read a model and which of its parameters are meant.

    Raises:
        DtypeError: neither a module nor a function with a dict of tensors.
        ArgumentError: a parameter that the model does not have; none at all.
        UnsupportedLayerError: a module that has no parameters yet, or is scripted.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        return _choose_of_function(model, params)
    model, prefix = _unwrapped(model)
    _check_readable(model)
    every = dict(model.named_parameters())
    if params is None:
        wanted = {name for name, p in every.items() if p.requires_grad}
        if not wanted:
            raise ArgumentError(
                "model has no parameter that requires grad, and the matrix is of those alone: call "
                "requires_grad_() on what is to be trained"
            )
    else:
        given = params.parameters() if isinstance(params, torch.nn.Module) else params
        wanted = _wanted(given, every, dict(model.named_parameters(remove_duplicate=False)), prefix)
    named = {name: p for name, p in every.items() if name in wanted}
    for name, p in named.items():
        if not p.is_floating_point():
            raise DtypeError(f"parameter {name} must be floating, got {p.dtype}")
    rest = {name: p for name, p in every.items() if name not in wanted}
    return Chosen(model, named, {**rest, **dict(model.named_buffers())}, True)


def _choose_of_function(model: object, params: Params) -> Chosen:
    wanted = (
        "model must be a torch.nn.Module, or a function f(params, inputs) with params a dict of "
        "tensors"
    )
    if not callable(model) or isinstance(model, type):
        raise DtypeError(f"{wanted}, got {type(model).__name__}")
    if not isinstance(params, Mapping) or not all(map(is_torch, params.values())):
        raise DtypeError(f"{wanted}, got a {type(model).__name__} and {type(params).__name__}")
    if not params:
        raise ArgumentError("params must have a tensor, got an empty dict")
    for name, p in params.items():
        if not p.is_floating_point():
            raise DtypeError(f"params[{name!r}] must be floating, got {p.dtype}")
    return Chosen(model, dict(params), {}, False)


def _unwrapped(model: torch.nn.Module) -> tuple[torch.nn.Module, str]:
    """The module in what only passes on, and what that puts before its names."""
    import torch

    parallel = torch.nn.DataParallel, torch.nn.parallel.DistributedDataParallel
    prefix = ""
    while True:
        if "_orig_mod" in model._modules and type(model).__name__ == "OptimizedModule":
            model, prefix = model._modules["_orig_mod"], f"{prefix}_orig_mod."
        elif isinstance(model, parallel):
            model, prefix = model.module, f"{prefix}module."
        else:
            return model, prefix


def _check_readable(model: torch.nn.Module) -> None:
    """Refuse modules that are not what they will be, or no longer what they were.

    Raises:
        UnsupportedLayerError: says which.
    """
    import torch

    for name, module in model.named_modules():
        said = f"layer {name or 'model'} ({type(module).__name__})"
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedLayerError(
                f"{said} is scripted or traced (torch.jit): give the module that it was made of"
            )
        if any(torch.nn.parameter.is_lazy(p) for p in module._parameters.values()):
            raise UnsupportedLayerError(
                f"{said} has no weights yet: call the model with its inputs once"
            )


def _wanted(
    params: Params, every: dict[str, torch.Tensor], aliases: dict[str, torch.Tensor], prefix: str
) -> set[str]:
    """The names, as in `every`, that `params` means.

    Raises:
        ArgumentError: a name or tensor that is not there, or nothing.
        DtypeError: params is nothing that tells parameters.
    """
    name_of = {id(p): name for name, p in every.items()}
    found: set[str] = set()
    if callable(params):
        found = {name for name, p in every.items() if _says(params, name, p)}
        if not found:
            raise ArgumentError("params: the predicate is true of no parameter of the model")
        return found
    if isinstance(params, (str, Mapping)) or is_torch(params) or not isinstance(params, Iterable):
        raise DtypeError(
            "params must be names, tensors, a module or a predicate of names, got "
            f"{type(params).__name__}" + (f"; give [{params!r}]" if isinstance(params, str) else "")
        )
    for item in params:
        if is_torch(item):
            if id(item) not in name_of:
                raise ArgumentError(
                    f"params has a tensor {tuple(item.shape)} that is no parameter of the model"
                )
            found.add(name_of[id(item)])
        elif isinstance(item, str):
            name = item.removeprefix(prefix)
            if name not in aliases:
                near = difflib.get_close_matches(name, aliases, n=3)
                hint = f"; near it are {', '.join(near)}" if near else ""
                raise ArgumentError(f"params: the model has no parameter {item!r}{hint}")
            found.add(name_of[id(aliases[name])])
        else:
            raise DtypeError(f"params must be names or tensors, got {type(item).__name__} in it")
    if not found:
        raise ArgumentError("params must name a parameter, got none")
    return found


def _says(predicate: Callable[..., Any], name: str, p: torch.Tensor) -> bool:
    """Of a predicate of (name) or of (name, tensor)."""
    try:
        needed = [
            x for x in inspect.signature(predicate).parameters.values()
            if x.default is x.empty and x.kind in (x.POSITIONAL_ONLY, x.POSITIONAL_OR_KEYWORD)
        ]  # fmt: skip
    except ValueError:  # of a function that has none
        needed = []
    return bool(predicate(name, p) if len(needed) == 2 else predicate(name))


@dataclass(frozen=True)
class Network:
    """f(theta, inputs): a model's predictions as a function of the parameters chosen.

    The tensors are copies: what happens to the model afterwards does not change the function. The
    module's own code is used, in the modes (training or not) that it had.

    Attributes:
        model: the module or function.
        names: of the parameters.
        theta: the parameters.
        fixed: other parameters and buffers, by name.
        output: what picks the predictions out of what the model returns.
        modes: of every module of the model, whether it was in training.
        tied: further names of parameters and buffers, with the first name of each.
    """

    model: Model
    names: tuple[str, ...]
    theta: Theta
    fixed: dict[str, torch.Tensor]
    output: Output
    modes: tuple[bool, ...] | None
    tied: dict[str, str]

    @classmethod
    @reads_model
    def of(
        cls, chosen: Chosen, output: Output, kind: torch.dtype, *, copied: bool = True
    ) -> Network:
        """The function of a model, in float32 or float64.

        Args:
            chosen: the model and its parameters.
            output: see `Network`.
            kind: float32 or float64.
            copied: whether tensors are copied and checked; else they are the model's own where
                these are of that kind, for use before the model changes.

        Raises:
            ArgumentError: NaN or infinity in a parameter or buffer that is copied.
            DeviceError: the parameters are on several devices.
            UnsupportedLayerError: a module whose output depends on the batch or on chance.
        """
        import torch

        place = chosen.first.device

        def own(name: str, x: torch.Tensor) -> torch.Tensor:
            if x.device != place:
                raise DeviceError(f"{name} must be on {place} as the rest, got {x.device}")
            if not x.is_floating_point():
                return x.detach().clone() if copied else x.detach()
            x = x.detach().to(kind, copy=copied)
            if copied:
                check_finite(as_array(x, name), name)
            return x

        with torch.inference_mode(False):  # whose tensors no gradient can be taken of
            theta = tuple(own(name, p) for name, p in chosen.named.items())
            fixed = {name: own(name, p) for name, p in chosen.fixed.items()}
        modes = None
        if chosen.module:
            check_modes(chosen.model)
            modes = tuple(m.training for m in chosen.model.modules())  # type: ignore[union-attr]
        return cls(
            chosen.model, tuple(chosen.named), theta, fixed, output, modes, _tied(chosen.model)
        )

    @property
    def n(self) -> int:
        """Parameters."""
        return sum(p.numel() for p in self.theta)

    @property
    def place(self) -> torch.device:
        """Where it is computed."""
        return self.theta[0].device

    def on(self, place: torch.device) -> Network:
        """The same, computed elsewhere."""
        return replace(
            self,
            theta=tuple(p.to(place) for p in self.theta),
            fixed={name: x.to(place) for name, x in self.fixed.items()},
        )

    def __call__(self, theta: Theta, inputs: Inputs) -> torch.Tensor:
        """The predictions; within `plain`."""
        import torch

        given = dict(zip(self.names, theta, strict=True))
        if self.modes is None:
            return predictions(self.model(given, inputs), self.output)
        args: tuple[Any, ...] = inputs if isinstance(inputs, tuple) else (inputs,)
        named: dict[str, Any] = {}
        if isinstance(inputs, dict):
            args, named = (), inputs
        given = {**self.fixed, **given}
        given |= {name: given[first] for name, first in self.tied.items()}
        # Not by torch's tie_weights: of a module in two places it leaves the copies in the model.
        made = torch.func.functional_call(self.model, given, args, named, tie_weights=False)
        return predictions(made, self.output)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Arithmetic that can be differentiated in every mode, and changes nothing of the model.

        Without autocast, inference mode, the fused attention of torch, which has no forward mode,
        and compilation, which has no transforms.
        """
        import sys

        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with ExitStack() as stack:
            stack.enter_context(_LOCK)
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast(self.place.type, enabled=False))
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(warnings.catch_warnings())
            for said in _SAID:
                warnings.filterwarnings("ignore", said)
            if "torch._dynamo" in sys.modules:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.modes is not None:
                stack.enter_context(self._as_it_was())
            yield

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        import torch

        fast = torch.backends.mha.get_fastpath_enabled()
        modules = list(self.model.modules())  # type: ignore[union-attr]
        if len(modules) != len(self.modes or ()):
            raise ArgumentError(
                "model has other modules than when the matrix was made of it: keep it as it is, or "
                "give a copy.deepcopy of it"
            )
        now = [m.training for m in modules]
        # Old weight normalization and pruning put what they compute beside the parameters.
        hooked = [(m, dict(vars(m))) for m in modules if m._forward_pre_hooks]
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for m, mode in zip(modules, self.modes or (), strict=True):
                m.training = mode
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for m, mode in zip(modules, now, strict=True):
                m.training = mode
            for m, before in hooked:
                vars(m).update(before)

    def split(self, vt: torch.Tensor) -> Theta:
        """Columns (k, N) as tensors (k, *shape), one a parameter."""
        sizes = [p.numel() for p in self.theta]
        parts = vt.split(sizes, dim=1)
        return tuple(x.reshape(len(vt), *p.shape) for x, p in zip(parts, self.theta, strict=True))

    def joined(self, parts: Theta) -> torch.Tensor:
        """The opposite of `split`."""
        import torch

        return torch.cat([x.reshape(len(x), -1) for x in parts], dim=1)

    def runs(self) -> Runs:
        """Parameters of a module unit by unit: what has the same place on the first axis."""
        unit: list[tuple[str, int]] = []
        first = np.zeros(self.n, np.int64)
        groups: dict[tuple[str, int], int] = {}
        start = count = 0
        for name, p in zip(self.names, self.theta, strict=True):
            length = len(p) if p.ndim else 1
            key = (name.rpartition(".")[0], length)
            if key not in groups:
                groups[key] = count
                count += length
                unit.append(key)
            first[start : start + p.numel()] = groups[key] + np.repeat(
                np.arange(length), p.numel() // length
            )
            start += p.numel()
        permutation = np.argsort(first, kind="stable")
        return Runs(permutation, np.nonzero(np.diff(first[permutation], prepend=-1))[0])


def _tied(model: Model) -> dict[str, str]:
    """Tensors that several modules hold: their further names, with the first of each."""
    import torch

    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    if not isinstance(model, torch.nn.Module):
        return tied
    for place, module in model.named_modules():  # each once, so that each tensor is put in once
        for key, x in (*module._parameters.items(), *module._buffers.items()):
            if x is not None:
                name = f"{place}.{key}" if place else key
                if first.setdefault(id(x), name) != name:
                    tied[name] = first[id(x)]
    return tied


def predictions(made: Any, output: Output) -> torch.Tensor:
    """The predictions in what a model returns.

    Raises:
        ArgumentError: they are not there.
        DtypeError: they are no tensor; says what there is.
    """
    if output is None:
        found = made if is_torch(made) else getattr(made, "logits", None)
        if found is None and isinstance(made, Mapping):
            found = made.get("logits")
    elif callable(output):
        found = output(made)
    else:
        try:
            named = isinstance(output, str) and not isinstance(made, Mapping)
            found = getattr(made, output) if named else made[output]  # type: ignore[arg-type]
        except (AttributeError, KeyError, IndexError, TypeError):
            raise ArgumentError(
                f"output: there is no {output!r} in what the model returns, {_said(made)}"
            ) from None
    if not is_torch(found):
        raise DtypeError(
            f"the model returns {_said(made)}: output= says where the predictions are (an index, a "
            "key, an attribute or a function)"
        )
    return found


def _said(made: object) -> str:
    """What it is, in words."""
    if isinstance(made, Mapping):
        return f"a {type(made).__name__} of {', '.join(map(str, made))}"
    if isinstance(made, (tuple, list)):
        return f"a {type(made).__name__} of {', '.join(type(x).__name__ for x in made)}"
    return f"a {type(made).__name__}"


def check_modes(model: torch.nn.Module) -> None:
    """Refuse modules whose output depends on the batch or on chance.

    Raises:
        UnsupportedLayerError: names the module and says what to do.
    """
    import torch

    nn = torch.nn
    normalizing = nn.modules.batchnorm._BatchNorm
    chance = (nn.modules.dropout._DropoutNd, nn.RNNBase, nn.MultiheadAttention)
    for name, module in model.named_modules():
        said = f"layer {name or 'model'} ({type(module).__name__})"
        if isinstance(module, normalizing) and module.running_mean is None:
            raise UnsupportedLayerError(
                f"{said} keeps no running statistics, so that a sample's output depends on the "
                "batch: make it with track_running_stats=True, and call model.eval()"
            )
        if not module.training:
            continue
        if isinstance(module, normalizing):
            raise UnsupportedLayerError(
                f"{said} is in training mode, where a sample's output depends on the batch: call "
                "model.eval() first"
            )
        share = getattr(module, "p", getattr(module, "dropout", 0.0))
        if isinstance(module, nn.RReLU) or (isinstance(module, chance) and share > 0):
            raise UnsupportedLayerError(
                f"{said} is in training mode, where its output is left to chance: call "
                "model.eval() first"
            )
