"""The founding tables' trained networks from data/networks.npz; see make_networks.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import gpu_hodlr as gh
from gpu_hodlr.cli.networks import LAYERS, LOSS, StandIn, build

FILE = Path(__file__).with_name("data") / "networks.npz"
_SIDE = 28  # pixels


def load(
    name: str, *, side: int = _SIDE, hidden: int | None = None, samples: int = 1000
) -> StandIn:
    """A network as `gpu_hodlr.cli.networks.train` gives it.

    Args:
        name: "mnist" or "enco".
        side: pixels of the digits' edge, cut from their middle; fewer make a small matrix of
            the same kind.
        hidden: units kept of each hidden layer, all by default.
        samples: the first so many of the 1,000.
    """
    import torch

    first = (_SIDE - side) // 2
    middle = np.arange(_SIDE**2).reshape(_SIDE, _SIDE)[first : first + side, first : first + side]
    pixels = middle.ravel()
    layers = LAYERS[name]
    kept = [pixels, *(np.arange(width)[:hidden] for width in layers[1:-1])]
    kept.append(pixels if name == "enco" else np.arange(layers[-1]))
    model = build(tuple(map(len, kept)))
    with np.load(FILE) as file, torch.no_grad():
        for i in range(len(layers) - 1):
            module = model[2 * i]
            weight, bias = (file[f"{name}.{2 * i}.{part}"] for part in ("weight", "bias"))
            module.weight.copy_(torch.from_numpy(weight[np.ix_(kept[i + 1], kept[i])]))
            module.bias.copy_(torch.from_numpy(bias[kept[i + 1]]))
        inputs = torch.from_numpy(file["images"][:samples, pixels] / 255.0)
        labels = torch.from_numpy(file["labels"][:samples].astype(np.int64))
        loss, right, dead = file[f"{name}.trained"]
    return StandIn(
        name=name,
        layers=tuple(map(len, kept)),
        model=model.double().eval(),
        loss=LOSS[name],
        inputs=inputs,
        targets=labels if name == "mnist" else inputs,
        final_loss=float(loss),
        accuracy=float(right) if name == "mnist" else None,
        dead_units=int(dead),
    )


def operator(net: StandIn, dtype: str = "float64", device: str = "cpu") -> Any:
    """The Gauss-Newton matrix of a network at its samples."""
    return gh.GGNOperator(net.model, net.loss, net.inputs, net.targets, dtype=dtype, device=device)
