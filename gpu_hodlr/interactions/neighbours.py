"""Approximate nearest neighbours of all indices of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from gpu_hodlr import batched
from gpu_hodlr.batched.threads import num_threads, over_spans
from gpu_hodlr.devices import to_host
from gpu_hodlr.operators import Operator
from gpu_hodlr.ordering.bisection import bisect, random_members
from gpu_hodlr.ordering.metric import DISTANCES, Metric, gram_distance
from gpu_hodlr.tree import balanced_offsets, num_leaves, pad_segments

NDArray = np.ndarray[Any, Any]
Distance = Callable[[NDArray, NDArray], NDArray]

_KD_TREE_DIMENSIONS = 4  # in more, projection trees are faster
_SKETCH = 64  # columns of a sketch of Phi
_LEAF = 256  # indices searched together
_TREES = 24  # at most
_CHECKED = 100  # indices whose neighbours are searched exactly
_RECALL = 0.8  # enough
_CHUNK = 1 << 24  # distances held at a time


@dataclass(frozen=True)
class Neighbours:
    """The nearest other indices of every index, as far as they were found.

    Attributes:
        index: (N, k), -1 where fewer were found.
        weight: (N, k) K_ij^2, the energy of the entry (1 for points), 0 where none was found.
        recall: share of the true k nearest that were found, estimated on sampled indices; found
            counts whatever is no farther than the k-th nearest.
        trees: projection trees grown; 0 for an exact search.
    """

    index: NDArray
    weight: NDArray
    recall: float
    trees: int


def nearest_neighbours(
    operator: Operator, count: int, seed: int, distance: str = "gram"
) -> Neighbours:
    """The `count` nearest neighbours of every index.

    Points are compared themselves, by a k-d tree in up to four dimensions. Otherwise the distance
    is |phi_i - phi_j|^2 or the squared sine of the angle, K = Phi^T Phi, from a sketch of Phi or
    from entries (`ordering.Metric`), and the search goes through randomized projection trees
    (Dasgupta and Freund, STOC 2008): every node is split at the median of the distance to one
    random member less that to another, a level at a time; inside the leaves, of up to 256, all
    pairs are compared, a GEMM; a tree's finds are merged with those before. Trees are grown until
    four fifths of the neighbours of 100 sampled indices, known from an exact search, are found.
    Inner products are formed on the operator's device, the search is the host's.

    Args:
        operator: with points, a sketch or entries.
        count: k, at most N - 1.
        seed: of every random choice.
        distance: "gram" or "angle"; points have their own.

    Raises:
        ArgumentError: the matrix has no points, sketch or entries.
    """
    n = operator.shape[0]
    count = min(count, n - 1)
    points = None if operator.points is None else to_host(operator.points)
    if points is not None and points.shape[1] <= _KD_TREE_DIMENSIONS:
        _, found = KDTree(points).query(points, k=np.arange(1, count + 2), workers=num_threads())
        index = _without_self(np.asarray(found))
        return Neighbours(index, np.ones(index.shape), 1.0, 0)
    rng = np.random.default_rng((seed, 0x4E))
    if points is not None:
        index, _, recall, trees = _search(n, count, _point_distance(points), rng)
        return Neighbours(index, (index >= 0).astype(np.float64), recall, trees)
    metric = Metric(operator, seed, _SKETCH)
    squared_norms = to_host(metric.squared_norms)
    measure = _metric_distance(metric, squared_norms, distance)
    index, d, recall, trees = _search(n, count, measure, rng)
    norms = squared_norms.astype(np.float64)
    left, right, d = norms[:, None], norms[index], np.where(index >= 0, d, 0)
    squared = ((left + right - d) / 2) ** 2 if distance == "gram" else (1 - d) * left * right
    return Neighbours(index, np.where(index >= 0, squared, 0.0), recall, trees)


def _without_self(found: NDArray) -> NDArray:
    """One column less: the index itself, or where points coincide the farthest."""
    itself = found == np.arange(len(found))[:, None]
    itself[~itself.any(axis=1), -1] = True
    index: NDArray = found[~itself].reshape(len(found), -1)
    return index


def _point_distance(points: NDArray) -> Distance:
    """|x_i - x_j|^2, centered on every block's rows so that close points do not cancel."""

    def measure(rows: NDArray, cols: NDArray) -> NDArray:
        center = points[rows].mean(axis=1, keepdims=True)
        x, y = points[rows] - center, points[cols] - center
        inner = batched.matmul(x, y, transpose_b=True)
        squared: NDArray = gram_distance(inner, (x * x).sum(axis=2), (y * y).sum(axis=2))
        return squared

    return measure


