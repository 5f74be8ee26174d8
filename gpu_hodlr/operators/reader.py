"""How algorithms read a matrix that a user brought."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import as_array, check_finite
from gpu_hodlr.devices import Array, check_memory, device_of, namespace, namespace_on, to_host
from gpu_hodlr.errors import ArgumentError, DeviceError, ShapeError

if TYPE_CHECKING:
    from gpu_hodlr.operators.operator import Operator

_STRIP = 1 << 24  # entries of a strip of rows, where a product reads all entries


def by_blocks(multiply: Callable[[Array], Array], v: Array, width: int) -> Array:
    """A product with v (N, k), a call for every `width` columns: of the same shape and strides."""
    xp = namespace(v)
    products = [
        multiply(xp.ascontiguousarray(v[:, start : start + width]))
        for start in range(0, v.shape[1], width)
    ]
    if len(products) == 1:
        return products[0]
    return xp.concatenate(products, axis=1) if products else multiply(v)


def checked(
    result: Any, shape: tuple[int, ...], name: str, dtype: np.dtype[Any], device: str
) -> Array:
    """What a user's function gave, as an array of the matrix's dtype.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: it has another shape, is no floating
            array, is elsewhere, or (on the CPU) has NaN or infinity.
    """
    array = as_array(result, f"the result of {name}")
    if device_of(array) != device:
        raise DeviceError(f"{name} must give arrays on {device}, got one on {device_of(array)}")
    if array.shape != shape:
        raise ShapeError(f"{name} must give shape {shape}, got {tuple(array.shape)}")
    if device == "cpu":  # a GPU would have to be waited for: there NaN shows
        check_finite(array, f"the result of {name}")
    return array.astype(dtype, copy=False)


class BlockReader:
    """The only one who calls what an operator writes: `_matmat`, `_block`, `_diagonal`, ...

    Algorithms ask for a level's blocks at once, with padding; a subclass that writes `_block`
    gets one block at a time, without. What comes back is checked, where the operator is not one of
    this package's own.

    Args:
        operator: K.
    """

    def __init__(self, operator: Operator) -> None:
        self._operator = operator

    @property
    def device(self) -> str:
        """Where blocks are."""
        return self._operator.device

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of blocks."""
        return self._operator.dtype

    def blocks(self, rows: Array, cols: Array) -> Array:
        """Blocks K[rows[t], cols[t]], (t, m, k), for (t, m) and (t, k) indices; -1 gives zeros.

        Raises:
            ArgumentError: K has no entries; or a result has NaN or infinity.
            ShapeError, DtypeError, DeviceError: a result is not (m, k), floating, on the device.
        """
        operator = self._operator
        if not operator.has_entries:
            raise ArgumentError(f"this {type(operator).__name__} has no entries, only products")
        return operator._blocks(rows, cols)

    def one_by_one(self, rows: Array, cols: Array) -> Array:
        """`blocks` by `_block`."""
        operator = self._operator
        xp = namespace_on(operator.device)
        rows, cols = to_host(rows), to_host(cols)
        out = xp.zeros((*rows.shape, cols.shape[1]), operator.dtype)
        # The user's method may not be thread-safe: one block after the other.
        for block, row, col in zip(out, rows, cols, strict=True):
            i, j = np.nonzero(row >= 0)[0], np.nonzero(col >= 0)[0]
            if i.size and j.size:
                values = operator._block(row[i], col[j])
                if not operator._trusted:
                    values = self.checked(values, (i.size, j.size), "_block")
                block[xp.asarray(i)[:, None], xp.asarray(j)] = values
        return out

    def matmat(self, v: Array) -> Array:
        """K v, (N, k), for v (N, k) of the operator's library and dtype.

        Raises:
            ArgumentError: the result has NaN or infinity (looked for on the CPU alone).
            ShapeError, DtypeError, DeviceError: it is not (N, k), floating, on the device.
        """
        operator = self._operator
        if not operator.has_products:
            return self._by_entries(v, max(1, v.shape[1]))
        if operator._trusted:
            return operator._matmat(v)
        v = namespace(v).ascontiguousarray(v)  # what a user's own kernel may count on
        return self.checked(operator._matmat(v), v.shape, "_matmat")

    def matmat_by_blocks(self, v: Array, width: int) -> Array:
        """`matmat`, every `width` columns multiplied as if alone: others change none of their bits.

        BLAS sums in another order for another shape.

        Raises:
            ArgumentError, ShapeError, DtypeError, DeviceError: see `matmat`.
        """
        operator = self._operator
        if not operator.has_products:
            return self._by_entries(v, width)
        product = operator._matmat_by_blocks(v, width)
        if operator._trusted:
            return product
        return self.checked(product, v.shape, "_matmat_by_blocks")

    def _by_entries(self, v: Array, width: int) -> Array:
        n = len(v)
        out = namespace(v).empty_like(v)
        strip = max(1, _STRIP // n)
        for start in range(0, n, strip):
            rows = np.arange(start, min(n, start + strip))
            block = self.blocks(rows[None], np.arange(n)[None])

            def multiply(part: Array, block: Array = block) -> Array:
                return batched.matmul(block, part[None])[0]

            out[start : start + strip] = by_blocks(multiply, v, width)
        return out

    def diagonal(self) -> Array:
        """The diagonal of K, (N,)."""
        found = self._operator._diagonal()
        if self._operator._trusted:
            return found
        return self.checked(found, (self._operator.shape[0],), "_diagonal")

    def plain_diagonal(self) -> Array:
        """The diagonal from entries, or else from N products.

        Raises:
            MemoryEstimateError: the products do not fit.
        """
        operator = self._operator
        n = operator.shape[0]
        if operator.has_entries:
            one_by_one = np.arange(n)[:, None]
            return self.blocks(one_by_one, one_by_one)[:, 0, 0]
        needed = 3 * n * n * operator.dtype.itemsize
        check_memory(needed, "a diagonal from products alone", "N", operator.device)
        return self.matmat(namespace_on(operator.device).eye(n, dtype=operator.dtype)).diagonal()

    def checked(self, result: Any, shape: tuple[int, ...], name: str) -> Array:
        """What a user's function gave, see the function `checked`."""
        return checked(result, shape, name, self._operator.dtype, self._operator.device)
