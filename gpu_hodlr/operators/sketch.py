"""Random sketches, and what they draw."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.operators.base import Operator


class Sketch:
    """Gaussian Omega (N, s) and Y = K Omega; columns can be added, old ones are kept.

    Args:
        operator: with products.
        columns: s at first.
        seed: of Omega.
    """

    def __init__(self, operator: Operator, columns: int, seed: int) -> None:
        self._operator = operator
        self._normal = batched.normal_source((seed, 0xA5), operator.device)
        self.omega, self.y = self._draw(columns)

    def _draw(self, columns: int) -> tuple[Array, Array]:
        shape = (self._operator.shape[0], columns)
        omega = self._normal(shape, self._operator.dtype)
        return omega, self._operator._matmat(omega)

    def grow(self, columns: int) -> None:
        """Add columns."""
        omega, y = self._draw(columns)
        xp = namespace(y)
        self.omega = xp.concatenate([self.omega, omega], axis=1)
        self.y = xp.concatenate([self.y, y], axis=1)


def half_even(weight: Any) -> Any:
    """Probabilities drawn half evenly, half by weight >= 0; they sum to one."""
    even = np.full(len(weight), 1.0 / len(weight))
    total = weight.sum(dtype=np.float64)
    density = 0.5 * (even + (weight / total if total else even))
    return density / density.sum()
