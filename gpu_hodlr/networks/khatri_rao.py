"""The Gauss-Newton matrix of Linear layers and activations, by Khatri-Rao products."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, device_of, move, namespace
from gpu_hodlr.distributed import ALONE, Communicator, shares
from gpu_hodlr.eigenbasis import Rotated, rotated
from gpu_hodlr.networks.access import Access
from gpu_hodlr.networks.layers import Layer
from gpu_hodlr.networks.output_hessian import OutputHessian
from gpu_hodlr.networks.unit_gram import UnitGram, root_in_units
from gpu_hodlr.operators import Dual, Runs


class KhatriRao(Access):
    """K = J^T H J of a network of Linear layers and elementwise activations, by its layers.

    Entry of parameters i, j, weights or biases of units u, v with inputs x: K_ij = sum_k x_i,k
    x_j,k G_uv,k, a Khatri-Rao product (Schraudolph, Neural Computation 14 (2002); Martens, JMLR 21
    (2020), section 8). The network is read once and not kept.

    Args:
        layers: of the network, at all samples.
        hessian: of the loss in the last pre-activations.

    Attributes:
        gram: G.
        layers: of the network.

    Raises:
        MemoryEstimateError: the hidden units' Jacobian does not fit.
    """

    name = "khatri-rao"
    has_entries = has_eigenbasis = True

    def __init__(self, layers: list[Layer], hessian: OutputHessian) -> None:
        widths = [layer.weight.shape[0] for layer in layers]
        super().__init__(
            sum(w * len(layer.features) for w, layer in zip(widths, layers, strict=True)),
            hessian.c.dtype,
            device_of(hessian.c),
        )
        self.layers, self._hessian = layers, hessian
        self.num_outputs, self.num_samples = hessian.c.shape
        self.gram = UnitGram(layers, hessian)
        self._features = namespace(hessian.c).concatenate([a.features for a in layers])
        self._feature_of, self._unit_of = _parameter_maps(layers)
        self.product_cost = 4.0 * self.num_samples * self.n
        self.entry_cost = 2.0 * self.num_samples

    def on(self, device: str) -> KhatriRao:
        """The same with its arrays there."""
        moved = copy.copy(self)
        moved.layers = [layer.on(device) for layer in self.layers]
        moved._hessian = self._hessian.on(device)
        moved.gram = UnitGram(moved.layers, moved._hessian)
        moved._features = move(self._features, device)
        moved.device = device
        return moved

    def summand(self, index: int, count: int) -> KhatriRao:
        """What a share of the samples contributes to K; for products."""
        samples = shares(self.num_samples, count)[index]
        part = copy.copy(self)
        part.layers = [layer.of(samples) for layer in self.layers]
        part._hessian = self._hessian.of(samples)
        part.num_samples = samples.stop - samples.start
        part.has_entries = part.has_eigenbasis = False
        return part

    def runs(self) -> Runs:
        """Parameters unit by unit, a unit's bias beside its weights."""
        permutation = np.lexsort((self._feature_of, self._unit_of))
        units = self._unit_of[permutation]
        return Runs(permutation, np.nonzero(np.diff(units, prepend=-1))[0])

    def eigenbasis(self) -> Rotated:
        """K in the Kronecker-factored eigenbasis of its layers (George et al., NeurIPS 2018).

        Raises:
            MemoryEstimateError: the network's Jacobian in it does not fit.
        """
        return rotated(self.layers, self._hessian, self.gram.down)

    def dual(self) -> Dual:
        """A = (I - r r^T) diag(c) J, never stored: n * outputs rows of as many numbers as units."""
        return _Dual(self, self.layers, self._hessian)

    def blocks(self, rows: Array, cols: Array) -> Array:
        """Blocks of entries."""
        return batched.khatri_rao_entries(
            self._features, self._feature_of, self._unit_of, self.gram, rows, cols
        )

    @batched.one_blas_thread()
    def diagonal(self) -> Array:
        """The diagonal, by one product of squares."""
        xp = namespace(self._features)
        units = np.arange(self.gram.num_hidden + self.gram.num_outputs)
        by_feature_and_unit = (self._features**2) @ self.gram.pairs(units, units).T
        return by_feature_and_unit[xp.asarray(self._feature_of), xp.asarray(self._unit_of)]

    def _chunk(self) -> int:
        widest = max(layer.weight.shape[0] for layer in self.layers)
        column = widest * self.num_samples * self.dtype.itemsize
        return batched.columns_at_once(self._features, max(column, 1))

    def matmat(self, v: Array) -> Array:
        """One forward-mode and one backward pass for many columns: about 4 N n a column."""
        return self._in_chunks(v, self._chunk())

    def matmat_by_blocks(self, v: Array, width: int) -> Array:
        """In chunks that cut no block."""
        most = self._chunk()
        return self._in_chunks(v, max(c for c in range(1, min(most, width) + 1) if width % c == 0))

    def _in_chunks(self, v: Array, chunk: int) -> Array:
        return batched.over_columns(
            lambda vt: self._pull_back(self._hessian.apply(self._push_forward(vt))), v, chunk
        )

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
        omega = omega.T.reshape(-1, *c.shape)
        own = self.pull_back_root(omega, chunk)
        return comm.allgather(own, [int(part.stop - part.start) for part in parts]).T

    @batched.one_blas_thread()
    def pull_back_root(self, w: Array, chunk: int | None = None) -> Array:
        """(A^T w)^T, (columns, N), for w (columns, outputs, n) and A = (I - r r^T) diag(c) J.

        Args:
            w: rows of A are (output, sample).
            chunk: columns that go through together; as many as the memory allows by default.
        """
        c, chunk = self._hessian.c, chunk or self._chunk()
        own = namespace(c).empty((len(w), self.n), self.dtype)
        for i in range(0, len(own), chunk):
            own[i : i + chunk] = self._pull_back(c * self._hessian.project(w[i : i + chunk]))
        return own

    def _push_forward(self, vt: Array) -> Array:
        """J v in the last pre-activations, (columns, outputs, n), for v^T (columns, N)."""
        xp = namespace(vt)
        columns = len(vt)
        start, tangent = 0, None
        for layer in self.layers:
            width, inputs = len(layer.weight), layer.inputs
            pushed = None if tangent is None else layer.weight @ tangent
            if layer.trained:
                weight = vt[:, start : start + width * inputs].reshape(columns, width, inputs)
                start += width * inputs
                if layer.bias:
                    bias = vt[:, start : start + width, None]
                    start += width
                    weight = xp.concatenate([weight, bias], axis=2)
                tangent = weight.reshape(columns * width, -1) @ layer.features
                tangent = tangent.reshape(columns, width, -1)
                if pushed is not None:
                    tangent += pushed
            else:
                tangent = pushed
            assert tangent is not None  # the first layer is trained
            if layer.derivative is not None:
                tangent *= layer.derivative
        assert tangent is not None
        return tangent

    def _pull_back(self, e: Array) -> Array:
        """(J^T e)^T, (columns, N), for e (columns, outputs, n) in the last pre-activations."""
        columns = e.shape[0]
        stop = self.n
        out = namespace(e).empty((columns, stop), e.dtype)
        for layer, below in zip(self.layers[::-1], [*self.layers[-2::-1], None], strict=True):
            width, inputs = len(layer.weight), layer.inputs
            if layer.trained:
                gradient = e.reshape(columns * width, -1) @ layer.features.T
                gradient = gradient.reshape(columns, width, -1)
                if layer.bias:
                    out[:, stop - width : stop] = gradient[:, :, inputs]
                    stop -= width
                out[:, stop - width * inputs : stop] = gradient[:, :, :inputs].reshape(columns, -1)
                stop -= width * inputs
            if below is not None:
                e = layer.weight.T @ e
                e *= below.derivative
        return out


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
        units = sum(len(layer.weight) for layer in layers if layer.trained)
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
        wt = namespace(w).ascontiguousarray(w.T).reshape(-1, *self._hessian.c.shape)
        return self._access.pull_back_root(wt).T


def _parameter_maps(layers: list[Any]) -> tuple[Any, Any]:
    """feature_of and unit_of, (N,): row of the stacked features and unit of every parameter."""
    features, units = [], []
    first_feature = first_unit = 0
    for layer in layers:
        width, inputs = len(layer.weight), layer.inputs
        features.append(first_feature + np.tile(np.arange(inputs), width))
        units.append(first_unit + np.repeat(np.arange(width), inputs))
        if layer.bias:
            features.append(np.full(width, first_feature + inputs))
            units.append(first_unit + np.arange(width))
        first_feature += len(layer.features)
        first_unit += width * layer.trained
    return np.concatenate(features), np.concatenate(units)
