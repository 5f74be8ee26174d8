"""The inverse and the square root of a low-rank matrix plus a diagonal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.checks import check_number
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.factor.inverse import ExactInverse
from gpu_hodlr.factor.solver import IndefiniteError, SymmetricFactor
from gpu_hodlr.structures import LowRank
from gpu_hodlr.structures.stored import Part, Ranks, Source, Stack, check_types


class Woodbury(ExactInverse, SymmetricFactor):
    """K + damping I for K = U diag(lambda) U^T + D, U^T U = I.

    Without D: (K + damping I)^-1 = U diag(1 / (lambda + damping)) U^T + (I - U U^T) / damping,
    which is the formula of Sherman, Morrison and Woodbury for orthonormal U (Hager, SIAM Rev. 31
    (1989)). Any power is the same with that power of the eigenvalues; W is the symmetric square
    root. With D, let E = D + damping I and E^-1/2 U diag(lambda)^1/2 = Q diag(s) X^T: then K +
    damping I = E^1/2 (Q diag(s^2) Q^T + I) E^1/2, and W = E^1/2 times the symmetric square root of
    what stands between. With negative eigenvalues it is E^-1/2 U diag(abs(lambda))^1/2 = Q S^T, and
    the eigenvalues of S^T diag(sign(lambda)) S stand for s^2.

    Raises:
        IndefiniteError: K + damping I is not positive definite: an eigenvalue is -damping or less;
            without damping, the rank is not N. With D: an entry of E is not positive, which this
            needs.

    Example:
        >>> A = np.random.default_rng(0).standard_normal((100, 3))
        >>> F = gh.compress(A @ A.T, "lowrank", rtol=1e-8).factorize(damping=1.0)
        >>> want = np.linalg.slogdet(A @ A.T + np.eye(100))[1]
        >>> bool(np.isclose(F.logdet(), want))
        True
    """

    BY_ROWS = ("row_damping", "U", "scale")

    def __init__(self, form: LowRank, damping: float) -> None:
        super().__init__(form, damping)
        scale, base = None, damping
        if form.D is not None:
            form, scale = _scaled(form, form.D + self.dtype.type(damping))
            base = 1.0
        self._set(form, base, scale)

    def _set(self, form: LowRank, base: float, scale: Array | None) -> None:
        """What stands between E^1/2, U diag(lambda) U^T + base I, and E^1/2 (rows, 1) or None."""
        self._form, self._base, self._scale = form, base, scale
        self._shifted = form.eigenvalues + self.dtype.type(base)
        self._complement = form.n - len(form.eigenvalues)  # its dimension
        if not bool((self._shifted > 0).all()) or (self._complement and not base > 0):
            raise IndefiniteError

    def _power(self, x: Array, exponent: float) -> Array:
        """(K + damping I)^exponent x, or of what stands between E^1/2."""
        coefficients = self._form.coefficients(x)
        product = self._form.combine(coefficients * (self._shifted**exponent)[:, None])
        if self._complement:
            rest = x - self._form.combine(coefficients)
            product += rest * self.dtype.type(self._base**exponent)
        return product

    def _times_scale(self, x: Array) -> Array:
        return x if self._scale is None else self._scale * x

    def _over_scale(self, x: Array) -> Array:
        return x if self._scale is None else x / self._scale

    def _solve(self, b: Array) -> Array:
        return self._over_scale(self._power(self._over_scale(b), -1))

    def _product(self, z: Array) -> Array:
        return self._times_scale(self._power(z, 0.5))

    def _transposed_product(self, z: Array) -> Array:
        return self._power(self._times_scale(z), 0.5)

    def _sqrt_solve(self, z: Array) -> Array:
        return self._power(self._over_scale(z), -0.5)

    def _transposed_sqrt_solve(self, z: Array) -> Array:
        return self._over_scale(self._power(z, -0.5))

    @property
    def inverse_norm(self) -> float:
        """See `Solver`; without D it is known."""
        if self._scale is not None:
            return super().inverse_norm
        smallest = float(self._shifted.min()) if len(self._shifted) else np.inf
        return 1.0 / (min(smallest, self._base) if self._complement else smallest)

    def _inverse_diagonal(self) -> Array:
        """See `ExactInverse`; what a row of U lacks of norm 1 is in the complement."""
        U, xp = self._form.U, namespace(self._form.U)
        weights = xp.stack([1 / self._shifted, xp.ones_like(self._shifted)], axis=1)
        inside, norms = batched.matmul((U * U)[None], weights[None])[0].T
        if self._complement:
            inside = inside + xp.maximum(1 - norms, 0) / self.dtype.type(self._base)
        return inside if self._scale is None else inside / self._scale[:, 0] ** 2

    def _inverse_diagonal_bytes(self) -> int:
        """See `ExactInverse`: U's squares."""
        return self._form.U.nbytes

    def logdet(self) -> float:
        """Log of the determinant: of lambda + damping, of damping N - r times, of E with D.

        Collective: all ranks call.
        """
        known = float(namespace(self._shifted).log(self._shifted.astype(np.float64)).sum())
        if self._complement:
            known += self._complement * float(np.log(self._base))
        if self._scale is None:
            return known
        own = namespace(self._scale).log(self._scale.astype(np.float64)).sum()
        return known + 2 * float(sum(self.owners.comm.share(float(own))))

    @property
    def nbytes(self) -> int:
        """Bytes of the stored factor; without D the eigenvectors are the matrix's own."""
        own = self._shifted.nbytes
        if self._scale is not None:
            own += self._scale.nbytes
        if self._scale is not None or self._loaded:
            own += self._form.U.nbytes
        return int(own)

    # --- files ---------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """See `Stored`."""
        arrays = super().pack() | self._form.pack()
        return arrays if self._scale is None else arrays | {"scale": to_host(self._scale)[:, 0]}

    def about(self) -> dict[str, Any]:
        """See `Stored`."""
        return super().about() | self._form.about() | {"scaled": self._scale is not None}

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`: none, its arrays go by rows."""
        return {}

    @classmethod
    def read_leaves(cls, source: Source, ranks: int) -> HostIndex | None:
        """See `Stored`."""
        return LowRank.read_leaves(source, ranks)

    @classmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        form = LowRank._unpack(part, ranks)
        check_types({"U": form.U, "eigenvalues": form.eigenvalues}, form.U.dtype)
        if form.D is not None:
            raise ValueError("there is a diagonal, which a factor has not")
        self = cls._unpacked(part, form.n, form.U.dtype)
        scale: Array | None = None
        base = self.damping
        if part.about["scaled"]:
            scale, base = part.own_rows("scale"), 1.0
            check_types({"scale": scale}, form.U.dtype)
            if scale.shape != form.U.shape[:1] or not (scale > 0).all():
                raise ValueError(f"the scale has shape {scale.shape}, or is not positive")
            scale = part.placed(scale[:, None])
        base = check_number(base, "damping without a scale")
        try:
            self._set(form.to(part.device), base, scale)
        except IndefiniteError:
            raise ValueError("an eigenvalue with its damping is not positive") from None
        return self


def _scaled(form: LowRank, E: Array) -> tuple[LowRank, Array]:
    """Q diag(s^2) Q^T as a form, and E^1/2 (rows, 1).

    Raises:
        IndefiniteError: an entry of E is not positive, or E^-1/2 U has no orthonormal basis.
    """
    if not bool((E > 0).all()):
        raise IndefiniteError
    scale = namespace(E).sqrt(E)[:, None]
    found = replace(form, D=None).orthonormal(scale)
    if found is None:
        raise IndefiniteError
    return found, scale
