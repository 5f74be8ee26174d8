"""Approximate nearest neighbours of all indices of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
from scipy.spatial import KDTree

from gpu_hodlr import batched, streams
from gpu_hodlr.batched import splits
from gpu_hodlr.batched.distances import gram_distance
from gpu_hodlr.batched.threads import num_threads
from gpu_hodlr.devices import Array, HostArray, HostIndex, namespace, namespace_on, to_host
from gpu_hodlr.distributed import ALONE, Communicator, shares
from gpu_hodlr.operators import Operator
from gpu_hodlr.ordering.bisection import Level, bisect
from gpu_hodlr.ordering.metric import Metric
from gpu_hodlr.tree import balanced_offsets, num_leaves

Distance = Callable[[Array, Array], Array]

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

    Arrays are where the matrix is.

    Attributes:
        index: (N, k), nearest first, -1 where fewer were found.
        weight: (N, k) K_ij^2, the energy of the entry (1 for points), 0 where none was found.
        recall: share of the true k nearest that were found, estimated on sampled indices; found
            counts whatever is no farther than the k-th nearest.
        trees: projection trees grown; 0 for an exact search.
    """

    index: Array
    weight: Array
    recall: float
    trees: int


def nearest_neighbours(
    operator: Operator,
    count: int,
    seed: int,
    distance: str = "gram",
    comm: Communicator = ALONE.comm,
) -> Neighbours:
    """The `count` nearest neighbours of every index.

    Points are compared themselves, by a k-d tree in up to four dimensions. Otherwise the distance
    is |phi_i - phi_j|^2 or the squared sine of the angle, K = Phi^T Phi, from a sketch of Phi or
    from entries (`ordering.Metric`), and the search goes through randomized projection trees
    (Dasgupta and Freund, STOC 2008): every node is split at the median of the distance to one
    random member less that to another, a level at a time; inside the leaves, of up to 256, all
    pairs are compared, a GEMM; a tree's finds are merged with those before. Trees are grown until
    four fifths of the neighbours of 100 sampled indices, known from an exact search, are found.
    Distances are formed, compared and merged on the operator's device; of every tree the host reads
    one number, the share found.

    Args:
        operator: with points, a sketch or entries.
        count: k, at most N - 1.
        seed: of every random choice.
        distance: "gram" or "angle"; points have their own.
        comm: the ranks; they share the comparisons and get the same neighbours.

    Raises:
        ArgumentError: the matrix has no points, sketch or entries.
    """
    n = operator.shape[0]
    count = min(count, n - 1)
    points = operator.coordinates
    if points is not None and points.shape[1] <= _KD_TREE_DIMENSIONS:
        parts = shares(n, comm.size)
        found = nearest_points(to_host(points), parts[comm.rank], count + 1)
        every = comm.allgather(found, [part.stop - part.start for part in parts])
        xp = namespace_on(operator.device)
        index = xp.asarray(_without_self(to_host(every)))
        return Neighbours(index, xp.ones(index.shape), 1.0, 0)
    rng = np.random.default_rng((seed, streams.NEIGHBOURS))
    if points is not None:
        measure = _point_distance(points)
        index, _, recall, trees = _search(n, count, measure, rng, namespace(points), comm)
        return Neighbours(index, (index >= 0).astype(np.float64), recall, trees)
    metric = Metric(operator, seed, _SKETCH, comm)
    measure, xp = partial(metric.distances, distance), namespace(metric.squared_norms)
    index, d, recall, trees = _search(n, count, measure, rng, xp, comm)
    norms = metric.squared_norms.astype(np.float64)
    left, right, d = norms[:, None], norms[index], xp.where(index >= 0, d, 0)
    squared = ((left + right - d) / 2) ** 2 if distance == "gram" else (1 - d) * left * right
    return Neighbours(index, xp.where(index >= 0, squared, 0.0), recall, trees)


