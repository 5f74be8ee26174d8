"""The inverse and the square root of a low-rank matrix plus damping."""

from __future__ import annotations

import numpy as np

from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.factor.base import IndefiniteError, SymmetricFactor
from gpu_hodlr.structures import LowRank


class Woodbury(SymmetricFactor):
    """K + damping I for K = U diag(lambda) U^T, U^T U = I.

    (K + damping I)^-1 = U diag(1 / (lambda + damping)) U^T + (I - U U^T) / damping, which is the
    formula of Sherman, Morrison and Woodbury for orthonormal U (Hager, SIAM Rev. 31 (1989)). Any
    power is the same with that power of the eigenvalues; W is the symmetric square root.

    Raises:
        IndefiniteError: K + damping I is not positive definite; without damping it is so only
            where the rank is N.
    """

    def __init__(self, form: LowRank, damping: float) -> None:
        super().__init__(form, damping)
        self._form = form
        self._shifted = form.eigenvalues + self.dtype.type(damping)
        self._complement = form.n - len(form.eigenvalues)  # its dimension
        if not bool((self._shifted > 0).all()) or (self._complement and not damping > 0):
            raise IndefiniteError

    def _power(self, x: Array, exponent: float) -> Array:
        """(K + damping I)^exponent x."""
        coefficients = self._form.coefficients(x)
        product = self._form.combine(coefficients * (self._shifted**exponent)[:, None])
        if self._complement:
            rest = x - self._form.combine(coefficients)
            product += rest * self.dtype.type(self.damping**exponent)
        return product

    def _solve(self, b: Array) -> Array:
        return self._power(b, -1)

    def _product(self, z: Array) -> Array:
        return self._power(z, 0.5)

    def _sqrt_solve(self, z: Array) -> Array:
        return self._power(z, -0.5)

    _transposed_product, _transposed_sqrt_solve = _product, _sqrt_solve

    def logdet(self) -> float:
        """Log of the determinant: sum of log(lambda + damping), and log(damping) N - r times."""
        known = float(namespace(self._shifted).log(self._shifted.astype(np.float64)).sum())
        return known + (self._complement * float(np.log(self.damping)) if self._complement else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of the stored factor; U is the matrix's own."""
        return int(self._shifted.nbytes)
