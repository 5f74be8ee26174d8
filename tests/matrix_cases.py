"""Dense symmetric matrices to compress, seeded, and operators around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dense_oracles
import numpy as np

import gpu_hodlr as gh
from gpu_hodlr.operators.operator import Runs

Matrix = np.ndarray[Any, Any]


def toeplitz(n: int) -> Matrix:
    """1 / (1 + |i - j|), STRUMPACK's test matrix."""
    return dense_oracles.distance_matrix(n, lambda d: 1 / (1 + d))


def cauchy(n: int) -> Matrix:
    """1 / (x_i + x_j)."""
    x = np.linspace(0.1, 2.0, n)
    return 1 / (x[:, None] + x)


def logarithm(n: int) -> Matrix:
    """log(1 + |x - y|) on a line."""
    return dense_oracles.distance_matrix(n, lambda d: np.log1p(10 * d / n))


def banded(n: int) -> Matrix:
    """Seven diagonals, the middle one dominant."""
    return dense_oracles.distance_matrix(n, lambda d: np.where(d < 4, 4 - d, 0.0) + 9.0 * (d == 0))


def low_rank_plus_diagonal(n: int, rank: int = 5) -> Matrix:
    rng = np.random.default_rng(n)
    factor = rng.standard_normal((n, rank))
    return factor @ factor.T + np.diag(1 + rng.random(n))


def siblings_of_their_own(n: int, depth: int = 5, rank: int = 5) -> Matrix:
    """Random sibling blocks of a rank on every level, not nested: a block row has rank * depth."""
    rng = np.random.default_rng(0)
    exact = 50.0 * np.eye(n)
    for level in range(depth):
        for start in range(0, n, n >> level):
            half = n >> (level + 1)
            a = slice(start, start + half)
            b = slice(start + half, start + 2 * half)
            L, R = rng.standard_normal((2, half, rank)) / half**0.5
            exact[a, b], exact[b, a] = L @ R.T, R @ L.T
    return exact


def rank_one(n: int) -> Matrix:
    x = np.random.default_rng(n).standard_normal(n)
    return np.outer(x, x)


def oscillating(n: int) -> Matrix:
    """sin(d) exp(-d): the trace is 0, so that it is indefinite."""
    return dense_oracles.distance_matrix(n, lambda d: np.sin(d / 9) * np.exp(-d / 50))


def heavy_rows(n: int) -> Matrix:
    """Two rows and columns hold nearly all of the norm."""
    scale = np.ones(n)
    scale[[n // 40, n // 2]] = 100.0
    K = dense_oracles.distance_matrix(n, lambda d: np.exp(-d / 100))
    return K * scale[:, None] * scale


def with_zero_blocks(n: int) -> Matrix:
    """Smooth blocks on the diagonal, some of them wholly zero: nodes of rank 0."""
    block = dense_oracles.distance_matrix(n // 6, lambda d: np.exp(-d / 10))
    return np.kron(np.diag([1.0, 0, 1, 0, 0, 1]), block)


def zero_quarter(n: int) -> Matrix:
    """A quarter of the rows and columns, scattered, is exactly zero."""
    keep = np.random.default_rng(n).random(n) > 0.25
    return toeplitz(n) * keep[:, None] * keep


MATRICES: dict[str, Callable[[int], Matrix]] = {
    "toeplitz": toeplitz,
    "cauchy": cauchy,
    "logarithm": logarithm,
    "banded": banded,
    "identity": np.eye,
    "zero": lambda n: np.zeros((n, n)),
    "low rank + diagonal": low_rank_plus_diagonal,
    "rank 1": rank_one,
    "oscillating": oscillating,
    "heavy rows": heavy_rows,
    "zero blocks": with_zero_blocks,
    "zero quarter": zero_quarter,
    "full rank": dense_oracles.random_spd,
}


def entries_only(a: Matrix, **options: Any) -> gh.FunctionOperator:
    return gh.FunctionOperator(len(a), entries=lambda r, c: a[np.ix_(r, c)], **options)


def products_only(a: Matrix, **options: Any) -> gh.FunctionOperator:
    return gh.FunctionOperator(len(a), matmat=lambda v: a @ v, **options)


class Clustered(gh.DenseOperator):
    """A dense matrix whose natural order is a random permutation in runs of random lengths."""

    def __init__(self, array: Matrix, seed: int) -> None:
        super().__init__(array)
        rng = np.random.default_rng(seed)
        n = len(array)
        cuts = np.sort(rng.choice(np.arange(1, n), size=n // 5, replace=False))
        # pieces of the original order, dealt out anew: blocks stay of low rank
        pieces = np.split(np.arange(n), cuts)
        order = rng.permutation(len(pieces))
        self._runs = Runs(
            np.concatenate([pieces[i] for i in order]),
            np.cumsum([0, *(len(pieces[i]) for i in order[:-1])]),
        )

    def runs(self) -> Runs:
        return self._runs
