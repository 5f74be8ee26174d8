"""The Gauss-Newton matrix of Linear layers and activations, by Khatri-Rao products."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, launches_cost, namespace
from gpu_hodlr.distributed import ALONE, Communicator, shares
from gpu_hodlr.eigenbasis import Rotated, rotated
from gpu_hodlr.networks.by_layers import ByLayers, Products
from gpu_hodlr.networks.layer_products import BY_UNIT, pull_back, push_forward
from gpu_hodlr.networks.layers import Layer
from gpu_hodlr.networks.output_hessian import OutputHessian
from gpu_hodlr.networks.unit_gram import UnitGram, root_in_units
from gpu_hodlr.networks.unit_products import UnitProducts
from gpu_hodlr.once import once
from gpu_hodlr.operators import Dual

_MOST_COPIED = 1 << 27  # bytes of the units' root, which lies there a second time


class KhatriRao(ByLayers):
    """K = J^T H J of a network of Linear layers and elementwise activations.

    Products are one forward-mode and one backward pass for many columns: about 4 N n a column. The
    network is read once and not kept.

    Args:
        layers: of the network, at all samples.
        hessian: of the loss in the last pre-activations.

    Attributes:
        gram: G.
        layers: of the network.

    Raises:
        MemoryEstimateError: the hidden units' Jacobian does not fit.
    """

    gram: UnitGram

    def __init__(self, layers: list[Layer], hessian: OutputHessian) -> None:
        self.layers, self._hessian = layers, hessian
        self.num_outputs, n = hessian.c.shape
        super().__init__(layers, UnitGram(layers, hessian), n, hessian.c)
        self.product_cost = 4.0 * n * self.n

    def on(self, device: str) -> KhatriRao:
        """The same with its arrays there."""
        return KhatriRao([layer.on(device) for layer in self.layers], self._hessian.on(device))

    def summand(self, index: int, count: int) -> KhatriRao:
        """What a share of the samples contributes to K; for products."""
        samples = shares(self.num_samples, count)[index]
        part = copy.copy(self)
        part.layers = [layer.of(samples) for layer in self.layers]
        part._hessian = self._hessian.of(samples)
        part.num_samples = samples.stop - samples.start
        part._units = None if self._units is None else self._units.of(samples)
        part.has_entries = part.has_eigenbasis = False
        return part

    def eigenbasis(self) -> Rotated:
        """K in the Kronecker-factored eigenbasis of its layers (George et al., NeurIPS 2018).

        Raises:
            MemoryEstimateError: the network's Jacobian in it does not fit.
        """
        return rotated(self.layers, self._hessian, self.gram.down)

    def dual(self) -> Dual:
        """A = (I - r r^T) diag(c) J, never stored: n * outputs rows of as many numbers as units."""
        return _Dual(self, self.layers, self._hessian)

    def _chunk(self) -> int:
        widest = max(layer.width for layer in self.layers)
        column = widest * self.num_samples * self.dtype.itemsize
        return batched.columns_at_once(self._features, max(column, 1))

    def _products(self, columns: int) -> Products:
        # Of few columns at a time the root, which every one reads, is what takes time; on a GPU the
        # launches, of which units need a third.
        least = 1 if launches_cost(self.device) else BY_UNIT
        units = self._units if columns >= least else None
        if units is None or units.chunk() < least:
            return _ThroughLayers(self)
        return units

    @once
    def _units(self) -> UnitProducts[Layer] | None:
        """The products by the units' root, where that costs less than the tangents of all units.

        These also take three passes besides their GEMMs, about as much again.
        """
        root = self.gram.root
        layers = [layer for layer in self.layers if layer.trained]
        units = sum(layer.width for layer in layers)
        tangents = sum(layer.weight.size for layer in self.layers[1:])
        if root is None or root.nbytes > _MOST_COPIED or self.num_outputs * units > 2 * tangents:
            return None
        return UnitProducts(layers, namespace(root).ascontiguousarray(root[:units].T))

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array:
        """X = A^T Omega / sqrt(num) for K = A^T A and Gaussian Omega: one backward pass.

        Every rank draws and takes back some chunks of Omega's columns: the same chunks for every
        number of ranks, and so the same bits.
        """
        c = self._hessian.c
        chunk = min(comm.share(self._chunk()))  # GPUs may have different free memory
        edges = np.minimum(np.arange(0, num + chunk, chunk), num)
        parts = [slice(*edges[[p.start, p.stop]]) for p in shares(len(edges) - 1, comm.size)]
        normal = batched.normal_source((seed,), self.device)
        omega = normal((c.size, num), self.dtype, parts[comm.rank])
        omega /= num**0.5
        own = self.pull_back_root(omega.reshape(*c.shape, -1), chunk)
        return comm.allgather(own, [int(part.stop - part.start) for part in parts]).T

    @batched.one_blas_thread()
    def pull_back_root(self, w: Array, chunk: int | None = None) -> Array:
        """(A^T w)^T, (columns, N), for w (outputs, n, columns) and A = (I - r r^T) diag(c) J.

        Args:
            w: rows of A are (output, sample).
            chunk: columns that go through together; as many as the memory allows by default.
        """
        xp, c, chunk = namespace(w), self._hessian.c, chunk or self._chunk()
        own = xp.empty((w.shape[2], self.n), self.dtype)
        for i in range(0, len(own), chunk):
            z = xp.ascontiguousarray(w[:, :, i : i + chunk].swapaxes(1, 2))
            self._pull_back(c[:, None] * self._hessian.project(z), own[i : i + chunk].T)
        return own

    def _push_forward(self, v: Array) -> Array:
        """J v in the last pre-activations, (outputs, columns, n), for v (N, columns)."""
        xp = namespace(v)
        columns, start, below = v.shape[1], 0, None
        for layer in self.layers:
            stop = start + layer.width * len(layer.features)
            tangent = xp.empty((layer.width, columns, self.num_samples), self.dtype)
            push_forward(layer, v[start:stop], tangent)
            if below is not None:
                given = layer.weight @ below.reshape(len(below), -1)
                tangent += given.reshape(tangent.shape)
            if layer.derivative is not None:
                tangent *= layer.derivative[:, None]
            below, start = tangent, stop
        return tangent

    def _pull_back(self, e: Array, out: Array) -> None:
        """Write J^T e to (N, columns), for e (outputs, columns, n) in the last pre-activations."""
        columns, stop = e.shape[1], self.n
        for layer, below in zip(self.layers[::-1], [*self.layers[-2::-1], None], strict=True):
            start = stop - layer.width * len(layer.features)
            pull_back(layer, e, out[start:stop])
            if below is not None:
                assert below.derivative is not None  # of hidden layers
                e = (layer.weight.T @ e.reshape(len(e), -1)).reshape(-1, columns, e.shape[2])
                e *= below.derivative[:, None]
            stop = start


@dataclass(frozen=True)
class _ThroughLayers:
    """Products by one forward-mode and one backward pass."""

    access: KhatriRao

    def chunk(self) -> int:
        """Columns that go through together."""
        return self.access._chunk()

    def multiply(self, v: Array, out: Array, chunk: int) -> None:
        """Write K v."""

        def work(columns: slice) -> None:
            tangent = self.access._push_forward(v[:, columns])
            self.access._pull_back(self.access._hessian.apply(tangent), out[:, columns])

        batched.over_columns(work, v, chunk)


class _Dual(Dual):
    """A A^T of (output, sample) rows: a sum over layers of (x_k . x_l) (e_ok . e_pl).

    x are a layer's inputs, e the rows of A in its units. In double, so that small eigenvalues and
    their vectors are as good as the network's own numbers.

    Args:
        access: multiplies by A^T.
        layers: of the network.
        hessian: of the loss.
    """

    def __init__(self, access: KhatriRao, layers: list[Layer], hessian: OutputHessian) -> None:
        units = sum(layer.width for layer in layers if layer.trained)
        super().__init__(hessian.c.size, 2.0 * units * float(hessian.c.size) ** 2)
        self._access, self._layers, self._hessian = access, layers, hessian

    @batched.one_blas_thread()
    def gram(self, comm: Communicator = ALONE.comm) -> Array:
        """See `Dual`: each rank forms the rows of some outputs."""
        xp, (outputs, n) = namespace(self._hessian.c), self._hessian.c.shape
        parts = shares(outputs, comm.size)
        mine = parts[comm.rank]
        own = xp.zeros((mine.stop - mine.start, n, outputs, n), np.float64)
        for layer, rows in root_in_units(self._layers, self._hessian):
            if not layer.trained:
                continue
            x = layer.features.astype(np.float64)
            e = xp.ascontiguousarray(rows.swapaxes(1, 2), dtype=np.float64)
            flat = e.reshape(outputs * n, -1)
            product = flat[mine.start * n : mine.stop * n] @ flat.T
            own += product.reshape(own.shape) * (x.T @ x)[:, None]
        widths = [n * (part.stop - part.start) for part in parts]
        return comm.allgather(own.reshape(-1, outputs * n), widths)

    def combine(self, w: Array) -> Array:
        """See `Dual`."""
        return self._access.pull_back_root(w.reshape(*self._hessian.c.shape, -1)).T
