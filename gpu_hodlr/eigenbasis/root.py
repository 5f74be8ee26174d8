"""Any network's matrix in the Kronecker-factored eigenbasis of its parameters, by a stored root."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, HostIndex, check_memory, device_of, namespace
from gpu_hodlr.eigenbasis.kronecker import KroneckerBasis, LayerBasis, eigenvectors
from gpu_hodlr.eigenbasis.rotated import Panel, Rotated, products

_WIDEST = 1024  # units that are rotated: their blocks take units^2 inputs numbers for a diagonal
_TOGETHER = 16  # rows of A: whatever the free memory, the same sums
_WORKSPACE = 6  # times the rows of A that are rotated together


class LayerShape(NamedTuple):
    """Consecutive parameters of one layer.

    Attributes:
        width: w, what its tensors have in common on the first axis.
        inputs: f, of a matrix (w, f), its last column the bias where there is one.
        bias: whether there is one, which stands behind all weights.
    """

    width: int
    inputs: int
    bias: bool = False


@dataclass(frozen=True)
class RotatedRoot(Rotated):
    """K' = A'^T A' of A' = A Q.

    Attributes:
        at: (M, rows) A'^T.
    """

    at: Array

    @property
    def dtype(self) -> np.dtype[Any]:
        """See `Rotated`."""
        dtype: np.dtype[Any] = self.at.dtype
        return dtype

    def scaled(self, factor: float) -> RotatedRoot:
        """See `Rotated`."""
        root = self.at.dtype.type(factor**0.5)
        return replace(
            self, basis=self.basis.scaled(factor), at=self.at * root, d=self.d * factor
        )  # fmt: skip

    def _cast(self, dtype: DTypeLike) -> RotatedRoot:
        return replace(self, at=self.at.astype(dtype))

    def _column_numbers(self, height: int) -> int:
        return max(height, int(self.at.shape[1]))

    def _panels(self, units: slice) -> Panel:
        return self._panel

    def _panel(self, unit: int, rows: slice, other: int, group: slice, columns: int) -> Array:
        _, row = self._place(unit)
        here = slice(row + rows.start, row + rows.stop)
        return products(self.at[here], self._of(self.at, other, group, columns))

    def _rows(self, index: HostIndex) -> Array:
        return products(self.at[namespace(self.at).asarray(index)], self.at[None])[0]


def rotated_root(at: Array, shapes: Sequence[LayerShape]) -> RotatedRoot:
    """K = A^T A in the eigenbasis of its layers.

    With G_k (w, f) a layer's part of row k of A, U are the eigenvectors of sum_k G_k G_k^T and V
    those of sum_k G_k^T G_k: the Kronecker factors of K's own block (of the Kronecker-factored
    eigenbasis of George et al., NeurIPS 2018, where A are gradients; of Shampoo, Gupta, Koren,
    Singer, ICML 2018). Any kind of layer has them: a convolution has its kernels unfolded, a
    normalization its scale and shift as two features. A vector by itself, for which U would take
    more than its block of K, keeps its basis, and so do units of large tables.

    Args:
        at: (N, rows) A^T.
        shapes: of the layers, in the order of the N.

    Raises:
        MemoryEstimateError: A' does not fit.
    """
    n, rows = at.shape
    longest = max(max(s.inputs, min(s.width, _WIDEST)) for s in shapes)
    check_memory(
        n * (rows + _WORKSPACE * _TOGETHER * 8 // at.itemsize) * at.itemsize + 24 * longest**2,
        f"the root of {rows} x {n} in the eigenbasis",
        "the number of samples, or take another scheme", device_of(at),
    )  # fmt: skip
    layers, first = [], 0
    for shape in shapes:
        size = shape.width * shape.inputs
        layers.append(_layer(at[first : first + size], shape))
        first += size
    basis = KroneckerBasis(layers)
    turned = namespace(at).empty((basis.size, rows), at.dtype)
    for part in _parts(rows):
        turned[:, part] = basis.rotate(at[:, part])
    return RotatedRoot(basis, batched.squared_norms(turned), turned)


def _layer(at: Array, shape: LayerShape) -> LayerBasis:
    """The basis of the layer that these rows of A^T are of."""
    xp, (w, f) = namespace(at), shape[:2]
    own = LayerBasis(None, xp.eye(f, dtype=at.dtype), w, shape.bias)
    if f == 1:
        return own
    turned = 1 < w <= _WIDEST
    units, inputs = xp.zeros((w, w) if turned else (0, 0)), xp.zeros((f, f))
    for part in _parts(at.shape[1]):
        G = own.read(xp.ascontiguousarray(at[:, part].T).astype(np.float64))
        by_input = G.reshape(1, -1, f)
        batched.matmul(by_input, by_input, transpose_a=True, add_to=inputs[None])
        if turned:
            by_unit = xp.ascontiguousarray(G.transpose(1, 0, 2)).reshape(1, w, -1)
            batched.matmul(by_unit, by_unit, transpose_b=True, add_to=units[None])
    return replace(
        own,
        U=eigenvectors(units).astype(at.dtype) if turned else None,
        V=eigenvectors(inputs).astype(at.dtype),
    )


def _parts(rows: int) -> Iterator[slice]:
    for start in range(0, rows, _TOGETHER):
        yield slice(start, min(start + _TOGETHER, rows))
