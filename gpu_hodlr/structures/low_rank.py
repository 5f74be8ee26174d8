"""The global low-rank form of a symmetric matrix: K = U diag(lambda) U^T + D, U^T U = I."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr import batched
from gpu_hodlr.arrays import FLOATS
from gpu_hodlr.batched.stored import digits, unpacked
from gpu_hodlr.batched.tall import multiplied, orthonormal
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.structures.stored import Part, Ranks, Source, Stack, check_far
from gpu_hodlr.structures.structure import Map, Structure
from gpu_hodlr.tree import rows_tree


@dataclass(frozen=True, repr=False)
class LowRank(Structure):
    """A symmetric matrix of low rank by its eigenvalues and eigenvectors, and a diagonal.

    Attributes:
        U: (N, r) orthonormal columns, or this rank's rows of them.
        eigenvalues: (r,) of either sign; the same on every rank.
        D: (N,) a diagonal that is added, or this rank's rows of it; None for none.
        owners: see `Structure`.
    """

    BY_ROWS = ("U", "D")

    U: Array
    eigenvalues: Array
    D: Array | None = None
    owners: Ownership = field(default=ALONE, kw_only=True)

    @property
    def n(self) -> int:
        """N."""
        return self.owners.total(len(self.U))

    @property
    def leaves(self) -> Array:  # type: ignore[override]  # a field elsewhere
        """A single leaf."""
        return namespace(self.U).arange(len(self.U))[None]

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """See `Structure`: one level, one node."""
        return ((int(self.U.shape[1]),),)

    @property
    def signed(self) -> bool:
        """Whether an eigenvalue is negative."""
        return bool((self.eigenvalues < 0).any())

    def matmat(self, v: Array) -> Array:
        """U (lambda (U^T v)) + D v."""
        product = self.combine(self.coefficients(v) * self.eigenvalues[:, None])
        if self.D is not None:
            product += self.D[:, None] * v
        return product

    def coefficients(self, v: Array) -> Array:
        """U^T v, (r, k), on every rank."""
        # batched.matmul and not @, which CuPy cannot capture into a graph.
        return self.owners.sum(batched.matmul(self.U[None], v[None], transpose_a=True)[0])

    def combine(self, coefficients: Array) -> Array:
        """U times (r, k) coefficients."""
        return batched.matmul(self.U[None], coefficients[None])[0]

    def diagonal(self) -> Array:
        """The diagonal, (N,), or this rank's rows of it."""
        diagonal = namespace(self.U).zeros((len(self.U), 1), self.dtype)
        if len(self.eigenvalues):
            multiplied(
                lambda part: unpacked(self.U[part], self.dtype) ** 2,
                self.eigenvalues[:, None], diagonal,
            )  # fmt: skip
        return diagonal[:, 0] if self.D is None else diagonal[:, 0] + self.D

    def arrays(self) -> list[Array]:
        """See `Structure`."""
        return [self.eigenvalues, self.U, *([] if self.D is None else [self.D])]

    @property
    def num_stored(self) -> int:
        """See `Structure`."""
        return (self.n + 1) * len(self.eigenvalues) + (0 if self.D is None else self.n)

    def index_arrays(self) -> list[Any]:
        """See `Structure`."""
        return []

    def pack(self) -> dict[str, Any]:
        """See `Stored`."""
        arrays = {"U": to_host(self.U), "eigenvalues": to_host(self.eigenvalues)}
        if self.D is not None:
            arrays["D"] = to_host(self.D)
        return arrays

    def about(self) -> dict[str, Any]:
        """See `Stored`."""
        return super().about() | {"signed": self.signed}

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`: none, its arrays go by rows."""
        return {}

    @classmethod
    def read_leaves(cls, source: Source, ranks: int) -> HostIndex | None:
        """See `Stored`."""
        return None if ranks == 1 else rows_tree(source.length("U"), ranks).leaves

    @classmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        U, eigenvalues = part.own_rows("U"), part["eigenvalues"]
        if U.ndim != 2 or ranks != [(U.shape[1],)]:
            raise ValueError(f"the eigenvectors have shape {U.shape}")
        if eigenvalues.shape != U.shape[1:] or eigenvalues.dtype not in FLOATS:
            raise ValueError(f"{eigenvalues.shape} eigenvalues do not fit the eigenvectors")
        check_far({"U": U}, eigenvalues.dtype)
        if not ((eigenvalues >= 0) | bool(part.about.get("signed"))).all():
            raise ValueError("an eigenvalue is negative, and the file says that none is")
        D = part.own_rows("D") if part.has("D") else None
        if D is not None and (D.shape != U.shape[:1] or D.dtype != eigenvalues.dtype):
            raise ValueError(f"a diagonal of shape {D.shape} does not fit the eigenvectors")
        return cls(U, eigenvalues, D, owners=part.owners)

    def scaled(self, factor: float) -> Self:
        """See `Structure`."""
        number = np.dtype(self.dtype).type(factor)
        D = None if self.D is None else self.D * number
        return replace(self, eigenvalues=self.eigenvalues * number, D=D)

    def plus_diagonal(self, d: Array) -> Self:
        """See `Structure`."""
        d = d.astype(self.dtype)
        return replace(self, D=d if self.D is None else self.D + d)

    def astype(self, dtype: DTypeLike) -> Self:
        """See `Structure`; of a wider type U is orthonormal to its precision.

        Collective, then: all ranks call.
        """
        cast = super().astype(dtype)
        if digits(cast.kept_in) <= digits(self.kept_in):
            return cast
        return cast.orthonormal() or cast

    @batched.one_blas_thread()
    def orthonormal(self, scale: Array | None = None) -> Self | None:
        """S^-1 U diag(lambda) U^T S^-1 + D, its eigenvectors orthonormal where U is not quite.

        Collective: all ranks call.

        Args:
            scale: (rows, 1) of S > 0; None for the identity.

        Returns:
            None where no orthonormal basis is found: S^-1 U is singular to rounding.
        """
        xp, owners = namespace(self.U), self.owners
        kept = xp.nonzero(self.eigenvalues)[0]  # a column of zeros has no place in a basis
        eigenvalues, U = self.eigenvalues[kept], self.U[:, kept]
        if not len(eigenvalues):
            return replace(self, U=U, eigenvalues=eigenvalues)
        V = (U if scale is None else U / scale) * xp.sqrt(abs(eigenvalues))
        Q, S, info = orthonormal(xp.ascontiguousarray(V)[None], len(V), owners.sum)
        if to_host(info).any():
            return None
        # Of equal ones every rank must have the same vectors.
        if self.signed:
            core = batched.matmul(S, S * xp.sign(eigenvalues)[:, None], transpose_a=True)[0]
            found, X = owners.comm.bcast(xp.linalg.eigh((core + core.T) / 2), 0)
        else:
            X, s, _ = owners.comm.bcast(xp.linalg.svd(S[0].T), 0)
            found = s * s
        return replace(self, U=batched.matmul(Q, X[None])[0], eigenvalues=found)

    def _mapped(self, floats: Map, indices: Map, far: Map | None = None) -> Self:
        D, U = None if self.D is None else floats(self.D), (far or floats)(self.U)
        return replace(self, U=U, eigenvalues=floats(self.eigenvalues), D=D)