def _metric_distance(metric: Metric, norms: NDArray, name: str) -> Distance:
    def measure(rows: NDArray, cols: NDArray) -> NDArray:
        inner = to_host(metric.inner_products(rows, cols))
        distance: NDArray = DISTANCES[name](inner, norms[rows], norms[cols])
        return distance

    return measure


def _search(
    n: int, count: int, measure: Distance, rng: np.random.Generator
) -> tuple[NDArray, NDArray, float, int]:
    """Indices and distances (n, count), the estimated recall and the trees grown."""
    checked = rng.choice(n, size=min(_CHECKED, n), replace=False)
    bound = _exact_bound(n, count, measure, checked)
    index = np.full((n, count), -1)
    nearest = np.full((n, count), np.inf)
    parts = num_leaves(n, _LEAF)

    def keys(nodes: NDArray) -> NDArray:
        d = measure(nodes, random_members(nodes, 2, rng))
        difference: NDArray = d[:, :, 0] - d[:, :, 1]
        return difference

    recall, trees = 0.0, 0
    while recall < _RECALL and trees < (_TREES if parts > 1 else 1):
        leaves = pad_segments(bisect(n, parts, keys, np), balanced_offsets(n, parts))
        chunk = max(1, _CHUNK // leaves.shape[1] ** 2)
        for start in range(0, len(leaves), chunk):
            _search_leaves(leaves[start : start + chunk], measure, index, nearest)
        recall = float((nearest[checked] <= bound[:, None]).mean())
        trees += 1
    return index, nearest, recall, trees


def _exact_bound(n: int, count: int, measure: Distance, checked: NDArray) -> NDArray:
    """The distance of the k-th nearest of some indices, with a little room for rounding."""
    d = measure(checked[None], np.arange(n)[None])[0].astype(np.float64)
    d[np.arange(len(checked)), checked] = np.inf
    kth = np.partition(d, count - 1, axis=1)[:, count - 1]
    room = 1e-5 * np.abs(np.where(np.isfinite(d), d, 0)).max(axis=1)
    bound: NDArray = kth + np.minimum(room, 1e-3 * np.abs(kth))
    return bound


def _smallest(values: NDArray, count: int) -> NDArray:
    """Positions (nodes, rows, count) of the smallest values of each row, in any order."""
    out = np.empty((*values.shape[:2], count), np.int64)
    # One node may hold all the rows: threads share the rows, not the nodes.
    flat, flat_out = values.reshape(-1, values.shape[2]), out.reshape(-1, count)

    def work(start: int, stop: int) -> None:
        part = flat[start:stop]
        order = np.argpartition(part, min(count, part.shape[1] - 1), axis=1)
        flat_out[start:stop] = order[:, :count]

    over_spans(work, len(flat))
    return out


def _search_leaves(leaves: NDArray, measure: Distance, index: NDArray, nearest: NDArray) -> None:
    """Compare all pairs of every leaf and merge what is found into `index` and `nearest`."""
    d = measure(leaves, leaves)
    d[np.broadcast_to((leaves < 0)[:, None, :], d.shape)] = np.inf
    slots = np.arange(leaves.shape[1])
    d[:, slots, slots] = np.inf
    count = min(index.shape[1], len(slots))
    position = _smallest(d, count)
    real = leaves >= 0
    rows = leaves[real]
    distance = np.take_along_axis(d, position, axis=2)[real]
    every = np.broadcast_to(leaves[:, None, :], d.shape)
    found = np.where(np.isfinite(distance), np.take_along_axis(every, position, axis=2)[real], -1)
    candidates = np.concatenate([index[rows], found], axis=1)
    distances = np.concatenate([nearest[rows], distance], axis=1)
    order = np.argsort(candidates, axis=1)
    candidates = np.take_along_axis(candidates, order, axis=1)
    distances = np.take_along_axis(distances, order, axis=1)
    distances[:, 1:][candidates[:, 1:] == candidates[:, :-1]] = np.inf  # found before
    best = _smallest(distances[None], index.shape[1])[0]
    nearest[rows] = np.take_along_axis(distances, best, axis=1)
    kept = np.take_along_axis(candidates, best, axis=1)
    index[rows] = np.where(np.isfinite(nearest[rows]), kept, -1)
