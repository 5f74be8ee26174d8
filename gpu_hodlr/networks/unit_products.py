"""Products by the units' root: K v = A^T A v, where rows of A are Khatri-Rao products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, Self, TypeVar

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace
from gpu_hodlr.networks.layer_products import by_unit, put_unit_rows, unit_rows

# So many columns are multiplied before threads have begun to share the work.
_FEW = 64


class TrainedLayer(Protocol):
    """A Linear layer: its units and what each trained parameter of a unit is multiplied by."""

    @property
    def features(self) -> Array:
        """(f, n)."""

    @property
    def width(self) -> int:
        """Units."""

    @property
    def inputs(self) -> int:
        """Trained columns of the weight."""

    @property
    def bias(self) -> bool:
        """Whether it is trained: the last feature."""

    def of(self, samples: slice) -> Self:
        """The same layer at some of the samples."""


L = TypeVar("L", bound=TrainedLayer)


@dataclass(frozen=True)
class UnitProducts(Generic[L]):
    """A v by GEMMs of the layers and one a sample, and back: 4 n (N + rows units) a column.

    Row (k, r) of A is C_k,r,u x_k for the parameters of unit u, with the inputs x of its layer:
    A v takes the units' V^T x, and of these C. Between them, (n, units, columns), nothing is
    transposed or added up.

    Attributes:
        layers: whose parameters K is of.
        root: (n, rows, units) C.
    """

    layers: Sequence[L]
    root: Array

    @property
    def product_cost(self) -> float:
        """Operations of a column."""
        n, rows, units = self.root.shape
        trained = sum(layer.width * len(layer.features) for layer in self.layers)
        return 4.0 * n * (trained + rows * units)

    def of(self, samples: slice) -> UnitProducts[L]:
        """At some of the samples."""
        return UnitProducts([layer.of(samples) for layer in self.layers], self.root[samples])

    def chunk(self) -> int:
        """Columns that go through together: threads share their work, and not the columns."""
        n, rows, units = self.root.shape
        column = (units + rows) * n * self.root.itemsize
        return batched.columns_at_once(self.root, column, alone=True)

    def multiply(self, v: Array, out: Array, chunk: int) -> None:
        """Write K v, (N, columns), for v alike, so many columns at a time."""
        n, _, units = self.root.shape
        for start in range(0, v.shape[1], chunk):
            columns = slice(start, start + chunk)
            mine, made = v[:, columns], out[:, columns]
            inner = namespace(v).empty((n, units, mine.shape[1]), v.dtype)
            self._over(partial(self._push_forward, mine, inner), units, inner)
            self._over(partial(self._weigh, inner), n, inner)
            self._over(partial(self._write, inner, made), units, inner)

    def pull_back(self, w: Array, out: Array, chunk: int) -> None:
        """Write A^T w, (N, columns), for w (n, rows, columns), so many columns at a time."""
        n, _, units = self.root.shape
        for start in range(0, w.shape[2], chunk):
            columns = slice(start, start + chunk)
            mine, made = w[:, :, columns], out[:, columns]
            inner = namespace(w).empty((n, units, mine.shape[2]), w.dtype)
            self._over(partial(self._combine, mine, inner), n, inner)
            self._over(partial(self._write, inner, made), units, inner)

    def _over(self, work: Callable[[slice], None], count: int, inner: Array) -> None:
        """Do the work of so many units or samples, each alone."""
        if inner.shape[2] > _FEW:
            batched.over_spans(work, inner, count)
        else:
            with batched.one_blas_thread():
                work(slice(0, count))

    def _push_forward(self, v: Array, inner: Array, units: slice) -> None:
        """Write some units' V^T X + b, (n, units, columns)."""
        xp, (n, _, columns) = namespace(v), inner.shape
        for layer, at, weight, bias in self._parts(v, units):
            part, inputs = inner[:, at], layer.inputs
            if not by_unit(columns, n):
                rows = unit_rows(weight, bias)
                xp.matmul(layer.features.T, rows.T, out=part.reshape(n, -1))
                continue
            if inputs:
                xp.matmul(layer.features[:inputs].T, weight, out=part.swapaxes(0, 1))
            else:
                part[:] = 0
            if layer.bias:
                part += bias

    def _weigh(self, inner: Array, samples: slice) -> None:
        """Multiply by C^T C at some samples, in place."""
        mine, part = inner[samples], self.root[samples]
        _combine(part, part @ mine, mine)

    def _combine(self, w: Array, inner: Array, samples: slice) -> None:
        """Write C^T w at some samples, for w (n, rows, columns)."""
        _combine(self.root[samples], w[samples], inner[samples])

    def _write(self, inner: Array, out: Array, units: slice) -> None:
        """Write some units' X E and the sums of E over the samples, for E (n, units, columns)."""
        xp, (n, _, columns) = namespace(out), inner.shape
        for layer, at, weight, bias in self._parts(out, units):
            part, inputs = inner[:, at], layer.inputs
            if not by_unit(columns, n):
                rows = part.reshape(n, -1).T @ layer.features.T
                put_unit_rows(rows, weight, bias)
                continue
            if inputs:
                xp.matmul(layer.features[:inputs], part.swapaxes(0, 1), out=weight)
            if layer.bias:
                bias[:] = (layer.features[inputs] @ part.reshape(n, -1)).reshape(bias.shape)

    def _parts(self, v: Array, units: slice) -> Iterator[tuple[L, slice, Array, Array]]:
        """Of some units, a layer at a time: where they are, their weights' and biases' rows of v.

        (units, inputs, columns) and (units, columns), views.
        """
        first = start = 0
        for layer in self.layers:
            width, inputs = layer.width, layer.inputs
            own = slice(max(units.start - first, 0), min(units.stop - first, width))
            if own.start < own.stop:
                split, stop = start + width * inputs, start + width * len(layer.features)
                weight = v[start:split].reshape(width, inputs, v.shape[1])
                bias = v[split:stop]
                at = slice(first + own.start, first + own.stop)
                yield layer, at, weight[own], bias[own]
            first += width
            start += width * len(layer.features)


def _combine(root: Array, w: Array, out: Array) -> None:
    """Write root^T w, (n, units, columns), for a root (n, rows, units), w (n, rows, columns)."""
    xp = namespace(w)
    turned = root.swapaxes(1, 2)
    if root.shape[1] == 1:  # BLAS has no quick way to an outer product
        xp.multiply(turned, w, out=out)
    else:
        xp.matmul(turned, w, out=out)
