"""Whole units of a network: the weights that make one's output, and those that read it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.applications.pruning.weights import Weights, network_at
from gpu_hodlr.devices import HostArray, HostIndex
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.networks.data import Batch
from gpu_hodlr.networks.model import Network
from gpu_hodlr.networks.problem import at_first_sample

if TYPE_CHECKING:
    import torch

_SAMPLES = 1000  # at which it is seen what reads a unit


@dataclass(frozen=True)
class Units:
    """The units of all hidden layers.

    Attributes:
        layer: (units,) of which layer each is.
        own: (N,) the unit whose output a weight or bias makes, -1 for none.
        readers: (N,) the unit whose output alone a weight is multiplied with, -1 for none.
    """

    layer: HostIndex
    own: HostIndex
    readers: HostIndex

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.layer)


def units_of(weights: Weights, network: Network, batch: Batch) -> Units:
    """Find the units, and what reads them.

    A layer's units are rows of its weight with their biases; those that are outputs stay. What
    reads a unit is found by setting others to zero: an input of another layer that is zero if and
    only if the unit is, is the unit's, whatever stands between the two. Units are set to zero by
    the bits of their numbers, so that it takes 2 log2 units + 1 evaluations a layer.

    Args:
        weights: the parameters.
        network: the model as their function.
        batch: samples.

    Raises:
        ArgumentError: there is no hidden layer.
    """
    few = batch.of(slice(0, _SAMPLES))
    found = _layers(weights, network, few)
    n = len(weights.theta)
    own, readers = np.full(n, -1), np.full(n, -1)
    layer_of: list[int] = []
    modules, indices = _inputs_of(weights)

    def alive(theta: HostArray) -> list[HostArray]:
        return _alive(network_at(network, weights, theta), few, modules)

    usual = alive(weights.theta)
    for number, rows in enumerate(found):
        first, count = len(layer_of), len(rows)
        own[rows] = first + np.arange(count)[:, None]
        read = _agreed(indices, _read_by(rows, alive, weights, usual))
        for index, reads in zip(indices, read, strict=True):
            for column in np.nonzero(reads >= 0)[0]:
                readers[index[:, column]] = first + reads[column]
        layer_of += [number] * count
    return Units(np.array(layer_of, np.int64), own, readers)


def _layers(weights: Weights, network: Network, few: Batch) -> list[HostIndex]:
    """Those with weights among the parameters, but for those that have the network's outputs.

    Returns:
        A layer's (units, entries) of the vector of weights: all that makes a unit's output. Modules
        of one weight are one layer, whose units are pruned in all of them.

    Raises:
        ArgumentError: there is none.
    """
    import torch

    nn = torch.nn
    kinds = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
    every = [m for m in network.model.modules() if isinstance(m, kinds)]  # type: ignore[union-attr]
    called, ends = _called(network, few.of(slice(0, 2)), every)
    found: dict[int, list[HostIndex]] = {}
    of_outputs = [weights.index_of(_own(module, "weight")) for module in ends]
    stay = {index.flat[0] for index in of_outputs if index is not None}
    for module in called:
        index = weights.index_of(_own(module, "weight"))
        if index is None or not weights.kept[index].any() or index.flat[0] in stay:
            continue
        parts = found.setdefault(int(index.flat[0]), [index.reshape(len(index), -1)])
        bias = weights.index_of(_own(module, "bias"))
        if bias is not None:
            parts.append(bias[:, None])
    if not found:
        raise ArgumentError(
            "structured=True prunes units of Linear and convolution layers, but of those that have "
            "the outputs: params has no other"
        )
    return [np.concatenate(parts, axis=1) for parts in found.values()]


def _called(
    network: Network, few: Batch, modules: Sequence[torch.nn.Module]
) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
    """Those that are called, in order; of them those that no other stands behind.

    The units of these are the outputs, or are added to them: they are where the graph of
    derivatives, followed from the outputs, comes to a module first.
    """
    import torch

    made: dict[Any, torch.nn.Module] = {}
    called: list[torch.nn.Module] = []

    def note(module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        if module in called:
            called.remove(module)
        called.append(module)
        made[output.grad_fn] = module

    with ExitStack() as stack:
        stack.enter_context(network.plain())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for module in modules:
            stack.callback(module.register_forward_hook(note).remove)
        stack.enter_context(at_first_sample())
        theta = tuple(part.detach().requires_grad_() for part in network.theta)
        left, seen, ends = [network(theta, few.inputs).grad_fn], set(), []
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made:
            ends.append(made[node])
        else:
            left += [before for before, _ in node.next_functions]
    return called, ends


def _own(module: torch.nn.Module, name: str) -> torch.Tensor | None:
    """A parameter, also where torch has put a mask on it or takes a norm of it."""
    own = module._parameters
    return own.get(name) if own.get(name) is not None else own.get(f"{name}_orig")


def _inputs_of(weights: Weights) -> tuple[list[torch.nn.Module], list[HostIndex]]:
    """Layers that read, and the entries (rows, inputs, ...) of their weights.

    Not of a weight that something else has as well, such as the table of an Embedding.
    """
    modules, indices = [], []
    for name, tensor in weights.tensors.items():
        places = [module for module, _ in weights.places(name)]
        index = weights.index_of(tensor)
        assert index is not None
        if index.ndim > 1 and all(_reads(module) for module in places):
            modules += places
            indices += [index.reshape(*index.shape[:2], -1)] * len(places)
    return modules, indices


def _agreed(indices: Sequence[HostIndex], read: Sequence[HostIndex]) -> list[HostIndex]:
    """What all modules of one weight read alike; -1 for what they do not."""
    found: dict[int, HostIndex] = {}
    for index, reads in zip(indices, read, strict=True):
        first = int(index.flat[0])
        found[first] = np.where(found.setdefault(first, reads) == reads, reads, -1)
    return [found[int(index.flat[0])] for index in indices]


def _reads(module: torch.nn.Module) -> bool:
    """Whether the second axis of the weight is of its inputs."""
    import torch

    nn = torch.nn
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def _read_by(
    rows: HostIndex,
    alive: Callable[[HostArray], list[HostArray]],
    weights: Weights,
    usual: Sequence[HostArray],
) -> list[HostIndex]:
    """For every layer that reads, (inputs,) which unit of a layer each is of; -1 for none."""

    def without(units: HostArray) -> list[HostArray]:
        theta = weights.theta.copy()
        theta[rows[units]] = 0.0
        return alive(theta)

    numbers = np.arange(len(rows))
    found = [
        np.where(before & ~after, 0, -1)
        for before, after in zip(usual, without(np.ones(len(numbers), bool)), strict=True)
    ]
    for bit in range(int(numbers[-1]).bit_length()):
        has = (numbers >> bit) & 1 == 1
        for unit, one, other in zip(found, without(has), without(~has), strict=True):
            unit[one == other] = -1  # of several units, or of others as well
            unit[unit >= 0] += (~one[unit >= 0]).astype(np.int64) << bit
    found = [np.where(unit < len(numbers), unit, -1) for unit in found]
    for unit, before in zip(found, usual, strict=True):
        _fill(unit, ~before, len(numbers))
    return found


def _fill(unit: HostIndex, silent: HostArray, count: int) -> None:
    """Inputs that are zero at every sample tell nothing: if others are in order, so are they.

    Args:
        unit: (inputs,) of which unit each is, -1 for none.
        silent: (inputs,) which tell nothing.
        count: of units.
    """
    each = len(unit) // count  # several in a row after a Flatten
    expected = np.arange(len(unit)) // max(each, 1)
    known = unit >= 0
    if len(unit) == each * count and known.any() and (unit[known] == expected[known]).all():
        unit[silent] = expected[silent]


def _alive(network: Network, few: Batch, modules: Sequence[torch.nn.Module]) -> list[HostArray]:
    """(inputs,) of every module: which are other than zero for some sample."""
    import torch

    nonzero: dict[int, Any] = {}

    def note(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        axis = x.ndim - 1 if isinstance(module, torch.nn.Linear) else 1
        seen = x.movedim(axis, 0).reshape(x.shape[axis], -1).ne(0).any(1)
        nonzero[id(module)] = nonzero.get(id(module), False) | seen

    _evaluated(network, few, [(m, note) for m in modules])
    found = []
    for module in modules:
        size = module.weight.shape[1]
        seen = nonzero.get(id(module))
        found.append(np.zeros(size, bool) if seen is None else seen.cpu().numpy())
    return found


def _evaluated(network: Network, few: Batch, hooks: Sequence[tuple[torch.nn.Module, Any]]) -> None:
    """One evaluation, with hooks on the modules."""
    import torch

    with ExitStack() as stack:
        stack.enter_context(network.plain())
        stack.enter_context(torch.no_grad())
        for module, hook in hooks:
            handle = module.register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        stack.enter_context(at_first_sample())
        network(network.theta, few.inputs)
