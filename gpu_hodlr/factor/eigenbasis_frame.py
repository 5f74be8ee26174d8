"""Where the iterations around a sparse inverse factor take place: in the eigenbasis or outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from gpu_hodlr.batched.replay import Replay
from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.factor.vecchia import Vecchia
from gpu_hodlr.structures import RotatedSparse

Map = Callable[[Array], Array]


class Frame(ABC):
    """A = K + damping I and N, N^T N an approximate inverse of A, on vectors of all ranks.

    Args:
        form: K.
        inverse: N in the eigenbasis.
        damping: >= 0.

    Attributes:
        size: of the vectors that `damped`, `half` and the others take.
    """

    size: int

    def __init__(self, form: RotatedSparse, inverse: Vecchia, damping: float) -> None:
        self._form, self._inverse, self._damping = form, inverse, damping
        self._core = Replay(form.owners.capturable)

    @abstractmethod
    def damped(self, c: Array) -> Array:
        """A c."""

    @abstractmethod
    def half(self, c: Array) -> Array:
        """N c."""

    @abstractmethod
    def half_transposed(self, c: Array) -> Array:
        """N^T c."""

    def precondition(self, c: Array) -> Array:
        """N^T N c."""
        return self.half_transposed(self.half(c))

    @abstractmethod
    def around(self, core: Map, v: Array, outside: Callable[[Any], Any]) -> Array:
        """What core does here, and a function of A where nothing is lacking, for v (N, k)."""


class Inside(Frame):
    """The eigenbasis, (M, k): outside the range of Q the eigenvalues of A are known."""

    def __init__(self, form: RotatedSparse, inverse: Vecchia, damping: float) -> None:
        super().__init__(form, inverse, damping)
        self.size = form.basis.size

    def damped(self, c: Array) -> Array:
        """See `Frame`."""
        return self._core(self._form.core, c) + c.dtype.type(self._damping) * c

    def half(self, c: Array) -> Array:
        """See `Frame`."""
        return self._inverse.half(c)

    def half_transposed(self, c: Array) -> Array:
        """See `Frame`."""
        return self._inverse.half_transposed(c)

    def around(self, core: Map, v: Array, outside: Callable[[Any], Any]) -> Array:
        """See `Frame`."""
        return self._form.basis.matmat(core, v, lambda x: outside(x + self._damping))


class Everywhere(Frame):
    """The user's order, (N, k), where K has a diagonal that is none in the eigenbasis.

    N is that of K with the diagonal's nearest in the eigenbasis, see `RotatedSparse.absorbed`;
    `near` is that matrix.
    """

    def __init__(
        self, form: RotatedSparse, near: RotatedSparse, inverse: Vecchia, damping: float
    ) -> None:
        super().__init__(form, inverse, damping)
        assert form.E is not None
        self.size = form.n
        self._near = near.basis
        self._added = form.owners.whole(form.E)[:, None] + form.dtype.type(damping)

    def damped(self, c: Array) -> Array:
        """See `Frame`."""
        core = self._form.core
        return self._form.basis.matmat(lambda x: self._core(core, x), c) + self._added * c

    def _root(self, x: Any) -> Any:
        return (x + self._damping) ** -0.5

    def half(self, c: Array) -> Array:
        """See `Frame`."""
        return self._near.matmat(self._inverse.half, c, self._root)

    def half_transposed(self, c: Array) -> Array:
        """See `Frame`."""
        return self._near.matmat(self._inverse.half_transposed, c, self._root)

    def precondition(self, c: Array) -> Array:
        """See `Frame`."""
        return self._near.matmat(self._inverse.apply, c, lambda x: 1 / (x + self._damping))

    def around(self, core: Map, v: Array, outside: Callable[[Any], Any]) -> Array:
        """See `Frame`: something is lacking everywhere."""
        return core(namespace(v).ascontiguousarray(v))  # ranks and one rank have other layouts
