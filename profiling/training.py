r"""Seconds to a training loss: gh.GaussNewton beside Adam, SGD with momentum and K-FAC.

    python profiling/training.py
    python profiling/training.py autoencoder --seeds 1 --methods Adam Gauss-Newton
    python profiling/training.py --json profiling/results/training.json --plot \
        profiling/results/training.png

The MNIST classifier of the founding tables and the deep autoencoder 784-250-30-250-784, on 5,000
digits, float32, one thread, CPU seconds; the clock stands still while the loss over all data is
measured. Every method starts from the same weights. Rates of Adam and SGD, rate, damping and batch
of K-FAC are the best of a grid at the first seed, by the loss after 20 epochs (K-FAC: after as many
seconds as Adam has for these); Gauss-Newton has its defaults, and a batch. The loss to reach is
that of Adam after 20 epochs, seed by seed.

K-FAC is written here plainly: the Kronecker factors of `gh.GaussNewton`'s preconditioner with
running means, a fixed rate, momentum 0.9 and a bound on the step in the matrix's own norm (Ba,
Grosse, Martens, ICLR 2017), factors every 5 steps and inverses every 20.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import environment

from gpu_hodlr.applications.training.objective import Objective
from gpu_hodlr.applications.training.preconditioner import Kronecker, Moments
from gpu_hodlr.cli.train import ADAM_BATCH, TASKS, Curve, Trial, draw
from gpu_hodlr.networks.unit_root import trained_linear

EPOCHS = 20
ADAM = 5e-4, 1e-3, 2e-3, 5e-3, 1e-2
SGD = {"mnist": (0.02, 0.05, 0.1, 0.2), "autoencoder": (1.0, 2.0, 4.0, 8.0)}
KFAC = list(product((0.1, 1.0), (0.1, 1.0, 10.0), (1000, 2500)))  # rate, damping, batch
METHODS = "Adam", "SGD", "K-FAC", "Gauss-Newton"
FORMS = "lowrank", "kfe"  # of compress, in the place of Kronecker factors
MOMENTUM, DECAY, BOUND = 0.9, 0.95, 1e-2
FACTORS_EVERY, INVERSES_EVERY = 5, 20


class KFAC_Steps:  # noqa: N801
    """Steps of K-FAC.

    Args:
        model, loss: what is trained.
        rate: what steps are multiplied by.
        damping: over the mean of the matrix's diagonal.
    """

    def __init__(self, model: torch.nn.Module, loss: str, rate: float, damping: float) -> None:
        self._objective = Objective(model, loss, None, None, None, None, 0)
        linear = trained_linear(self._objective.chosen)
        assert linear is not None
        self._linear, self._rate, self._share, self._count = linear, rate, damping, 0
        self._matrix: Kronecker | None = None
        self._damping = 0.0
        self._velocity: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """One step."""
        point = self._objective.at(x, y)
        with point.network.plain():
            point, _, gradient = point.evaluated()
            if self._count % FACTORS_EVERY == 0:
                new = Kronecker.of(point, self._linear, self._count)
                old = self._matrix
                if old is not None:
                    moments = [
                        Moments(DECAY * a.inputs + (1 - DECAY) * b.inputs,
                                DECAY * a.units + (1 - DECAY) * b.units)
                        for a, b in zip(old.moments, new.moments, strict=True)
                    ]  # fmt: skip
                    old.moments = moments
                else:
                    self._matrix, self._damping = new, self._share * new.mean_diagonal
            assert self._matrix is not None
            if self._count % INVERSES_EVERY == 0:
                self._matrix.invert(self._damping)
            direction = self._matrix.solve(gradient, self._damping)
            size = self._rate**2 * float(direction @ gradient)
            scale = min(1.0, (BOUND / size) ** 0.5) if size > 0 else 1.0
            if self._velocity is None:
                self._velocity = torch.zeros_like(direction)
            self._velocity = MOMENTUM * self._velocity - self._rate * scale * direction
            self._objective.written(point.theta() + self._velocity)
        self._count += 1


def gradients(trial: Trial, name: str, rate: float) -> Curve:
    """Of Adam or SGD."""
    if name == "Adam":
        made = trial.by_gradients(torch.optim.Adam, lr=rate)
    else:
        made = trial.by_gradients(torch.optim.SGD, lr=rate, momentum=MOMENTUM)
    return trial.curve(name, *made, ADAM_BATCH, EPOCHS)


def kfac(trial: Trial, setting: tuple[float, float, int], seconds: float) -> Curve:
    """For as many seconds."""
    rate, damping, batch = setting
    model = trial.network()
    steps = KFAC_Steps(model, trial.task.loss, rate, damping)
    return trial.curve("K-FAC", model, steps, batch, 10**6, every=2, most=seconds)


def own(trial: Trial, seconds: float, **options: Any) -> Curve:
    """Of Gauss-Newton, for as many seconds."""
    made = trial.by_gauss_newton(**options)
    return trial.curve("Gauss-Newton", *made, trial.task.batch, 10**6, every=1, most=seconds)


def last(curve: Curve) -> float:
    """The loss at the end; infinity for what is no number."""
    return curve.losses[-1] if np.isfinite(curve.losses[-1]) else np.inf


def tuned(name: str, make: Callable[[Any], Curve], grid: Any) -> tuple[Any, Curve]:
    """The best of a grid."""
    best: tuple[Any, Curve] | None = None
    for setting in grid:
        found = make(setting)
        print(
            f"  {name} {setting}: {found.losses[-1]:.5f} in {found.seconds[-1]:.2f} s", flush=True
        )
        if best is None or last(found) < last(best[1]):
            best = setting, found
    assert best is not None
    return best


def measured(task: str, seeds: int, methods: list[str], forms: bool) -> dict[str, Any]:
    """Curves of the first seed, and seconds to Adam's loss of all."""
    trial = Trial(task, 0, "cpu", "float32")
    rate, adam = tuned("Adam", lambda r: gradients(trial, "Adam", r), ADAM)
    seconds = adam.seconds[-1]
    settings: dict[str, Any] = {"Adam": rate}
    curves = {"Adam": adam}
    if "SGD" in methods:
        settings["SGD"], curves["SGD"] = tuned(
            "SGD", lambda r: gradients(trial, "SGD", r), SGD[task]
        )
    if "K-FAC" in methods:
        settings["K-FAC"], curves["K-FAC"] = tuned("K-FAC", lambda s: kfac(trial, s, seconds), KFAC)
    reached: dict[str, list[float | None]] = {name: [] for name in METHODS if name in methods}
    targets = []
    for seed in range(seeds):
        at = Trial(task, seed, "cpu", "float32")
        of_adam = gradients(at, "Adam", rate)
        targets.append(of_adam.losses[-1])
        for name in reached:
            if name == "Adam":
                found = of_adam
            elif name == "SGD":
                found = gradients(at, name, settings[name])
            elif name == "K-FAC":
                found = kfac(at, settings[name], of_adam.seconds[-1])
            else:
                found = own(at, of_adam.seconds[-1])
            if seed == 0:
                curves[name] = found
            reached[name].append(found.reached(targets[-1]))
        said = {name: times[-1] for name, times in reached.items()}
        print(f"{task} seed {seed}, loss {targets[-1]:.5f}: {said}", flush=True)
    of_forms = dict(compressed(trial, task, targets[0])) if forms else {}
    return {
        "settings": settings, "targets": targets, "seconds": reached, "forms": of_forms,
        "curves": [asdict(curves[name]) for name in METHODS if name in curves],
    }  # fmt: skip


