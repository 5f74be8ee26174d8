"""What compression needs to know of a symmetric matrix."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from gpu_hodlr.arrays import Vectors, as_columns, check_dtype, plain
from gpu_hodlr.autograd import symmetric
from gpu_hodlr.devices import (
    Array,
    HostIndex,
    check_memory,
    namespace_on,
    resolve_device,
)
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.eigenbasis import Rotated
from gpu_hodlr.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from gpu_hodlr.linear_map import LinearMap
from gpu_hodlr.operators.dual import Dual
from gpu_hodlr.operators.reader import BlockReader, by_blocks

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDevice, AnyDtype


@dataclass(frozen=True)
class Runs:
    """The natural order of a matrix, in runs of indices that belong together.

    Attributes:
        permutation: (N,) indices in natural order.
        starts: (runs,) where each run starts in the permutation; the first is 0.
    """

    permutation: HostIndex
    starts: HostIndex


def block_indices(
    rows: ArrayLike, cols: ArrayLike, shape: tuple[int, int]
) -> tuple[HostIndex, HostIndex]:
    """Indices of a block, (m,) and (k,), or of several, (t, m) and (t, k).

    Raises:
        DtypeError, ShapeError, ArgumentError: see `Operator.entries`.
    """
    rows, cols = plain(np.asanyarray(rows), "rows"), plain(np.asanyarray(cols), "cols")
    for name, index, end in (("rows", rows, shape[0]), ("cols", cols, shape[1])):
        if not np.issubdtype(index.dtype, np.integer):
            raise DtypeError(f"{name} must be integers, got {index.dtype}")
        if index.size and (index.min() < 0 or index.max() >= end):
            raise ArgumentError(
                f"{name} must lie in 0 .. {end - 1}, got {index.min()} .. {index.max()}"
            )
    if rows.ndim != cols.ndim or rows.ndim not in (1, 2):
        raise ShapeError(f"rows, cols must both be 1-D or 2-D, got {rows.shape}, {cols.shape}")
    if rows.ndim == 2 and len(rows) != len(cols):
        raise ShapeError(f"rows and cols need the same length, got {len(rows)}, {len(cols)}")
    return rows, cols


class Operator(LinearMap):
    """A symmetric matrix K of order N, given by products, blocks of entries, or both.

    A subclass writes `_matmat(v)`, or `_block(rows, cols)`, or both, says whether K is positive
    semi-definite, and nothing else: shapes, types, devices, padding, batches and ranks are
    handled here and in `BlockReader`. `gpu_hodlr.testing.check_operator` tells whether one keeps to
    this.

    Attributes:
        shape: (N, N).
        dtype: float32 or float64.
        device: "cpu" or "cuda".
        definite: declared, True where not said: K is positive semi-definite. What relies on it
            (orderings "gram" and "angle", scheme "lowrank", `cg`) does something else otherwise.
        has_products: whether `_matmat` is written; without it a product reads all entries.
        has_entries: whether `_block` is written.
        has_eigenbasis: whether `eigenbasis` gives one.
        product_cost: operations of a product with one column.
        entry_cost: operations of one entry.
        least_columns: so many cost about what one does, as a product reads more than it computes.
        points: (N, d) coordinates of the rows, or None.

    Args:
        n: the order N.
        dtype: of K and its vectors.
        device: where `_matmat` and `_block` work: "cuda" means CuPy arrays.

    Raises:
        DtypeError: n is not an integer, dtype not float32 or float64, or the subclass has neither
            `_matmat` nor `_block`.
        ShapeError: n < 2.

    Example:
        >>> class Scaling(gh.Operator):
        ...     definite = True
        ...
        ...     def __init__(self, d):
        ...         super().__init__(len(d), d.dtype)
        ...         self.d = d
        ...
        ...     def _matmat(self, v):
        ...         return self.d[:, None] * v
        ...
        ...     def _block(self, rows, cols):
        ...         return np.where(rows[:, None] == cols, self.d[rows][:, None], 0)
        >>> op = Scaling(np.arange(1.0, 51.0))
        >>> gh.testing.check_operator(op)
        >>> op
        Scaling(50 x 50, float64, cpu, products and entries, positive semi-definite by declaration)
    """

    definite: bool = True
    has_products: bool = False
    has_entries: bool = False
    has_eigenbasis: bool = False
    product_cost: float = 0.0
    entry_cost: float = 0.0
    least_columns: int = 1
    points: Array | None = None
    _trusted: bool = False  # of this package: tested, so that no result needs a check

    def __init_subclass__(cls, **options: object) -> None:
        """Note what is written."""
        super().__init_subclass__(**options)
        if "_entries" in cls.__dict__:
            warnings.warn(
                f"{cls.__name__}._entries: write _block(rows, cols) instead, which gets (m,) and "
                "(k,) indices without padding",
                DeprecationWarning,
                stacklevel=2,
            )
            entries = cls.__dict__["_entries"]
            cls._block = lambda self, rows, cols: entries(  # type: ignore[method-assign]
                self, rows[None], cols[None]
            )[0]
        if "_block" in cls.__dict__ and "_blocks" not in cls.__dict__:
            # Not that of a parent, which knows nothing of it.
            cls._blocks = Operator._blocks  # type: ignore[method-assign]
        if "_matmat" in cls.__dict__ and "_matmat_by_blocks" not in cls.__dict__:
            cls._matmat_by_blocks = Operator._matmat_by_blocks  # type: ignore[method-assign]
        cls._trusted = cls.__module__.partition(".")[0] == __name__.partition(".")[0]
        cls.has_products = cls._matmat is not Operator._matmat
        cls.has_entries = (cls._block, cls._blocks) != (Operator._block, Operator._blocks)

    def __init__(self, n: int, dtype: AnyDtype = np.float64, device: AnyDevice = "cpu") -> None:
        if not (self.has_products or self.has_entries):
            raise DtypeError(f"{type(self).__name__} must write _matmat(v) or _block(rows, cols)")
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)):
            raise DtypeError(f"n must be an integer, got {type(n).__name__}")
        if n < 2:
            raise ShapeError(f"the matrix must be at least 2 x 2, got {n} x {n}")
        self.shape = (int(n), int(n))
        self.dtype = check_dtype(dtype, "dtype")
        self.device = resolve_device(device)

    def __repr__(self) -> str:
        n = self.shape[0]
        given = {"products": self.has_products, "entries": self.has_entries}
        what = " and ".join(name for name, there in given.items() if there)
        sign = "positive semi-definite" if self.definite else "indefinite"
        return (
            f"{type(self).__name__}({n} x {n}, {self.dtype}, {self.device}, {what}, "
            f"{sign} by declaration)"
        )

    def _matmat(self, v: Array) -> Array:
        """K v, (N, k), for v (N, k) of the operator's library and dtype."""
        raise NotImplementedError

    def _matmat_by_blocks(self, v: Array, width: int) -> Array:
        """K v, every `width` columns multiplied as if alone: others change none of their bits.

        BLAS sums in another order for another shape. A subclass may write it where a call a block
        would do the same work again.
        """
        return by_blocks(self.reader.matmat, v, width)

    def _block(self, rows: HostIndex, cols: HostIndex) -> Array:
        """K[rows, cols], (m, k), for (m,) and (k,) NumPy indices, none negative."""
        raise NotImplementedError

    def _blocks(self, rows: Array, cols: Array) -> Array:
        """Blocks K[rows[t], cols[t]], (t, m, k), for (t, m) and (t, k) indices; -1 gives zeros.

        The operators of this package write it in the place of `_block`: a level of the tree in one
        call.
        """
        return self.reader.one_by_one(rows, cols)

    def _diagonal(self) -> Array:
        """The diagonal, (N,), where there is a quicker way than through entries or products."""
        return self.reader.plain_diagonal()

    @property
    def has_diagonal(self) -> bool:
        """Whether the diagonal costs less than N products.

        Example:
            >>> gh.DenseOperator(np.eye(3)).has_diagonal
            True
        """
        return self.has_entries or type(self)._diagonal is not Operator._diagonal

    @property
    def coordinates(self) -> Array | None:
        """The points as orderings and neighbours compare them: near where |K_ij| is large.

        `points`, unless a subclass knows better.

        Example:
            >>> op = gh.KernelOperator(np.array([2.0, 3.0, 5.0]), lengthscale=0.5)
            >>> op.coordinates.ravel(), gh.DenseOperator(np.eye(3)).coordinates
            (array([0., 2., 6.]), None)
        """
        return self.points

    @property
    def said(self) -> str:
        """What all ranks must have the same of.

        Example:
            >>> gh.DenseOperator(np.eye(3)).said
            'DenseOperator of 3 rows, float64'
        """
        return f"{type(self).__name__} of {self.shape[0]} rows, {self.dtype}"

    @property
    def reader(self) -> BlockReader:
        """Through which algorithms read K."""
        return BlockReader(self)  # not kept: it would hold its owner

    def to(self, device: AnyDevice) -> Operator:
        """The same matrix with its data on a device ("cpu" or "cuda"); itself when it is there.

        Raises:
            ArgumentError: an unknown device name.
            DeviceError: the device cannot be used, or the matrix cannot be moved.

        Example:
            >>> op = gh.DenseOperator(np.eye(3))
            >>> op.to("cpu") is op
            True
        """
        kind = resolve_device(device)
        if kind == self.device:
            return self
        moved = copy.copy(self)
        moved._move_data(kind)
        moved.device = kind
        return moved

    def _move_data(self, device: str) -> None:
        """Move this object's arrays; a subclass that can be moved writes it."""
        raise DeviceError(
            f"{type(self).__name__} is on {self.device} and cannot be moved to {device}"
        )

    def runs(self) -> Runs:
        """The natural order: the matrix's own, every index a run, unless a subclass knows more.

        Example:
            >>> gh.DenseOperator(np.eye(3)).runs().permutation
            array([0, 1, 2])
        """
        n = self.shape[0]
        return Runs(np.arange(n), np.arange(n))

    def summand(self, index: int, count: int) -> Operator | None:
        """One of `count` operators with products whose sum is K; None where K has none.

        Example:
            >>> gh.DenseOperator(np.eye(3)).summand(0, 2) is None
            True
        """
        return None

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array | None:
        """An (N, num) sketch X with E[X X^T] = K, where one is cheap; else None.

        The ranks of `comm` form it together, and get the same bits as one alone.

        Example:
            >>> gh.DenseOperator(np.eye(3)).gram_vectors(8, seed=0) is None
            True
        """
        return None

    def root(self) -> Array | None:
        """A^T (N, rows) of K = A^T A, where it is stored; else None.

        Example:
            >>> gh.DenseOperator(np.eye(3)).root() is None
            True
        """
        return None

    def dual(self) -> Dual | None:
        """A of K = A^T A by A A^T and A^T w, where these are cheap; else None.

        Example:
            >>> gh.DenseOperator(np.eye(3)).dual() is None
            True
        """
        return None

    def eigenbasis(self) -> Rotated | None:
        """K in the Kronecker-factored eigenbasis of a network's layers; None where there is none.

        Example:
            >>> gh.DenseOperator(np.eye(3)).eigenbasis() is None
            True
        """
        return None

    @symmetric
    def matmat(self, v: Vectors) -> Vectors:
        """K v for v of shape (N,) or (N, k); the result is like v.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `arrays.as_columns`.

        Example:
            >>> op = gh.DenseOperator(np.diag([1.0, 2.0, 3.0]))
            >>> op @ np.ones(3)
            array([1., 2., 3.])
            >>> op.matmat(np.ones((3, 5))).shape
            (3, 5)
        """
        columns, restore = as_columns(v, self.shape[0], self.dtype, self.device, "v")
        return restore(self.reader.matmat(columns))

    def entries(self, rows: ArrayLike, cols: ArrayLike) -> Array:
        """A block K[rows, cols], or a batch of blocks K[rows[t], cols[t]].

        Args:
            rows: (m,) or (t, m) integer indices.
            cols: (k,) or (t, k) integer indices.

        Returns:
            (m, k) or (t, m, k).

        Raises:
            DtypeError: indices are not integers.
            ShapeError: not both 1-D or both 2-D of the same length.
            ArgumentError: an index is outside 0 .. N - 1.

        Example:
            >>> op = gh.DenseOperator(np.diag([1.0, 2.0, 3.0]))
            >>> op.entries([0, 2], [1, 2])
            array([[0., 0.],
                   [0., 3.]])
            >>> op.entries([[0], [2]], [[0, 1], [1, 2]])[1]
            array([[0., 3.]])
        """
        if not self.has_entries:
            raise ArgumentError(f"{type(self).__name__} has no entries, only products")
        rows, cols = block_indices(rows, cols, self.shape)
        if rows.ndim == 1:
            return self.reader.blocks(rows[None], cols[None])[0]
        return self.reader.blocks(rows, cols)

    def diagonal(self) -> Array:
        """The diagonal of K, (N,).

        Example:
            >>> gh.KernelOperator(np.linspace(0, 1, 3), nugget=0.5).diagonal()
            array([1.5, 1.5, 1.5])
        """
        return self.reader.diagonal()

    def to_dense(self) -> Array:
        """K as an (N, N) array (free memory is checked first).

        Raises:
            MemoryEstimateError: it does not fit.

        Example:
            >>> gh.KernelOperator(np.array([0.0, 1.0]), "laplace").to_dense().round(3)
            array([[1.   , 0.368],
                   [0.368, 1.   ]])
        """
        n = self.shape[0]
        needed = 3 * n * n * self.dtype.itemsize
        check_memory(needed, f"a dense {n} x {n} matrix", "N", self.device)
        if self.has_entries:
            every = np.arange(n)[None]
            return self.reader.blocks(every, every)[0]
        return self.reader.matmat(namespace_on(self.device).eye(n, dtype=self.dtype))
