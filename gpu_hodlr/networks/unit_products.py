"""Products by the units' root: K v = A^T A v, where rows of A are Khatri-Rao products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, Self, TypeVar

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, namespace

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
    """A v by a GEMM a unit and one a sample, and back the same way: 4 n (N + rows units) a column.

    Row (k, r) of A is C_k,r,u x_k for the parameters of unit u, with the inputs x of its layer:
    A v takes the units' V^T x, and of these C. GEMMs read and write vectors as they lie, (inputs,
    columns) a unit, and nothing is transposed or added up between them.

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
            inner = namespace(v).empty((units, n, mine.shape[1]), v.dtype)
            self._over(partial(self._push_forward, mine, inner), units, inner)
            self._over(partial(self._weigh, inner), n, inner)
            self._over(partial(self._write, inner, made), units, inner)

    def pull_back(self, w: Array, out: Array, chunk: int) -> None:
        """Write A^T w, (N, columns), for w (n, rows, columns), so many columns at a time."""
        n, _, units = self.root.shape
        for start in range(0, w.shape[2], chunk):
            columns = slice(start, start + chunk)
            mine, made = w[:, :, columns], out[:, columns]
            inner = namespace(w).empty((units, n, mine.shape[2]), w.dtype)
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
        """Write some units' V^T X + b, (units, n, columns)."""
        xp = namespace(v)
        for layer, at, weight, bias in self._parts(v, units):
            part, inputs = inner[at], layer.inputs
            if not inputs:
                part[:] = 0
            elif v.shape[1] == 1:
                part[:, :, 0] = weight[:, :, 0] @ layer.features[:inputs]
            else:
                xp.matmul(layer.features[:inputs].T, weight, out=part)
            if layer.bias:
                part += bias[:, None]

    def _weigh(self, inner: Array, samples: slice) -> None:
        """Multiply by C^T C at some samples, in place."""
        mine = inner[:, samples]
        part = self.root[samples]
        _combine(part, part @ mine.swapaxes(0, 1), mine)

    def _combine(self, w: Array, inner: Array, samples: slice) -> None:
        """Write C^T w at some samples, for w (n, rows, columns)."""
        _combine(self.root[samples], w[samples], inner[:, samples])

    def _write(self, inner: Array, out: Array, units: slice) -> None:
        """Write some units' X E and the sums of E over the samples, for E (units, n, columns)."""
        xp = namespace(out)
        for layer, at, weight, bias in self._parts(out, units):
            part, inputs = inner[at], layer.inputs
            if inputs and out.shape[1] == 1:
                weight[:, :, 0] = part[:, :, 0] @ layer.features[:inputs].T
            elif inputs:
                xp.matmul(layer.features[:inputs], part, out=weight)
            if layer.bias:
                bias[:] = layer.features[inputs] @ part

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
    """Write root^T w, (units, n, columns), for a root (n, rows, units) and w (n, rows, columns)."""
    xp = namespace(w)
    if root.shape[1] == 1:  # BLAS has no quick way to an outer product
        xp.multiply(root[:, 0].T[:, :, None], w[:, 0], out=out)
    else:
        xp.matmul(root.swapaxes(1, 2), w, out=out.swapaxes(0, 1))
