"""Symmetric block-sparse matrices, and their products in float64."""

from typing import Any

import numpy as np

from gpu_hodlr.devices import to_host

SIZES = (1, 5, 33, 64, 130)
COLUMNS = (0, 1, 3, 8, 9, 33)
# Node 2 has no terms; node 5 is first in one pair and second in others.
PAIRS = np.array([[0, 1], [5, 6], [0, 5], [3, 5], [1, 4], [3, 4]])
NODES = 7


def stacks(m: int, k: int, dtype: Any, pairs: np.ndarray = PAIRS) -> tuple[np.ndarray, ...]:
    """Blocks, x and y."""
    rng = np.random.default_rng((m, k))
    blocks = rng.standard_normal((len(pairs), m, m)).astype(dtype)
    x, y = rng.standard_normal((2, NODES, m, k)).astype(dtype)
    return blocks, x, y


def exact(blocks: np.ndarray, x: np.ndarray, y: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """In float64."""
    blocks, x, result = blocks.astype(float), x.astype(float), y.astype(float)
    for (a, b), block in zip(pairs, blocks, strict=True):
        result[a] += block @ x[b]
        result[b] += block.T @ x[a]
    return result


def close(got: Any, want: np.ndarray, terms: int) -> None:
    got = to_host(got)
    atol = 8 * np.finfo(got.dtype).eps * (np.sqrt(terms) + 1) * np.abs(want).max(initial=1.0)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)