def nearest_points(points: HostArray, of: slice, count: int) -> HostArray:
    """(k, count) the nearest points, count at most N, of k of them; itself is among them."""
    nearest = np.arange(1, min(count, len(points)) + 1)
    found = KDTree(points).query(points[of], k=nearest, workers=num_threads())[1]
    return np.asarray(found, np.int64)


def _without_self(found: HostArray) -> HostArray:
    """One column less: the index itself, or where points coincide the farthest."""
    itself = found == np.arange(len(found))[:, None]
    itself[~itself.any(axis=1), -1] = True
    return found[~itself].reshape(len(found), -1)


def _point_distance(points: Array) -> Distance:
    """|x_i - x_j|^2, centered on every block's rows so that close points do not cancel."""

    def measure(rows: Array, cols: Array) -> Array:
        center = points[rows].mean(axis=1, keepdims=True)
        x, y = points[rows] - center, points[cols] - center
        inner = batched.matmul(x, y, transpose_b=True)
        return gram_distance(inner, (x * x).sum(axis=2), (y * y).sum(axis=2))

    return measure


def _search(
    n: int,
    count: int,
    measure: Distance,
    rng: np.random.Generator,
    xp: ModuleType,
    comm: Communicator,
) -> tuple[Array, Array, float, int]:
    """Indices and distances (n, count), the estimated recall and the trees grown."""
    checked = xp.asarray(rng.choice(n, size=min(_CHECKED, n), replace=False))
    from_checked = measure(checked[None], xp.arange(n)[None])[0]
    bound = _exact_bound(from_checked, count, checked)
    index = xp.full((n, count), -1, np.int64)
    nearest = xp.full((n, count), np.inf, from_checked.dtype)
    del from_checked
    parts = num_leaves(n, _LEAF)

    def difference(rows: Array, members: Array) -> Array:
        d = measure(rows, members)
        return d[:, :, 0] - d[:, :, 1]

    def keys(level: Level) -> Array:
        return level.of_blocks(difference, level.random_members(2, rng))

    recall, trees = 0.0, 0
    while recall < _RECALL and trees < (_TREES if parts > 1 else 1):
        permutation, offsets = bisect(n, parts, keys, xp, comm), balanced_offsets(n, parts)
        width = int(np.diff(offsets).max())
        leaves = splits.pad_segments(permutation, xp.asarray(offsets), width)
        chunk = max(1, _CHUNK // leaves.shape[1] ** 2)
        mine = shares(len(leaves), comm.size)[comm.rank]
        for start in range(mine.start, mine.stop, chunk):
            some = leaves[start : min(start + chunk, mine.stop)]
            batched.merge_smallest(nearest, index, some, measure(some, some), some)
        if comm.size > 1:
            _gather_rows(permutation, offsets, (nearest, index), comm)
        recall = float((nearest[checked] <= bound[:, None]).mean())
        trees += 1
    return index, nearest, recall, trees


def _gather_rows(
    permutation: Array, offsets: HostIndex, arrays: tuple[Array, ...], comm: Communicator
) -> None:
    """In arrays (N, k) the rows of every rank's leaves, as it has them."""
    parts = shares(len(offsets) - 1, comm.size)
    ends = [(int(offsets[part.start]), int(offsets[part.stop])) for part in parts]
    mine = permutation[slice(*ends[comm.rank])]
    for array in arrays:
        array[permutation] = comm.allgather(array[mine], [b - a for a, b in ends])


def _exact_bound(d: Array, count: int, checked: Array) -> Array:
    """The distance of the k-th nearest of some indices, with a little room for rounding."""
    xp = namespace(d)
    d[xp.arange(len(checked)), checked] = np.inf
    kth = xp.partition(d, count - 1, axis=1)[:, count - 1].astype(np.float64)
    room = 1e-5 * abs(xp.where(xp.isfinite(d), d, 0)).max(axis=1).astype(np.float64)
    return kth + xp.minimum(room, 1e-3 * abs(kth))
