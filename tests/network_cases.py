"""Small networks and data for tests of the Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from seeds import seeded
from torch import nn

torch.set_num_threads(1)

SAMPLES = 7


def _nested() -> nn.Module:
    inner = nn.Sequential(nn.Linear(4, 3), nn.Sequential(nn.Softplus(), nn.Linear(3, 4)))
    return nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.Tanh()), inner, nn.Linear(4, 3))


def _dropout() -> nn.Module:
    layers = (nn.Linear(6, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3), nn.Dropout(0.2))
    return nn.Sequential(*layers).eval()


def _one_activation_module() -> nn.Module:
    """As many write it: one module object in two places."""
    tanh = nn.Tanh()
    return nn.Sequential(nn.Linear(6, 5), tanh, nn.Linear(5, 4), tanh, nn.Linear(4, 3))


# name: (constructor, shape of one input, outputs)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "one layer": (lambda: nn.Sequential(nn.Linear(6, 3)), (6,), 3),
    "one layer without Sequential": (lambda: nn.Linear(6, 3), (6,), 3),
    "one layer without bias": (lambda: nn.Sequential(nn.Linear(6, 3, bias=False)), (6,), 3),
    "one layer, activated": (lambda: nn.Sequential(nn.Linear(6, 4), nn.Sigmoid()), (6,), 4),
    "two layers": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)), (6,), 3),
    "without bias": (
        lambda: nn.Sequential(nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False)),
        (6,),
        3,
    ),
    "bias in some layers": (
        lambda: nn.Sequential(
            nn.Linear(6, 4, bias=False),
            nn.SiLU(),
            nn.Linear(4, 5),
            nn.Tanh(),
            nn.Linear(5, 3, bias=False),
        ),
        (6,),
        3,
    ),
    "deep": (
        lambda: nn.Sequential(
            nn.Linear(6, 5),
            nn.Tanh(),
            nn.Linear(5, 4),
            nn.Sigmoid(),
            nn.Linear(4, 6),
            nn.Softplus(),
            nn.Linear(6, 3),
        ),
        (6,),
        3,
    ),
    "layers with no activation between": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        (6,),
        3,
    ),
    "two activations in a row": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Softplus(), nn.Linear(4, 3)),
        (6,),
        3,
    ),
    "activation first": (
        lambda: nn.Sequential(nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
        (6,),
        3,
    ),
    "activation last": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softplus()),
        (6,),
        3,
    ),
    "wide output": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 10)),
        (6,),
        10,
    ),
    "wide output, activated": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 10), nn.Sigmoid()),
        (6,),
        10,
    ),
    "wide output, deep": (
        lambda: nn.Sequential(
            nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 4, bias=False), nn.SiLU(), nn.Linear(4, 10)
        ),
        (6,),
        10,
    ),
    "as many outputs as hidden units": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4)),
        (6,),
        4,
    ),
    "width 1": (lambda: nn.Sequential(nn.Linear(6, 1), nn.Tanh(), nn.Linear(1, 2)), (6,), 2),
    "inplace": (
        lambda: nn.Sequential(
            nn.Linear(6, 5),
            nn.ReLU(inplace=True),
            nn.Linear(5, 5),
            nn.ELU(inplace=True),
            nn.Linear(5, 3),
            nn.LeakyReLU(0.1, inplace=True),
        ),
        (6,),
        3,
    ),
    "one activation module in two places": (_one_activation_module, (6,), 3),
    "nested": (_nested, (6,), 3),
    "flatten first": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)),
        (1, 2, 3),
        3,
    ),
    "dropout in eval": (_dropout, (6,), 3),
}


def network(name: str, dtype: Any = torch.float64, seed: int = 0) -> nn.Module:
    """A network of the list above with seeded random weights."""
    with seeded(seed):
        return NETWORKS[name][0]().to(dtype)


def data(
    shape: tuple[int, ...],
    outputs: int,
    loss: str,
    n: int = SAMPLES,
    dtype: Any = torch.float64,
    seed: int = 1,
) -> tuple[Any, Any]:
    """Inputs and targets: class indices for cross_entropy, numbers for mse."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(n, *shape, dtype=dtype, generator=generator)
    if loss == "cross_entropy":
        return inputs, torch.randint(outputs, (n,), generator=generator)
    return inputs, torch.randn(n, outputs, dtype=dtype, generator=generator)


def case(
    name: str, loss: str, dtype: Any = torch.float64, n: int = SAMPLES
) -> tuple[Any, Any, Any]:
    """Model, inputs, targets."""
    _, shape, outputs = NETWORKS[name]
    return network(name, dtype), *data(shape, outputs, loss, n, dtype)


def image_network(pixels: int, hidden: int, outputs: int, seed: int = 0) -> nn.Module:
    """A classifier pixels - hidden - outputs, float64."""
    with seeded(seed):
        layers = (nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, outputs))
    return nn.Sequential(*layers).double()


def images(side: int, n: int, border: int, seed: int = 0) -> Any:
    """(n, side^2) smooth random images whose border pixels are exactly zero, float64."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.arange(float(side), dtype=torch.float64)
    center = torch.rand(n, 2, 1, generator=generator, dtype=torch.float64) * side
    width = 1 + torch.rand(n, 1, 1, generator=generator, dtype=torch.float64) * side / 3
    squares = (grid - center) ** 2
    image = torch.exp(-(squares[:, 0, :, None] + squares[:, 1, None, :]) / width**2)
    inside = (grid >= border) & (grid < side - border)
    return (image * (inside[:, None] & inside)).reshape(n, -1)