def compressed(trial: Trial, task: str, target: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Gauss-Newton with a compressed matrix, until it has Adam's loss, or 20 seconds."""
    for form in FORMS if task == "mnist" else FORMS[:1]:
        made = trial.by_gauss_newton(preconditioner=form, curvature_samples=200)
        found = trial.curve(form, *made, trial.task.batch, 10**6, until=target, every=1, most=20.0)
        print(f"  {form}: {found.losses[-1]:.5f} in {found.seconds[-1]:.2f} s", flush=True)
        yield form, {
            "seconds": found.reached(target), "loss": found.losses[-1], "steps": found.steps[-1],
            "spent": found.seconds[-1],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("tasks", nargs="*", choices=[*TASKS, []], default=[])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--no-forms", action="store_true", help="not the compressed matrices")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for task in args.tasks or TASKS:
        found[task] = measured(task, args.seeds, args.methods, not args.no_forms)
        if args.json:
            text = json.dumps({"environment": environment(), "tasks": found}, indent=1)
            args.json.write_text(text + "\n")
    if args.plot:
        titles = {"mnist": "784-20-20-10, cross entropy", "autoencoder": "784-250-30-250-784, mse"}
        panels = [[Curve(**curve) for curve in one["curves"]] for one in found.values()]
        draw(args.plot, panels, [titles[task] for task in found])


if __name__ == "__main__":
    main()
