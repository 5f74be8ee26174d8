"""G[u, v, k]: the Gauss-Newton matrix of the units' pre-activations, a sample at a time."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from gpu_hodlr.batched import columns_at_once, one_blas_thread
from gpu_hodlr.batched.dots import pair_dots
from gpu_hodlr.devices import Array, HostIndex, check_memory, device_of, namespace
from gpu_hodlr.networks.layers import Layer
from gpu_hodlr.networks.output_hessian import OutputHessian
from gpu_hodlr.once import once


class RootGram:
    """G[u, v, k] = sum_o C[u, o, k] C[v, o, k] by a stored root.

    Args:
        root: (units, outputs, n) C.
    """

    def __init__(self, root: Array) -> None:
        self.root = root

    @property
    def num_units(self) -> int:
        """Its size."""
        return len(self.root)

    def rows(self, u: int, units: Array) -> Array:
        """G[u, units, :], (len(units), n)."""
        return namespace(self.root).einsum("ok,vok->vk", self.root[u], self.root[units])

    def coupled(self, u: HostIndex, v: HostIndex) -> NDArray[np.bool_]:
        """Whether G[u, v] can be anything but 0: always."""
        return np.ones(u.shape, bool)

    def pairs(self, u: HostIndex, v: HostIndex) -> Array:
        """G[u, v, :] for host arrays of units (p,), as (p, n)."""
        return pair_dots(self.root, u, v)


class UnitGram:
    """G[u, v, k] = J_u^T E J_v at sample k, J_u = dz_out / dz_u, for units u, v of trained layers.

    The output units are always there, also where the last layer is not trained.

    With few outputs the rows of the root C = (I - r r^T) diag(c) J are stored, n * outputs
    numbers a unit, and G = C_u . C_v. With more outputs than hidden units the hidden-hidden table
    is stored, n * hidden numbers a unit, and an entry costs O(n), never O(n * outputs): blocks
    with output units follow from J_u[o] = W_out[o] . T_u with T_u = dh / dz_u, h the inputs of the
    last layer, and E is diagonal plus rank one (Botev, Ritter, Barber, ICML 2017, section 3).

    Args:
        layers: of the network.
        hessian: of the loss.

    Attributes:
        num_hidden: units of all layers but the last.
        num_outputs: units of the last.
    """

    @one_blas_thread()
    def __init__(self, layers: list[Layer], hessian: OutputHessian) -> None:
        self._layers, self._hessian = layers, hessian
        widths = [layer.weight.shape[0] for layer in layers]
        trained = [w for w, layer in zip(widths[:-1], layers[:-1], strict=True) if layer.trained]
        self.num_hidden, self.num_outputs = sum(trained), widths[-1]
        self.tabulated = self.num_outputs > self.num_hidden > 0 or len(layers) == 1
        inner = widths[-2] if len(layers) > 1 else 0
        if self.tabulated:
            numbers = self.num_hidden * self.num_hidden
        else:
            numbers = (self.num_hidden + self.num_outputs + max(widths)) * self.num_outputs
        self._check(numbers)
        self._weight = layers[-1].weight
        if self.tabulated:
            self._table = self._hidden_table(inner) if self.num_hidden else None
        else:
            self._stored = RootGram(self._stored_root())

    @property
    def num_units(self) -> int:
        """Hidden and output units."""
        return self.num_hidden + self.num_outputs

    @property
    def root(self) -> Array | None:
        """(units, outputs, n) C, where it is stored."""
        return None if self.tabulated else self._stored.root

    @property
    def _xp(self) -> ModuleType:
        """The library of the arrays; a module, which no pickle holds."""
        return namespace(self._hessian.c)

    def _check(self, numbers: int) -> None:
        """Refuse so many numbers a sample where they do not fit.

        Raises:
            MemoryEstimateError: says what is needed.
        """
        c = self._hessian.c
        check_memory(
            numbers * c.shape[1] * c.dtype.itemsize, "the network's Jacobian in its hidden units",
            "the number of samples", device_of(c),
        )  # fmt: skip

    @once
    def down(self) -> Array | None:
        """(hidden, inputs of the last layer, n) T; None for a network of one layer.

        Made where it is needed: of wide layers it is far larger than the root.

        Raises:
            MemoryEstimateError: it does not fit.
        """
        if len(self._layers) == 1:
            return None
        self._check(self.num_hidden * self._layers[-1].weight.shape[1])
        with one_blas_thread():
            return _derivatives_of_last_inputs(self._layers)

    def _stored_root(self) -> Array:
        """C = (I - r r^T) diag(c) J, (units, outputs, n)."""
        c = self._hessian.c
        root = self._xp.empty((self.num_hidden + self.num_outputs, *c.shape), c.dtype)
        stop = len(root)
        for layer, rows in root_in_units(self._layers, self._hessian):
            if layer.trained or layer is self._layers[-1]:
                root[stop - rows.shape[1] : stop] = rows.swapaxes(0, 1)
                stop -= rows.shape[1]
        return root

    def _hidden_table(self, inner: int) -> Array:
        """G of the hidden units, (hidden, hidden, n)."""
        xp, c = self._xp, self._hessian.c
        down, weight = self.down, self._weight
        assert down is not None
        last = xp.empty((inner, inner, c.shape[1]), c.dtype)  # G in the inputs of the last layer
        for h in range(inner):
            last[h] = (weight[:, h : h + 1] * weight).T @ (c * c)
        if self._hessian.r is not None:
            rank_one = weight.T @ (self._hessian.r * c)
            last -= rank_one[:, None] * rank_one
        table = xp.empty((self.num_hidden, self.num_hidden, c.shape[1]), c.dtype)
        for u in range(self.num_hidden):
            pushed = xp.einsum("hk,hgk->gk", down[u], last)
            table[u] = xp.einsum("gk,vgk->vk", pushed, down)
        return table

    def rows(self, u: int, units: Array) -> Array:
        """G[u, units, :], (len(units), n)."""
        xp = self._xp
        if not self.tabulated:
            return self._stored.rows(u, units)
        c, r = self._hessian.c, self._hessian.r
        result = xp.zeros((len(units), c.shape[1]), c.dtype)
        hidden = units < self.num_hidden
        outputs = units[~hidden] - self.num_hidden
        if u < self.num_hidden:
            assert self._table is not None
            result[hidden] = self._table[u, units[hidden]]
            if outputs.size:
                result[~hidden] = self._output_rows(self.down[u], outputs)  # type: ignore[index]
            return result
        o = u - self.num_hidden
        if hidden.any():
            down = self.down[units[hidden]]  # type: ignore[index]
            jacobian = xp.einsum("h,vhk->vk", self._weight[o], down)
            result[hidden] = c[o] ** 2 * jacobian
            if r is not None:
                rank_one = self._weight.T @ (r * c)
                result[hidden] -= r[o] * c[o] * xp.einsum("hk,vhk->vk", rank_one, down)
        same = xp.nonzero(~hidden)[0][outputs == o]
        result[same] = c[o] ** 2
        if r is not None:
            result[~hidden] -= r[outputs] * c[outputs] * (r[o] * c[o])
        return result

    def _output_rows(self, down: Array, outputs: Array) -> Array:
        c, r = self._hessian.c, self._hessian.r
        rows = c[outputs] ** 2 * (self._weight[outputs] @ down)
        if r is not None:
            rows -= r[outputs] * c[outputs] * ((self._weight.T @ (r * c)) * down).sum(axis=0)
        return rows

    def coupled(self, u: HostIndex, v: HostIndex) -> NDArray[np.bool_]:
        """Whether G[u, v] can be anything but 0, for host arrays of units of the same shape."""
        if self._hessian.r is not None:
            return np.ones(u.shape, bool)
        return (u == v) | (np.minimum(u, v) < self.num_hidden)

    @one_blas_thread()
    def pairs(self, u: HostIndex, v: HostIndex) -> Array:
        """G[u, v, :] for host arrays of units (p,), as (p, n)."""
        if not self.tabulated:
            return self._stored.pairs(u, v)
        xp, c = self._xp, self._hessian.c
        result = xp.zeros((len(u), c.shape[1]), c.dtype)
        low, high = np.minimum(u, v), np.maximum(u, v)
        for select, part in (
            (high < self.num_hidden, self._hidden_pairs),
            ((low < self.num_hidden) & (high >= self.num_hidden), self._mixed_pairs),
            (low >= self.num_hidden, self._output_pairs),
        ):
            if select.any():
                result[xp.asarray(np.nonzero(select)[0])] = part(low[select], high[select])
        return result

    def _hidden_pairs(self, u: HostIndex, v: HostIndex) -> Array:
        assert self._table is not None
        return self._table[self._xp.asarray(u), self._xp.asarray(v)]

    def _mixed_pairs(self, u: HostIndex, v: HostIndex) -> Array:
        """For hidden u and output v, some hidden units at a time."""
        xp, c, r = self._xp, self._hessian.c, self._hessian.r
        assert self.down is not None
        result = xp.empty((len(u), c.shape[1]), c.dtype)
        outputs = v - self.num_hidden
        step = columns_at_once(c, c.nbytes)
        for first in range(0, self.num_hidden, step):
            mine = np.nonzero((u >= first) & (u < first + step))[0]
            if not mine.size:
                continue
            down = self.down[first : first + step]
            at, o = xp.asarray(u[mine] - first), xp.asarray(outputs[mine])
            rows = c[o] ** 2 * (self._weight @ down)[at, o]
            if r is not None:
                rank_one = (self._weight.T @ (r * c) * down).sum(axis=1)
                rows -= r[o] * c[o] * rank_one[at]
            result[xp.asarray(mine)] = rows
        return result

    def _output_pairs(self, u: HostIndex, v: HostIndex) -> Array:
        xp, c, r = self._xp, self._hessian.c, self._hessian.r
        at, to = xp.asarray(u - self.num_hidden), xp.asarray(v - self.num_hidden)
        result = xp.where((at == to)[:, None], c[at] ** 2, c.dtype.type(0))
        if r is not None:
            result -= r[at] * c[at] * r[to] * c[to]
        return result


def root_in_units(layers: list[Layer], hessian: OutputHessian) -> Iterator[tuple[Layer, Array]]:
    """The rows of (I - r r^T) diag(c) J in the pre-activations of every layer, the last first.

    (outputs, width, n): row (o, k) of the root has nothing in the units at other samples.

    Args:
        layers: of the network.
        hessian: of the loss.
    """
    xp, c = namespace(hessian.c), hessian.c
    e = c * hessian.project(xp.eye(len(c), dtype=c.dtype)[:, :, None]).swapaxes(0, 1)
    for layer, below in zip(layers[::-1], [*layers[-2::-1], None], strict=True):
        yield layer, e
        if below is not None:
            e = layer.weight.T @ e
            e *= below.derivative


def _derivatives_of_last_inputs(layers: list[Layer]) -> Array:
    """T[u, h, k] = dh / dz_u for hidden units u of trained layers, h the last layer's inputs."""
    xp = namespace(layers[0].weight)
    slope = layers[-2].derivative
    assert slope is not None
    current = xp.eye(len(slope), dtype=slope.dtype)[:, :, None] * slope
    parts = [current] if layers[-2].trained else []
    for layer, above in zip(layers[-3::-1], layers[-2:0:-1], strict=True):
        assert layer.derivative is not None
        current = xp.einsum("vu,vhk->uhk", above.weight, current, optimize=True)
        current *= layer.derivative[:, None]
        if layer.trained:
            parts.insert(0, current)
    return xp.concatenate(parts)
