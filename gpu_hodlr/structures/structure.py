"""What every structure has: a product, a diagonal, its arrays, and copies of itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr.batched.stored import FLOAT32, WIDTHS, kind_of, packed, unpacked
from gpu_hodlr.devices import Array, HostIndex, device_of, move, namespace
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.structures.stored import Stored

Map = Callable[[Array], Array]


def add_to_diagonals(D: Array, leaves: Array, d: Array) -> Array:
    """A copy of the diagonal blocks D (leaves, m, m) plus those of diag(d); padding stays zero."""
    xp = namespace(D)
    D = D.copy()
    place = xp.arange(D.shape[1])
    D[:, place, place] += xp.where(leaves >= 0, d[leaves], 0).astype(D.dtype)
    return D


class Structure(Stored):
    """A symmetric matrix (N, N), rows and columns in the user's order.

    Attributes:
        leaves: (2^depth, m) the user's indices of each leaf of the tree, padding (-1) last; on
            the device of the arrays. Spread over ranks: this rank's leaves, and places in its rows
            for indices.
        owners: which rank has what; one rank has it all.
    """

    leaves: Array
    owners: Ownership = ALONE

    @property
    @abstractmethod
    def n(self) -> int:
        """N."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, N)."""
        return self.n, self.n

    def __repr__(self) -> str:
        stored = 100 * self.num_stored / self.n**2
        return (
            f"{type(self).__name__}({self.n} x {self.n}, {self.dtype}, {self.device}, "
            f"{stored:.3g} % stored{self.owners.said})"
        )

    @property
    @abstractmethod
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """Numerical ranks, one tuple a level, leaves first."""

    @abstractmethod
    def matmat(self, v: Array) -> Array:
        """The product with v (N, k), or on many ranks with this rank's rows of it."""

    @abstractmethod
    def diagonal(self) -> Array:
        """The diagonal, (N,), or this rank's rows of it."""

    @abstractmethod
    def arrays(self) -> list[Array]:
        """Every stored array of numbers; the first is none of the far field."""

    @property
    def num_stored(self) -> int:
        """Numbers stored on all ranks, what is repeated counted once."""
        return int(sum(a.size for a in self.arrays()))

    @abstractmethod
    def index_arrays(self) -> list[Any]:
        """Every stored array of indices."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """The structure of factor * K."""

    @abstractmethod
    def plus_diagonal(self, d: Array) -> Self:
        """The structure of K + diag(d), d (N,), or this rank's rows of it."""

    @abstractmethod
    def _mapped(self, floats: Map, indices: Map, far: Map | None = None) -> Self:
        """The same structure of mapped arrays; blocks of the far field by `far`, where given."""

    # --- files ---------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """See `Stored`."""
        return {"ranks": list(self.ranks)}

    @property
    def all_leaves(self) -> HostIndex:
        """The leaves of the whole tree, of all ranks, in the user's indices; a host array."""
        return self.owners.all_leaves(self.leaves)

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of the stored blocks, the far field's may be narrower, and of what they multiply."""
        dtype: np.dtype[Any] = self.arrays()[0].dtype
        return dtype

    @cached_property
    def kept_in(self) -> str:
        """What the far field is stored in: "bfloat16" or "tfloat32", or as all else, its dtype."""
        kinds = (kind_of(a.dtype) for a in self.arrays())
        return next((kind for kind in kinds if kind is not None), self.dtype.name)

    @cached_property
    def device(self) -> str:
        """Where the arrays are."""
        return device_of(self.arrays()[0])

    def astype(self, dtype: DTypeLike) -> Self:
        """The same structure in another precision.

        Args:
            dtype: of the blocks; with "bfloat16" and "tfloat32" those of the far field are rounded
                to it (`batched.stored`), and all others float32.
        """
        kind = dtype if isinstance(dtype, str) and dtype in WIDTHS else None
        wanted = np.dtype(None if kind else dtype)
        if self.kept_in == (kind or wanted.name):
            return self
        if kind is None:
            return self._mapped(lambda a: unpacked(a, wanted), lambda a: a)
        return self._mapped(
            lambda a: unpacked(a, FLOAT32), lambda a: a,
            lambda a: packed(unpacked(a, FLOAT32), kind),
        )  # fmt: skip

    def to(self, device: str) -> Self:
        """The same structure on another device."""
        return self._mapped(lambda a: move(a, device), lambda a: move(a, device))
