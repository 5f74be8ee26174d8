"""Whether scheme "auto" takes the form that stores least: every form built, and its prediction.

    python profiling/auto_choice.py                       the six networks, 1e-1, 1e-2, 1e-3
    python profiling/auto_choice.py two_outputs --rtol 1e-2 --forms kfe auto
    python profiling/auto_choice.py --json profiling/results/auto_choice.json

mnist and enco are those of the founding tables; the others are trained on the same digits, pooled
2 x 2 to 196 pixels. A form that misses the error, which it says, is not compared. With --json
what is there is kept, and what was asked for replaces its part: a form at a time can be built.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import network_data
import numpy as np
from environment import environment

import gpu_hodlr as gh
from gpu_hodlr.cli.digits import load_digits
from gpu_hodlr.errors import AccuracyWarning, GpuHodlrError, RankCapWarning

# name: widths, loss, activation
NETWORKS: dict[str, tuple[tuple[int, ...], str, str]] = {
    "deep_classifier": ((196, 64, 64, 64, 10), "cross_entropy", "Tanh"),
    "gelu_autoencoder": ((196, 64, 16, 64, 196), "mse", "GELU"),
    "regression": ((196, 32, 20), "mse", "Tanh"),
    "two_outputs": ((196, 48, 2), "mse", "Tanh"),
    "autoencoder": ((196, 40, 196), "mse", "ReLU"),
    "small_autoencoder": ((196, 8, 196), "mse", "ReLU"),
    "small_classifier": ((196, 16, 16, 10), "cross_entropy", "ReLU"),
}
CHOICE = ("mnist", "enco", *list(NETWORKS)[:4])
FORMS = ("kfe", "lowrank", "hss", "hodlr", "auto")
RTOLS = (1e-1, 1e-2, 1e-3)
MAX_RANK = 512
EPOCHS, BATCH, RATE = 20, 100, 2e-3
SLACK = 1.1  # of the least storage, what the choice may take
MISSED = AccuracyWarning, RankCapWarning
CPU_SECONDS = 120.0  # for a form; beyond it is given up


def operator(
    name: str,
    samples: int = 1000,
    side: int = 28,
    hidden: int | None = None,
    dtype: str = "float64",
) -> Any:
    """The Gauss-Newton matrix of a network; `side` and `hidden` make those of mnist and enco small.

    See `network_data.load`.
    """
    if name in ("mnist", "enco"):
        net = network_data.load(name, samples=samples, side=side, hidden=hidden)
        return network_data.operator(net, dtype)
    model, loss, inputs, targets = trained(*NETWORKS[name], samples)
    return gh.GGNOperator(model, loss, inputs, targets, dtype=dtype)


def trained(widths: tuple[int, ...], loss: str, activation: str, samples: int) -> tuple[Any, ...]:
    """A network trained on pooled digits: model, loss, and the samples of its matrix."""
    import torch
    from torch import nn

    images, labels = load_digits()
    pooled = images.reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)).reshape(len(images), -1)
    x = torch.from_numpy(pooled)
    y = torch.from_numpy(labels) if loss == "cross_entropy" else _wanted(x, labels, widths[-1])
    criterion = nn.CrossEntropyLoss() if loss == "cross_entropy" else nn.MSELoss()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        modules: list[Any] = []
        for a, b in pairwise(widths):
            modules += [nn.Linear(a, b), getattr(nn, activation)()]
            nn.init.xavier_uniform_(modules[-2].weight)
            nn.init.zeros_(modules[-2].bias)
        model = nn.Sequential(*modules[:-1])
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
        few, targets = x.float(), y.float() if y.is_floating_point() else y
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(few)).split(BATCH):
                optimizer.zero_grad()
                criterion(model(few[batch]), targets[batch]).backward()
                optimizer.step()
    chosen = torch.from_numpy(np.sort(np.random.default_rng(0).choice(len(x), samples, False)))
    return model.double().eval(), loss, x[chosen], y[chosen]


def _wanted(x: Any, labels: Any, outputs: int) -> Any:
    """What a network under the mean squared error learns: the input, or functions of the digit."""
    import torch

    if outputs == x.shape[1]:
        return x
    angle = torch.from_numpy(2 * np.pi * labels / 10)
    waves = [f(k * angle) for k in range(1, outputs // 2 + 1) for f in (torch.cos, torch.sin)]
    return torch.stack(waves, dim=1)


def compare(op: Any, row: dict[str, Any], rtol: float, options: argparse.Namespace) -> None:
    """Build what is asked for into a row, and judge what "auto" takes by all that is there."""
    for form in options.forms:
        found = _build(op, form, rtol, options.max_rank, options.cpu_seconds)
        (row if form == "auto" else row["built"])[form] = found
        print(f"  {form}: {found}", flush=True)
    reached = {s: b["stored_percent"] for s, b in row["built"].items() if b.get("reached")}
    best = min(reached, key=lambda s: reached[s]) if reached else None
    auto = row.get("auto", {})
    ratio = auto["stored_percent"] / reached[best] if best and auto.get("reached") else None
    row |= {"best": best, "ratio": ratio, "good": None if ratio is None else ratio <= SLACK}
    print(f"  best {best}, ratio {ratio}, good {row['good']}", flush=True)


class TooLongError(Exception):
    """A form takes more CPU seconds than it may."""


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise `TooLongError` after so many CPU seconds of the process."""

    def stop(*_: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _build(op: Any, scheme: str, rtol: float, max_rank: int, seconds: float) -> dict[str, Any]:
    start = time.process_time()
    try:
        with warnings.catch_warnings(record=True) as missed, cpu_limit(seconds):
            warnings.simplefilter("always")
            K = gh.compress(op, scheme, rtol=rtol, max_rank=max_rank, leaf_size=128)
    except TooLongError:
        return {"failure": f"takes more than {seconds:g} CPU seconds"}
    except GpuHodlrError as error:
        return {"failure": " ".join(str(error).split())}
    return {
        "scheme": K.report.scheme, "error": K.report.error, "choice": K.report.choice,
        "stored_percent": 100 * K.storage_fraction,
        "reached": not any(issubclass(w.category, MISSED) for w in missed),
        "cpu_s": time.process_time() - start, "rank": max(max(level) for level in K.ranks),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(CHOICE)}; default all")
    parser.add_argument("--rtol", type=float, action="append", help="default 1e-1, 1e-2, 1e-3")
    parser.add_argument("--max-rank", type=int, default=MAX_RANK)
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=FORMS, help="that are built; default all"
    )
    parser.add_argument(
        "--cpu-seconds", type=float, default=CPU_SECONDS,
        help=f"that a form may take; default {CPU_SECONDS:g}",
    )  # fmt: skip
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--json", type=Path, help="write the results there")
    options = parser.parse_args()
    unknown = set(options.networks) - {*CHOICE, *NETWORKS}
    if unknown:
        parser.error(f"unknown network {', '.join(sorted(unknown))}")
    rows: dict[str, Any] = {}
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text(encoding="utf-8"))["results"]
    for name in options.networks or CHOICE:
        op = operator(name, options.samples)
        for rtol in options.rtol or RTOLS:
            print(f"{name}: N {op.shape[0]}, rtol {rtol:g}", flush=True)
            row = rows.setdefault(f"{name} {rtol:g}", {"N": op.shape[0], "built": {}})
            compare(op, row, rtol, options)
            if options.json:
                content = {"environment": environment(), "max_rank": options.max_rank,
                           "results": rows}  # fmt: skip
                options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
