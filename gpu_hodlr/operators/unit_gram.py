"""G[u, v, k]: the Gauss-Newton matrix of the units' pre-activations, a sample at a time."""

from __future__ import annotations

from typing import Any

from gpu_hodlr.arrays import Array, check_memory, namespace
from gpu_hodlr.operators.network import Layer, OutputHessian


class UnitGram:
    """G[u, v, k] = J_u^T E J_v at sample k, J_u = dz_out / dz_u, for units u, v of any layers.

    With few outputs the rows of the root C = (I - r r^T) diag(c) J are stored, n * outputs
    numbers a unit, and G = C_u . C_v. With more outputs than hidden units the hidden-hidden table
    is stored, n * hidden numbers a unit, and an entry costs O(n), never O(n * outputs): blocks
    with output units follow from J_u[o] = W_out[o] . T_u with T_u = dh / dz_u, h the inputs of the
    last layer, and E is diagonal plus rank one (Botev, Ritter, Barber, ICML 2017, section 3).

    Args:
        layers: of the network.
        hessian: of the loss.
    """

    def __init__(self, layers: list[Layer], hessian: OutputHessian) -> None:
        xp = namespace(hessian.c)
        self._xp = xp
        self._hessian = hessian
        widths = [layer.weight.shape[0] for layer in layers]
        self.num_hidden, self.num_outputs = sum(widths[:-1]), widths[-1]
        n = hessian.c.shape[1]
        self.tabulated = self.num_outputs > self.num_hidden > 0 or len(layers) == 1
        inner = widths[-2] if len(layers) > 1 else 0
        a_unit = self.num_hidden + inner if self.tabulated else self.num_outputs + inner
        check_memory(
            (self.num_hidden * a_unit + self.num_outputs**2 * (not self.tabulated)) * n
            * hessian.c.dtype.itemsize,
            "the network's Jacobian in its hidden units", "the number of samples",
        )  # fmt: skip
        self._weight = layers[-1].weight
        self._down = _derivatives_of_last_inputs(layers) if len(layers) > 1 else None
        if self.tabulated:
            self._table = self._hidden_table(inner) if self.num_hidden else None
        else:
            self._root = self._stored_root()

    def _stored_root(self) -> Array:
        """C = (I - r r^T) diag(c) J, (units, outputs, n)."""
        xp, c = self._xp, self._hessian.c
        root = xp.empty((self.num_hidden + self.num_outputs, *c.shape), c.dtype)
        for u in range(self.num_hidden):
            root[u] = c * (self._weight @ self._down[u])  # type: ignore[index]
        root[self.num_hidden :] = xp.eye(len(c), dtype=c.dtype)[:, :, None] * c
        if self._hessian.r is not None:
            for unit in root:
                unit[:] = self._hessian.project(unit)
        return root

    def _hidden_table(self, inner: int) -> Array:
        """G of the hidden units, (hidden, hidden, n)."""
        xp, c = self._xp, self._hessian.c
        down, weight = self._down, self._weight
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
            result: Array = xp.einsum("ok,vok->vk", self._root[u], self._root[units])
            return result
        c, r = self._hessian.c, self._hessian.r
        result = xp.zeros((len(units), c.shape[1]), c.dtype)
        hidden = units < self.num_hidden
        outputs = units[~hidden] - self.num_hidden
        if u < self.num_hidden:
            assert self._table is not None
            result[hidden] = self._table[u, units[hidden]]
            if outputs.size:
                result[~hidden] = self._output_rows(self._down[u], outputs)  # type: ignore[index]
            return result
        o = u - self.num_hidden
        if hidden.any():
            down = self._down[units[hidden]]  # type: ignore[index]
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
        rows: Array = c[outputs] ** 2 * (self._weight[outputs] @ down)
        if r is not None:
            rows -= r[outputs] * c[outputs] * ((self._weight.T @ (r * c)) * down).sum(axis=0)
        return rows

    def diagonal(self, u: int) -> Array:
        """G[u, u, :], (n,)."""
        result: Any = self.rows(u, self._xp.asarray([u]))[0]
        return result


def _derivatives_of_last_inputs(layers: list[Layer]) -> Array:
    """T[u, h, k] = dh / dz_u for all hidden units u, h the last layer's inputs."""
    xp = namespace(layers[0].weight)
    slope = layers[-2].derivative
    assert slope is not None
    current = xp.eye(len(slope), dtype=slope.dtype)[:, :, None] * slope
    parts = [current]
    for layer, above in zip(layers[-3::-1], layers[-2:0:-1], strict=True):
        assert layer.derivative is not None
        current = xp.einsum("vu,vhk->uhk", above.weight, current, optimize=True)
        current *= layer.derivative[:, None]
        parts.insert(0, current)
    return xp.concatenate(parts)
