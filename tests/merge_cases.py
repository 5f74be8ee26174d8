"""Short sorted lists and what is found for them, and the merge done one row at a time."""

from typing import Any

import numpy as np


def lists(n: int, count: int, nodes: int, m: int, c: int, dtype: Any) -> tuple[np.ndarray, ...]:
    """Values, index, rows, found, candidates: ties, repeats, padding, itself, not finite."""
    rng = np.random.default_rng((n, count, m, c))
    values, index = np.full((n, count), np.inf, dtype), np.full((n, count), -1)
    for i in range(n):
        filled = rng.integers(0, min(count, n - 1) + 1)
        values[i, :filled] = np.sort(rng.integers(0, 6, filled))
        index[i, :filled] = rng.permutation(n)[:filled]
        order = np.lexsort((index[i, :filled], values[i, :filled]))
        index[i, :filled] = index[i, :filled][order]
    rows = np.full(nodes * m, -1)
    rows[: min(n, nodes * m)] = rng.permutation(n)[: nodes * m]
    rows = rng.permutation(rows).reshape(nodes, m)
    candidates = np.stack([rng.permutation(max(n, c))[:c] for _ in range(nodes)])
    candidates[(candidates >= n) | (rng.random(candidates.shape) < 0.1)] = -1
    found = rng.integers(0, 9, (nodes, m, c)).astype(dtype)
    found[rng.random(found.shape) < 0.05] = np.inf
    found[rng.random(found.shape) < 0.05] = np.nan
    return values, index, rows, found, candidates


def merged(values: Any, index: Any, rows: Any, found: Any, candidates: Any) -> Any:
    """What `batched.merge_smallest` makes of its arguments."""
    values, index = values.copy(), index.copy()
    count = values.shape[1]
    for t, i in np.argwhere(rows >= 0):
        row = rows[t, i]
        old = zip(values[row], index[row], strict=True)
        new = zip(found[t, i], candidates[t], strict=True)
        best: dict[int, float] = {}
        for value, other in [*((v, o) for v, o in new if o != row), *old]:
            if other >= 0 and np.isfinite(value):
                best[other] = min(value, best.get(other, np.inf))
        smallest = sorted((v, o) for o, v in best.items())[:count]
        smallest += [(np.inf, -1)] * (count - len(smallest))
        values[row], index[row] = zip(*smallest, strict=True)
    return values, index


# n, count, nodes, m, c: one of each; fewer found than wanted; more than a warp has lanes
SHAPES = [
    (1, 1, 1, 1, 1),
    (9, 4, 2, 6, 3),
    (40, 16, 3, 20, 50),
    (70, 33, 1, 75, 80),
    (30, 5, 2, 4, 0),
    (90, 64, 2, 31, 90),
]
