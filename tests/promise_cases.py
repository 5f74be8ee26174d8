"""Cases drawn from the zoo, each by its number: what is compressed, how, and what it should be."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator
from zoo import FLOAT64_ONLY, ZOO

import gpu_hodlr as gh

SEED = 20_261_129
SMALL, SIZES = (2, 3, 5, 17, 40, 64), (97, 127, 128, 129, 200, 255, 256, 257, 300, 400, 510, 600)
RTOLS = (1e-2, 1e-5, 1e-9)
SCHEMES = ("hss", "hss", "fmm", "hodlr", "lowrank", "auto")
DAMPINGS = (0.0, 1e-8, 1e-4, 1e-2, 0.1, 1.0)  # times the spectral norm
ROUNDING = 1e3  # times the precision: backward errors of factors

Matrix = np.ndarray[Any, Any]


@dataclass
class Case:
    """What is compressed, how, and what it should be."""

    index: int
    name: str
    operator: gh.Operator
    exact: Matrix
    eigenvalues: Matrix
    options: dict[str, Any]
    damping: float | Matrix
    rng: Generator

    @property
    def norm(self) -> float:
        """Of the exact matrix, spectral."""
        return float(np.abs(self.eigenvalues).max())

    @property
    def eps(self) -> float:
        """Of what is stored."""
        kept = self.options.get("storage_dtype") or self.operator.dtype
        return float(np.finfo(kept).eps)

    def __str__(self) -> str:
        said = ", ".join(f"{key}={value!r}" for key, value in self.options.items())
        damping = "of every row" if np.ndim(self.damping) else f"{self.damping:.3g}"
        return (
            f"case {self.index}: {self.name}, N = {len(self.exact)}, {self.operator.dtype}, "
            f"definite={self.operator.definite}, {said}, damping {damping}"
        )


def draw(index: int) -> Case:
    """The case of a number; every matrix of the zoo in turn."""
    name = list(ZOO)[index % len(ZOO)]
    rng = np.random.default_rng((SEED, index))
    n = int(rng.choice(SMALL if rng.random() < 0.2 else SIZES))
    dtype = np.float32 if rng.random() < 0.3 and name not in FLOAT64_ONLY else np.float64
    specimen = ZOO[name](rng, n)
    exact = specimen.exact(dtype)
    eigenvalues = np.linalg.eigvalsh(exact)
    rounding = len(exact) * float(np.finfo(dtype).eps) * np.abs(eigenvalues).max()
    # users declare nothing, and bring indefinite matrices as well
    definite = bool(eigenvalues[0] >= -rounding) or rng.random() < 0.3
    operator = specimen.operator(dtype, definite)
    options = _options(operator, rng)
    if dtype == np.float64 and rng.random() < 0.2:
        options["storage_dtype"] = "float32"
    size = float(np.abs(eigenvalues).max()) or 1.0
    damping: Any = float(rng.choice(DAMPINGS)) * size
    if rng.random() < 0.15 and damping:
        damping = (damping * (0.5 + rng.random(len(exact)))).astype(dtype)
    return Case(index, name, operator, exact, eigenvalues, options, damping, rng)


def _options(operator: gh.Operator, rng: Generator) -> dict[str, Any]:
    """Arguments of `compress` that this operator can be compressed with."""
    n, entries, products = operator.shape[0], operator.has_entries, operator.has_products
    schemes = [
        scheme
        for scheme in SCHEMES
        if (scheme != "lowrank" or (operator.definite and products))
        and (scheme != "fmm" or entries)
    ]
    scheme = str(rng.choice(schemes))
    orderings = ["auto", "natural", "random"]
    if operator.definite and entries:
        orderings += ["gram", "angle"]
    if operator.points is not None:
        orderings += ["geometric"]
    samplers = ["auto"]
    if entries and scheme != "lowrank":
        samplers += ["entries"] + ["products+entries"] * products
    if products and scheme != "fmm":
        samplers += ["products"]
    options: dict[str, Any] = {
        "scheme": scheme,
        "rtol": float(rng.choice(RTOLS)),
        "leaf_size": int(rng.choice([1, 4, 16, 25, 32, 64, 300], p=[0.03, 0.07, *[0.18] * 5])),
        "ordering": str(rng.choice(orderings)),
        "sampler": str(rng.choice(samplers)),
        "seed": int(rng.integers(1000)),
    }
    if scheme == "fmm" or (scheme == "auto" and rng.random() < 0.5 and entries):
        # a budget must hold a neighbour for every leaf: half of the leaves in pairs
        leaves = 1 << max(0, int(np.ceil(np.log2(n / options["leaf_size"]))))
        options["budget"] = min(1.0, float(rng.choice([0.0, 0.7, 1.5, 3.0])) / leaves)
    if rng.random() < 0.3:
        options["max_rank"] = int(rng.choice([1, 2, 8, 20, max(1, n // 4)]))
    return options


class Verdict:
    """What of a case is broken.

    Attributes:
        broken: one sentence each.
    """

    def __init__(self) -> None:
        self.broken: list[str] = []

    def holds(self, condition: Any, promise: str) -> bool:
        """Note the promise if it is not kept."""
        if not condition:
            self.broken.append(promise)
        return bool(condition)

    def at_most(self, value: float, limit: float, what: str) -> bool:
        """The same, with numbers; NaN is more than any limit."""
        return self.holds(value <= limit, f"{what}: {value:.3g} > {limit:.3g}")


def warned(function: Any, *arguments: Any, **options: Any) -> tuple[Any, list[Any]]:
    """What a function gives, and the warnings in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*arguments, **options)
    return result, caught
