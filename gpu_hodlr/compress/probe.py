"""Norm and error measured against the exact matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace, namespace_on, to_host
from gpu_hodlr.operators import Operator, half_even
from gpu_hodlr.structures import Structure

_VECTORS, _ROWS = 10, 128


class ErrorProbe:
    """Vectors V with E[V V^T] = I, and the exact K V.

    norm(A V)_F^2 is then an unbiased estimate of norm(A)_F^2 for any A. With products V is
    Gaussian; with entries alone V picks exact rows of K, drawn half evenly, half by the
    diagonal, so that few heavy rows are not missed.

    Attributes:
        norm: estimate of norm(K)_F.
    """

    def __init__(self, operator: Operator, products: bool, seed: int) -> None:
        n = operator.shape[0]
        if products:
            normal = batched.normal_source((seed, 0x9E37), operator.device)
            self._v = normal((n, _VECTORS), operator.dtype) / _VECTORS**0.5
            self._exact = operator._matmat(self._v)
        else:
            self._v, self._exact = _sampled_rows(operator, np.random.default_rng((seed, 0x9E37)))
        self.norm = self._frobenius(self._exact)

    @staticmethod
    def _frobenius(x: Array) -> float:
        return float(namespace(x).linalg.norm(x.astype(np.float64)))

    def scale_to_one(self) -> float:
        """Where squares of K's entries might leave the dtype's range: scale K.

        Returns:
            The power of two that K is multiplied by from now on, often 1.
        """
        largest = float(abs(self._exact).max())
        exponent = int(np.frexp(largest)[1])
        if not largest or abs(exponent) <= np.finfo(self._exact.dtype).maxexp // 8:
            return 1.0
        factor = 2.0**-exponent
        self._exact = self._exact * self._exact.dtype.type(factor)
        self.norm = self._frobenius(self._exact)
        return factor

    def error(self, compressed: Structure) -> float:
        """norm(K - K~)_F / norm(K)_F (0 for K = K~ = 0)."""
        product = compressed.matmat(self._v.astype(compressed.dtype, copy=False))
        difference = self._frobenius(product.astype(np.float64) - self._exact)
        return difference / self.norm if self.norm else difference


def _sampled_rows(operator: Operator, rng: np.random.Generator) -> tuple[Any, Any]:
    n = operator.shape[0]
    weight = np.abs(to_host(operator.diagonal()).astype(np.float64))
    probability = half_even(weight)
    count = min(_ROWS, n)
    if count == n:
        rows, scale = np.arange(n), np.ones(n)
    else:
        rows = rng.choice(n, size=count, p=probability)
        scale = 1.0 / np.sqrt(count * probability[rows])
    xp = namespace_on(operator.device)
    v = xp.zeros((n, count), operator.dtype)
    scales = xp.asarray(scale.astype(operator.dtype))
    v[xp.asarray(rows), xp.arange(count)] = scales
    block = operator._entries(rows[None], np.arange(n)[None])[0]
    return v, block.T * scales
