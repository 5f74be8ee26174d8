"""Laplace approximations of one network: gh.Laplace beside laplace-torch, and the exact values.

    python profiling/laplace_peers.py
    python profiling/laplace_peers.py --network middle --schemes auto --structures kron diag
    python profiling/laplace_peers.py --network large --json profiling/results/laplace_peers.json

Classifiers of digits of MNIST, float64 and one thread: small 49 - 30 - 20 - 10 of 1,000 digits,
N = 2,330; middle 784 - 20 - 20 - 10 of 300, N = 16,330; large 784 - 150 - 20 - 10 of 300,
N = 120,980. Exact is a dense Gauss-Newton matrix and its eigenvalues, by NumPy; of the two larger
ones the eigenvalues of A A^T, G = A^T A with 9 rows a digit, which has the same but for zeros, by
the gradients of every layer. CPU seconds of a fit with the evidence, of the predictive variance at
100 digits, and of the prior's optimization, which is laplace-torch's own: 100 steps of Adam. A case
that is there already is replaced in the JSON file. Needs laplace-torch and mlxtend.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import laplace
import numpy as np
import torch
from environment import environment
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize_scalar
from torch.utils.data import DataLoader, TensorDataset

import gpu_hodlr as gh
from gpu_hodlr.cli.digits import load_digits

CLASSES, STEPS, TESTED = 10, 300, 100
SCHEMES = "auto", "hss", "hodlr", "lowrank", "kfe"
STRUCTURES = "full", "kron", "diag"


@dataclass(frozen=True)
class Case:
    """Pixels a side, widths of the hidden layers, samples, the activation."""

    side: int
    widths: tuple[int, ...]
    samples: int
    activation: type[torch.nn.Module]


CASES = {
    "small": Case(7, (30, 20), 1000, torch.nn.Tanh),
    "middle": Case(28, (20, 20), 300, torch.nn.ReLU),  # as the command line has it
    "large": Case(28, (150, 20), 300, torch.nn.ReLU),
}


def digits(num: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets, and other inputs."""
    images, labels = load_digits()
    chosen = np.random.default_rng(0).permutation(len(images))[: num + TESTED]
    small = images[chosen].reshape(-1, side, 28 // side, side, 28 // side).mean(axis=(2, 4))
    x = torch.from_numpy(small.reshape(-1, side**2))
    return x[:num], torch.from_numpy(labels[chosen[:num]]), x[num:]


def trained(x: torch.Tensor, y: torch.Tensor, case: Case) -> torch.nn.Sequential:
    """At about the maximum of the posterior of prior precision 1."""
    torch.manual_seed(0)
    widths = (case.side**2, *case.widths)
    layers: list[torch.nn.Module] = []
    for before, after in pairwise(widths):
        layers += [torch.nn.Linear(before, after), case.activation()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(widths[-1], CLASSES)).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
        (loss + 0.5 * sum((p**2).sum() for p in model.parameters())).backward()
        optimizer.step()
    return model.eval()


class Exact:
    """Evidence and best prior of eigenvalues of G, all but zeros; variances for precision 1."""

    values: np.ndarray

    def __init__(self, model: torch.nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> None:
        theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
        self.norm, self.n = theta @ theta, len(theta)
        with torch.no_grad():
            loss = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
        self.fit = -float(loss)

    def evidence(self, prior: float) -> float:
        """The log marginal likelihood."""
        half = np.log1p(self.values.clip(0) / prior).sum()
        return float(self.fit - 0.5 * prior * self.norm - 0.5 * half)

    def prior(self) -> float:
        """That of the largest evidence."""
        found = minimize_scalar(lambda t: -self.evidence(np.exp(t)), (-2, 2), tol=1e-8)
        return float(np.exp(found.x))


class Dense(Exact):
    """By a dense matrix."""

    def __init__(self, model: torch.nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> None:
        super().__init__(model, x, y)
        op = gh.GGNOperator(model, "cross_entropy", x, y, reduction="sum", entries="dense")
        self.values, self.vectors = np.linalg.eigh(op.to_dense())

    def variance(self, model: torch.nn.Sequential, x: torch.Tensor) -> np.ndarray:
        """Of the outputs at x, (n, classes)."""

        def outputs(theta: Any, one: torch.Tensor) -> torch.Tensor:
            return torch.func.functional_call(model, theta, one[None])[0]

        theta = {name: p.detach() for name, p in model.named_parameters()}
        J = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(theta, x)
        rows = torch.cat([part.flatten(2) for part in J.values()], 2).numpy() @ self.vectors
        found: np.ndarray = (rows**2 / (self.values.clip(0) + 1)).sum(-1)
        return found


class Rows(Exact):
    """By A A^T, A (rows, N); a row is of every layer an outer product of gradient and input."""

    def __init__(self, model: torch.nn.Sequential, x: torch.Tensor, y: torch.Tensor) -> None:
        super().__init__(model, x, y)
        self.rows = self._factors(model, x, self._root)
        gram = self._products(self.rows, self.rows)
        self.values = np.linalg.eigvalsh(gram)
        gram[np.diag_indices(len(gram))] += 1
        self.cholesky = cho_factor(gram, lower=True, overwrite_a=True)

    @staticmethod
    def _root(outputs: torch.Tensor) -> torch.Tensor:
        """R (n, d, d - 1), R R^T = diag(p) - p p^T for p = softmax: S (I - s s^T), s = sqrt(p)."""
        s = torch.softmax(outputs, 1).sqrt()
        mirror = s.clone()
        mirror[:, 0] += 1
        mirror /= mirror.norm(dim=1, keepdim=True)  # by which s becomes the first unit vector
        turned = torch.eye(s.shape[1]) - 2 * mirror[:, :, None] * mirror[:, None]
        return s[:, :, None] * turned[:, :, 1:]

    @staticmethod
    def _factors(model: torch.nn.Sequential, x: torch.Tensor, root: Any) -> list[Any]:
        """Inputs (n, in + 1) and gradients (n, rows, out) of every layer."""
        inputs, outputs, value = [], [], x
        for layer in model:
            if isinstance(layer, torch.nn.Linear):
                inputs.append(torch.cat([value, torch.ones_like(value[:, :1])], 1).detach())
            value = layer(value)
            if isinstance(layer, torch.nn.Linear):
                outputs.append(value)
        found = [
            torch.autograd.grad((value * column).sum(), outputs, retain_graph=True)
            for column in root(value.detach()).unbind(2)
        ]
        gradients = [torch.stack(each, 1) for each in zip(*found, strict=True)]
        return [(a.numpy(), g.numpy()) for a, g in zip(inputs, gradients, strict=True)]

    @staticmethod
    def _products(one: list[Any], other: list[Any]) -> np.ndarray:
        """Of every row with every other row."""
        total: Any = 0.0
        for (a, g), (b, h) in zip(one, other, strict=True):
            gradients = g.reshape(-1, g.shape[2]) @ h.reshape(-1, h.shape[2]).T
            gradients = gradients.reshape(*g.shape[:2], *h.shape[:2])
            total = total + (a @ b.T)[:, None, :, None] * gradients
        n, c, m, d = total.shape
        return total.reshape(n * c, m * d)

    def variance(self, model: torch.nn.Sequential, x: torch.Tensor) -> np.ndarray:
        """Of the outputs at x, (n, classes): j j^T - j A^T (A A^T + I)^-1 A j^T."""
        unit = self._factors(model, x, lambda f: torch.eye(f.shape[1]).expand(len(f), -1, -1))
        own = sum((a**2).sum(1)[:, None] * (g**2).sum(2) for a, g in unit)
        with_rows = self._products(self.rows, unit)
        known = (with_rows * cho_solve(self.cholesky, with_rows)).sum(0)
        found: np.ndarray = own - known.reshape(own.shape)
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
    parser.add_argument("--network", choices=CASES, default="small")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = CASES[options.network]
    x, y, new = digits(case.samples, case.side)
    model = trained(x, y, case)
    torch.set_default_dtype(torch.float64)  # or laplace-torch multiplies by a float32 identity
    exact = (Dense if case.side == 7 else Rows)(model, x, y)
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
        if options.json:  # what there is so far
            write(options.json, options.network, case, found)


def write(path: Path, name: str, case: Case, found: dict[str, Any]) -> None:
    """One case, beside the others that are there."""
    cases = json.loads(path.read_text())["cases"] if path.exists() else {}
    about = {"widths": (case.side**2, *case.widths, CLASSES), "samples": case.samples}
    cases[name] = {"environment": environment(), **about, "found": found}
    path.write_text(json.dumps({"cases": cases}, indent=1) + "\n")


if __name__ == "__main__":
    main()
