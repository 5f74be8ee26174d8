"""Networks of Linear layers that hide in others: in what only calls them, or behind a trunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from gpu_hodlr.devices import free_bytes, is_torch
from gpu_hodlr.errors import UnsupportedLayerError
from gpu_hodlr.networks.data import Data
from gpu_hodlr.networks.layers import Evaluated, evaluate
from gpu_hodlr.networks.losses import Loss
from gpu_hodlr.networks.model import Chosen, Network, reads_model
from gpu_hodlr.networks.modules import flatten_modules
from gpu_hodlr.networks.output_hessian import has_output_hessian
from gpu_hodlr.networks.problem import check_chance, check_samples_alone

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.networks.data import Batch
    from gpu_hodlr.networks.losses import Targets

_SHARE = 4  # of the free memory, what is gathered of batches


@reads_model
def layered(
    chosen: Chosen,
    data: Data,
    loss: Loss,
    num_data: int | None,
    network: Network,
    *,
    forced: bool = False,
    second: bool = False,
) -> Evaluated | None:
    """The model's layers at all samples, where it is of Linear ones and activations; else None.

    The parameters chosen must be of one module of Linear layers and activations that is called
    once, and whose output is what the model predicts: what is done before is part of its inputs.
    That is told by the tensors themselves, not by the model's code.

    Args:
        chosen: the model and its parameters.
        data: all of which is gathered.
        loss: of the outputs.
        num_data: samples that a mean is over.
        network: the model as a function.
        forced: whether to say why there is none.
        second: whether the activations' second derivatives are wanted.

    Raises:
        UnsupportedLayerError: there is none by the model's layers, and it is forced.
        ArgumentError, ShapeError, DtypeError: data that do not fit.
    """
    first: UnsupportedLayerError | None = None
    for module in _holders(chosen):
        try:
            steps = flatten_modules(module, chosen.named)
        except UnsupportedLayerError as e:
            first = first or e
            continue
        if not has_output_hessian(loss):
            return None
        gathered = _gathered(chosen, data, network, module, forced=forced)
        if gathered is not None:
            return evaluate(steps, chosen.ids, loss, *gathered, num_data, second=second)
    if forced and first is not None:
        raise first
    return None


def _holders(chosen: Chosen) -> Iterator[torch.nn.Module]:
    """Modules that have all parameters chosen, the model first."""
    if not chosen.module:
        return
    model: Any = chosen.model
    yield model
    paths = [name.split(".")[:-1] for name in chosen.named]
    common = 0
    while all(len(path) > common and path[common] == paths[0][common] for path in paths):
        common += 1
        yield model.get_submodule(".".join(paths[0][:common]))


def _gathered(
    chosen: Chosen, data: Data, network: Network, module: torch.nn.Module, *, forced: bool
) -> tuple[torch.Tensor, Targets] | None:
    """The module's inputs and the targets of all data; None where it does not make the outputs."""
    import torch

    room = free_bytes(network.place.type) // _SHARE
    inputs: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    for batch in data:
        if module is chosen.model:
            h = batch.inputs if is_torch(batch.inputs) and network.output is None else None
        else:
            h = _inputs_of(network, module, batch, first=not inputs)
        if h is None or not (is_torch(batch.targets) or not data.streamed):
            return None
        if not data.streamed:
            return h, batch.targets
        inputs.append(h)
        targets.append(batch.targets)
        room -= h.nbytes
        if room < 0 and not forced:
            return None
    return torch.cat(inputs), torch.cat(targets)


def _inputs_of(
    network: Network, module: torch.nn.Module, batch: Batch, *, first: bool
) -> torch.Tensor | None:
    """What the module gets, where the model's predictions are what it returns."""
    given: list[Any] = []
    returned: list[Any] = []

    def before(module: torch.nn.Module, args: Any, options: Any) -> None:
        given.append((args, options, [x.detach().clone() for x in args if is_torch(x)]))

    def after(module: torch.nn.Module, args: Any, options: Any, result: Any) -> None:
        returned.append((result, getattr(result, "_version", None)))

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    theta = tuple(p.detach().requires_grad_() for p in network.theta)
    try:
        with network.plain():
            made = network(theta, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    if len(given) != 1 or len(returned) != 1:
        return None
    (args, options, copies), (result, version) = given[0], returned[0]
    if made is not result or made._version != version or len(args) != 1 or options or not copies:
        return None
    if args[0].requires_grad or not copies[0].is_floating_point():
        return None  # it depends on the parameters itself
    if made.ndim == 0 or len(made) != batch.size or len(copies[0]) != batch.size:
        return None
    if first:
        with network.plain():
            check_chance(network, batch)
            check_samples_alone(network, batch, made.detach())
    return copies[0]
