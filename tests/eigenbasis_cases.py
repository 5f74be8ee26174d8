"""Networks whose matrices are compressed in their Kronecker-factored eigenbasis."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from seeds import seeded
from torch import nn

import gpu_hodlr as gh

torch.set_num_threads(1)

# name: (widths, loss, what follows the last layer, biases)
CASES: dict[str, tuple[tuple[int, ...], str, type[nn.Module] | None, bool]] = {
    "autoencoder": ((15, 6, 17), "mse", None, True),
    "deep autoencoder without biases": ((15, 7, 5, 16), "mse", None, False),
    "few outputs": ((9, 6, 2), "mse", None, True),
    "one layer": ((6, 4), "mse", None, True),
    "activated outputs": ((7, 5, 4), "mse", nn.Tanh, True),
    "classifier": ((12, 8, 8, 5), "cross_entropy", None, True),
    "frozen weights": ((12, 8, 8, 5), "cross_entropy", None, True),
    "frozen outputs": ((10, 6, 5, 11), "mse", None, True),
}
# Too large for every test: its entries are sampled, and a low-rank part takes the place of many.
LARGER = {"larger classifier": ((20, 16, 16, 5), "cross_entropy", None, True)}
FROZEN = {  # names of parameters
    "frozen weights": ("2.weight", "4.bias"),
    "frozen outputs": ("0.bias", "2.weight", "2.bias", "4.weight", "4.bias"),
}


def network(
    widths: Sequence[int], last: type[nn.Module] | None = None, bias: bool = True
) -> nn.Sequential:
    """Linear layers with tanh between them, of seeded weights, in float64."""
    with seeded():
        modules: list[nn.Module] = []
        for a, b in pairwise(widths):
            modules += [nn.Linear(a, b, bias=bias), nn.Tanh()]
    modules[-1:] = [] if last is None else [last()]
    return nn.Sequential(*modules).double()


def operator(name: str, n: int = 40, dtype: Any = np.float64, device: str = "cpu") -> Any:
    """The Gauss-Newton matrix of a case; two inputs are always 0, so that a rank is lost."""
    widths, loss, last, bias = (CASES | LARGER)[name]
    rng = np.random.default_rng(1)
    inputs = rng.standard_normal((n, widths[0])) * 0.8 ** np.arange(widths[0])
    inputs[:, -2:] = 0
    targets = (
        rng.standard_normal((n, widths[-1])) if loss == "mse"
        else rng.integers(0, widths[-1], n)
    )  # fmt: skip
    model = network(widths, last, bias)
    for parameter in FROZEN.get(name, ()):
        model.get_parameter(parameter).requires_grad_(False)
    op = gh.GGNOperator(model, loss, inputs, targets, dtype=dtype)
    return op.to(device)
