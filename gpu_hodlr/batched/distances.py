"""Distances of vectors from their inner products and squared norms."""

from __future__ import annotations

from collections.abc import Callable

from gpu_hodlr.devices import Array, namespace


def gram_distance(inner: Array, left: Array, right: Array) -> Array:
    """|phi_i - phi_j|^2 from phi_i . phi_j and the squared norms."""
    return left[:, :, None] + right[:, None, :] - 2 * inner


def angle_distance(inner: Array, left: Array, right: Array) -> Array:
    """The squared sine of the angle: 1 for orthogonal and for zero columns (they are far)."""
    xp = namespace(inner)
    norms = left[:, :, None] * right[:, None, :]
    return 1 - xp.where(norms > 0, inner**2 / xp.where(norms > 0, norms, 1), 0)


DISTANCES: dict[str, Callable[[Array, Array, Array], Array]] = {
    "gram": gram_distance,
    "angle": angle_distance,
}
