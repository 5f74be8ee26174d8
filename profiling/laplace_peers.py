"""Laplace approximations of one network: gh.Laplace beside laplace-torch, and the exact values.

    python profiling/laplace_peers.py
    python profiling/laplace_peers.py --widths 15 10 --schemes hss kfe
    python profiling/laplace_peers.py --json profiling/results/laplace_peers.json

A classifier 49 - 30 - 20 - 10 of 1,000 digits of MNIST, N = 2,330, float64 and one thread. Exact is
a dense Gauss-Newton matrix and its eigenvalues, by NumPy. CPU seconds of a fit with the evidence,
of the predictive variance at 100 digits, and of the prior's optimization, which is laplace-torch's
own: 100 steps of Adam. Needs laplace-torch and mlxtend.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import laplace
import numpy as np
import torch
from environment import environment
from scipy.optimize import minimize_scalar
from torch.utils.data import DataLoader, TensorDataset

import gpu_hodlr as gh
from gpu_hodlr.cli.digits import load_digits

SIDE, WIDTHS, CLASSES, STEPS, TESTED = 7, (30, 20), 10, 300, 100
SCHEMES = "auto", "hss", "hodlr", "lowrank", "kfe"
STRUCTURES = "full", "kron", "diag"


def digits(num: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets, and other inputs."""
    images, labels = load_digits()
    chosen = np.random.default_rng(0).permutation(len(images))[: num + TESTED]
    small = images[chosen].reshape(-1, SIDE, 28 // SIDE, SIDE, 28 // SIDE).mean(axis=(2, 4))
    x = torch.from_numpy(small.reshape(-1, SIDE**2))
    return x[:num], torch.from_numpy(labels[chosen[:num]]), x[num:]


def trained(x: torch.Tensor, y: torch.Tensor, hidden: Sequence[int]) -> torch.nn.Sequential:
    """At about the maximum of the posterior of prior precision 1."""
    torch.manual_seed(0)
    widths = (SIDE**2, *hidden)
    layers: list[torch.nn.Module] = []
    for before, after in pairwise(widths):
        layers += [torch.nn.Linear(before, after), torch.nn.Tanh()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], CLASSES)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
        (loss + 0.5 * sum((p**2).sum() for p in model.parameters())).backward()
        optimizer.step()
    return model.eval()


class Exact:
    """By a dense matrix."""

    def __init__(self, model: torch.nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> None:
        op = gh.GGNOperator(model, "cross_entropy", x, y, reduction="sum", entries="dense")
        self.values, self.vectors = np.linalg.eigh(op.to_dense())
        theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
        self.norm, self.n = theta @ theta, len(theta)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
        self.fit = -float(loss)

    def evidence(self, prior: float) -> float:
        """The log marginal likelihood."""
        half = self.n * np.log(prior) - np.log(self.values.clip(0) + prior).sum()
        return float(self.fit - 0.5 * prior * self.norm + 0.5 * half)

    def prior(self) -> float:
        """That of the largest evidence."""
        found = minimize_scalar(lambda t: -self.evidence(np.exp(t)), (-2, 2), tol=1e-8)
        return float(np.exp(found.x))

    def variance(self, model: torch.nn.Sequential, x: torch.Tensor) -> np.ndarray:
        """Of the outputs at x, for prior precision 1."""

        def outputs(theta: Any, one: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, theta, one[None])[0]

        theta = {name: p.detach() for name, p in model.named_parameters()}
        J = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(theta, x)
        rows = torch.cat([part.flatten(2) for part in J.values()], 2).numpy() @ self.vectors
        found: np.ndarray = (rows**2 / (self.values.clip(0) + 1)).sum(-1)
        return found


def seconds(run: Callable[[], Any]) -> tuple[Any, float]:
    """What it gives, and CPU seconds."""
    start = time.process_time()
    found = run()
    return found, time.process_time() - start


def ours(scheme: str, model: Any, x: torch.Tensor, y: torch.Tensor, new: torch.Tensor) -> Any:
    """Evidence and variance at prior precision 1, the best prior, and the times of the three."""

    def fit() -> tuple[gh.Laplace, float]:
        posterior = gh.Laplace(model, "cross_entropy", (x, y), 1.0, scheme)
        return posterior, posterior.log_marginal_likelihood()

    (posterior, value), fitted = seconds(fit)
    variance, predicted = seconds(lambda: posterior.predict(new).variance.numpy())
    prior, optimized = seconds(posterior.optimize_prior_precision)
    about = {"form": type(posterior.matrix).__name__, "stored": posterior.matrix.storage_fraction}
    return value, variance, prior, (fitted, predicted, optimized), about


def theirs(structure: str, model: Any, x: torch.Tensor, y: torch.Tensor, new: torch.Tensor) -> Any:
    """The same of laplace-torch."""
    data = DataLoader(TensorDataset(x, y), batch_size=len(x))

    def fit() -> tuple[Any, float]:
        found = laplace.Laplace(
            model, "classification", subset_of_weights="all", hessian_structure=structure,
            prior_precision=1.0,
        )  # fmt: skip
        found.fit(data)
        return found, float(found.log_marginal_likelihood())

    (posterior, value), fitted = seconds(fit)
    variance, predicted = seconds(
        lambda: posterior._glm_predictive_distribution(new)[1].detach().numpy()
    )
    _, optimized = seconds(
        lambda: posterior.optimize_prior_precision(
            method="marglik", prior_structure="scalar", pred_type="glm"
        )
    )
    prior = float(posterior.prior_precision.reshape(-1)[0])
    diagonal = variance.diagonal(axis1=1, axis2=2)
    return value, diagonal, prior, (fitted, predicted, optimized), {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--schemes", nargs="*", default=SCHEMES)
    parser.add_argument("--structures", nargs="*", default=STRUCTURES)
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    x, y, new = digits(options.samples)
    model = trained(x, y, options.widths)
    exact = Exact(model, x, y)
    wanted, best, spread = exact.evidence(1.0), exact.prior(), exact.variance(model, new)
    print(f"N = {exact.n}, exact: evidence {wanted:.3f}, best prior {best:.5f}")
    found: dict[str, Any] = {"exact": {"evidence": wanted, "prior": best, "n": exact.n}}
    jobs = [(f"gh {s}", ours, s) for s in options.schemes]
    jobs += [(f"laplace-torch {s}", theirs, s) for s in options.structures]
    for name, run, kind in jobs:
        value, variance, prior, times, about = run(kind, model, x, y, new)
        off = float(abs(variance / spread - 1).max())
        found[name] = {
            "evidence": value, "prior": prior, "variance_error": off,
            "cpu_seconds": dict(zip(("fit", "predict", "optimize"), times, strict=True)), **about,
        }  # fmt: skip
        took = ", ".join(f"{t:.2f}" for t in times)
        print(f"{name:20} evidence {value:9.3f}  prior {prior:.5f}  variance {off:.1e}  s {took}")
    if options.json:
        text = json.dumps({"environment": environment(), "found": found}, indent=1)
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
