"""Steps of a recursive bisection, all nodes of a level at once.

A node is a segment of a permutation, between two of its offsets. `step` takes every so many of
the offsets: those of the leaves serve every level, and a GPU has them sent once.
"""

from __future__ import annotations

from gpu_hodlr.batched import _implementation
from gpu_hodlr.devices import Array


def pad_segments(values: Array, offsets: Array, width: int, step: int = 1) -> Array:
    """Segments values[offsets[t step] : offsets[(t + 1) step]] as rows, padded with -1.

    Args:
        values: (k,) int64.
        offsets: of the library of the values.
        width: of the rows, at least that of every segment.
        step: of the offsets.
    """
    result: Array = _implementation("splits", values).pad_segments(values, offsets, width, step)
    return result


def join_segments(
    rows: Array, offsets: Array, out: Array, order: Array | None = None, step: int = 1
) -> None:
    """The inverse of `pad_segments`: the first values of every row, as many as its segment has.

    Args:
        rows: (segments, width) int64.
        offsets: see `pad_segments`.
        out: (offsets[-1] - offsets[0],), overwritten.
        order: (segments, width) in which places each row's values are taken, if not as they stand.
        step: see `pad_segments`.
    """
    _implementation("splits", rows).join_segments(rows, offsets, out, order, step)


def sort_segments(rows: Array, key: Array, offsets: Array, out: Array, step: int = 1) -> None:
    """`join_segments` with every row's values in the order of keys (segments, width).

    Equal keys keep their order, and what is no number comes last.
    """
    _implementation("splits", key).sort_segments(rows, key, offsets, out, step)


def distances(
    name: str, inner: Array, norms: Array, rows: Array, cols: Array, summed: bool = False
) -> Array:
    """Distances of vectors from their inner products.

    Args:
        name: "gram", a + b - 2 x, or "angle", 1 - x^2 / (a b), of squared norms a, b; zero vectors
            have an angle of 1 to all.
        inner: x (nodes, m, c).
        norms: (n,) squared norms of all vectors, of the same type.
        rows: (nodes, m) which they are, -1 for padding, which gets any number.
        cols: (nodes, c) likewise.
        summed: add up those to all columns.

    Returns:
        (nodes, m, c), or (nodes, m) sums.
    """
    result: Array = _implementation("splits", inner).distances(
        name, inner, norms, rows, cols, summed
    )
    return result


def farthest(index: Array, distance: Array) -> Array:
    """(nodes, 1) the index (nodes, m) of the largest distance, of equal ones the first.

    Padding, an index of -1, comes after all others.
    """
    result: Array = _implementation("splits", distance).farthest(index, distance)
    return result


def split_keys(near: Array, far: Array, norms: Array, index: Array) -> Array:
    """Of indices (nodes, m) near - far, or the largest number where their squared norm is 0."""
    result: Array = _implementation("splits", near).split_keys(near, far, norms, index)
    return result
