"""Products with curvature matrices of networks beside curvlinops, in one run.

    python profiling/curvature_products.py
    python profiling/curvature_products.py lenet gpt --columns 1 16
    python profiling/curvature_products.py --json profiling/results/curvature_products.json

Needs `pip install curvlinops-for-pytorch`. CPU seconds, the least of several runs that alternate;
float32, one thread. "auto" is what GGNOperator and FisherOperator choose by themselves, "none" are
products alone; what curvlinops does not have (the Hessian where a layer's backward pass has no
forward mode) is "-", and what it has wrong is marked: its Hessians of LayerNorm are, by torch 2.13.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from environment import environment
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpu_hodlr as gh

RUNS = 3
COLUMNS = (1, 16, 128)
KINDS = ("ggn", "hessian", "empirical")
SAME = 1e-3  # relative difference of two products in float32


class Case(NamedTuple):
    """A network with data; the loss is the mean cross entropy."""

    model: Any
    inputs: Any
    targets: Any


class Residual(nn.Module):
    """Two convolutions, and what goes past them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Any) -> Any:
        """relu(x + f(x))."""
        return torch.relu(x + self.branch(x))


class Transformer(nn.Module):
    """Of an embedding of tokens, causal where every token has a prediction."""

    def __init__(self, vocabulary: int, width: int, length: int, outputs: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.1 * torch.randn(length, width))
        self.layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.head = nn.Linear(width, outputs or vocabulary)
        self.tokens = outputs is None

    def forward(self, x: Any) -> Any:
        """Logits, of every token with the classes in axis 1."""
        h = self.embedding(x) + self.places
        if self.tokens:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=h.dtype)
            return self.head(self.layer(h, mask, is_causal=True)).movedim(-1, 1)
        return self.head(self.layer(h).mean(1))


def dense(*widths: int) -> Any:
    layers: list[Any] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def mlp() -> Case:
    return Case(dense(784, 20, 10), torch.randn(256, 784), torch.randint(10, (256,)))


def deep_mlp() -> Case:
    return Case(dense(196, 64, 64, 64, 10), torch.randn(256, 196), torch.randint(10, (256,)))


def lenet() -> Case:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 12, 5), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(192, 40), nn.ReLU(), nn.Linear(40, 10),
    )  # fmt: skip
    return Case(model, torch.randn(128, 1, 28, 28), torch.randint(10, (128,)))


def resnet() -> Case:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), Residual(12), nn.AvgPool2d(2), Residual(12),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10),
    )  # fmt: skip
    return Case(model, torch.randn(32, 3, 16, 16), torch.randint(10, (32,)))


def transformer() -> Case:
    model = Transformer(50, 32, 16, 10)
    return Case(model, torch.randint(50, (64, 16)), torch.randint(10, (64,)))


def gpt() -> Case:
    model = Transformer(50, 32, 16, None)
    return Case(model, torch.randint(50, (32, 16)), torch.randint(50, (32, 16)))


CASES: dict[str, Callable[[], Case]] = {
    make.__name__: make for make in (mlp, deep_mlp, lenet, resnet, transformer, gpt)
}


@contextlib.contextmanager
def theirs() -> Iterator[None]:
    """Attention as curvlinops can differentiate it."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def operators(kind: str, case: Case) -> dict[str, Any]:
    """Of curvlinops and of this package, by name."""
    import curvlinops

    loss = nn.CrossEntropyLoss()
    known = {
        "ggn": curvlinops.GGNLinearOperator,
        "hessian": curvlinops.HessianLinearOperator,
        "empirical": curvlinops.EFLinearOperator,
    }
    found = {
        "curvlinops": known[kind](
            case.model,
            loss,
            list(case.model.parameters()),
            [(case.inputs, case.targets)],
            check_deterministic=False,
        )
    }
    if kind == "hessian":
        return {**found, "none": gh.HessianOperator(*case[:1], loss, *case[1:], entries="none")}
    for entries in ("auto", "none"):
        if kind == "ggn":
            found[entries] = gh.GGNOperator(*case[:1], loss, *case[1:], entries=entries)
        else:
            found[entries] = gh.FisherOperator(
                *case[:1], loss, *case[1:], kind="empirical", entries=entries
            )
    return found


def measure(kind: str, case: Case, columns: int) -> dict[str, Any]:
    """CPU seconds of a product, and how much it differs from that of products alone."""
    made = operators(kind, case)
    v = torch.randn(made["none"].shape[0], columns)
    seconds: dict[str, float | None] = dict.fromkeys(made)
    results = {}
    for _ in range(RUNS):
        for name, op in made.items():
            start = time.process_time()
            try:
                with theirs() if name == "curvlinops" else contextlib.nullcontext():
                    results[name] = op @ v
            except NotImplementedError:
                continue
            spent = time.process_time() - start
            seconds[name] = min(spent, seconds[name] or spent)
    scale = float(results["none"].norm())
    off = {name: float((x - results["none"]).norm()) / scale for name, x in results.items()}
    return {
        "n": made["none"].shape[0],
        "access": getattr(made.get("auto"), "access", None),
        "seconds": seconds,
        "differs": sorted(name for name, x in off.items() if x > SAME),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("networks", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--columns", nargs="*", type=int, default=COLUMNS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of this package: read at its first product
    rows = []
    print(f"{'':32} {'curvlinops':>10} {'auto':>8} {'none':>8}  times faster")
    for name in args.networks or CASES:
        for kind in args.kinds:
            torch.manual_seed(0)
            case = CASES[name]()
            case.model.eval()
            for columns in args.columns:
                row = measure(kind, case, columns)
                rows.append({"network": name, "kind": kind, "columns": columns, **row})
                print(_line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1))


def _line(row: dict[str, Any]) -> str:
    seconds = row["seconds"]
    own = [seconds[name] for name in ("auto", "none") if name in seconds]
    theirs_ = seconds["curvlinops"]
    said = f"{row['network']} {row['kind']} {row['columns']} {row['access'] or ''}"
    cells = [
        f"{seconds[name]:8.4f}" if seconds.get(name) is not None else f"{'-':>8}"
        for name in ("curvlinops", "auto", "none")
    ]
    times = "" if theirs_ is None else ", ".join(f"{theirs_ / x:.1f}" for x in own)
    wrong = f"  differs: {', '.join(row['differs'])}" if row["differs"] else ""
    return f"{said:32}   {cells[0]} {cells[1]} {cells[2]}  {times}{wrong}"


if __name__ == "__main__":
    main()
