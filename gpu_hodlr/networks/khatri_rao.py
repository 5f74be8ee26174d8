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
from gpu_hodlr.networks.unit_gram import UnitGram
from gpu_hodlr.operators import Runs

# Columns from which on a GEMM a unit, which reads vectors as they lie, is faster than one for all
# units, which needs them transposed; measured, of 785 inputs at 256 samples.
_BY_UNIT = 16


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
        out = namespace(v).empty(v.shape, v.dtype)

        def work(columns: slice) -> None:
            self._pull_back(self._hessian.apply(self._push_forward(v[:, columns])), out[:, columns])

        batched.over_columns(work, v, chunk)
        return out

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array:
        """X = A^T Omega / sqrt(num) for K = A^T A and Gaussian Omega: one backward pass.

        Every rank draws and takes back some chunks of Omega's columns: the same chunks for every
        number of ranks, and so the same bits.
        """
        c = self._hessian.c
        xp = namespace(c)
        chunk = min(comm.share(self._chunk()))  # GPUs may have different free memory
        edges = np.minimum(np.arange(0, num + chunk, chunk), num)
        parts = [slice(*edges[[p.start, p.stop]]) for p in shares(len(edges) - 1, comm.size)]
        normal = batched.normal_source((seed,), self.device)
        omega = normal((c.size, num), self.dtype, parts[comm.rank])
        omega /= num**0.5
        own = xp.empty((omega.shape[1], self.n), self.dtype)
        with batched.one_blas_thread():
            for i in range(0, len(own), chunk):
                z = omega[:, i : i + chunk].reshape(*c.shape, -1).swapaxes(1, 2)
                e = c[:, None] * self._hessian.project(xp.ascontiguousarray(z))
                self._pull_back(e, own[i : i + chunk].T)
        return comm.allgather(own, [int(part.stop - part.start) for part in parts]).T

    def _push_forward(self, v: Array) -> Array:
        """J v in the last pre-activations, (outputs, columns, n), for v (N, columns)."""
        xp = namespace(v)
        columns, start, tangent = v.shape[1], 0, None
        for layer in self.layers:
            width, inputs = len(layer.weight), layer.inputs
            if tangent is not None:
                tangent = layer.weight @ tangent.reshape(len(tangent), -1)
                tangent = tangent.reshape(width, columns, -1)
            if inputs:
                weight = v[start : start + width * inputs].reshape(width, inputs, columns)
                made = _transposed_times(weight, layer.features[:inputs])
                tangent = made if tangent is None else tangent + made
                start += width * inputs
            if layer.bias:
                bias = v[start : start + width, :, None]
                if tangent is None:
                    tangent = xp.zeros((width, columns, self.num_samples), self.dtype)
                tangent += bias
                start += width
            assert tangent is not None  # the first layer is trained
            if layer.derivative is not None:
                tangent *= layer.derivative[:, None]
        assert tangent is not None
        return tangent

    def _pull_back(self, e: Array, out: Array) -> None:
        """Write J^T e to (N, columns), for e (outputs, columns, n) in the last pre-activations."""
        columns = e.shape[1]
        stop = self.n
        for layer, below in zip(self.layers[::-1], [*self.layers[-2::-1], None], strict=True):
            width, inputs = len(layer.weight), layer.inputs
            flat = e.reshape(width * columns, -1)
            if layer.bias:
                ones = layer.features[inputs]
                out[stop - width : stop] = (flat @ ones).reshape(width, columns)
                stop -= width
            if inputs:
                weight = out[stop - width * inputs : stop].reshape(width, inputs, columns)
                _times_transposed(layer.features[:inputs], e, weight)
                stop -= width * inputs
            if below is not None:
                e = (layer.weight.T @ e.reshape(width, -1)).reshape(-1, columns, e.shape[2])
                e *= below.derivative[:, None]


def _transposed_times(weight: Array, x: Array) -> Array:
    """A unit's V^T X, (w, k, n), of stacks V (w, f, k) and one X (f, n)."""
    width, inputs, columns = weight.shape
    turned = weight.swapaxes(1, 2)
    if columns >= _BY_UNIT:
        return namespace(x).matmul(turned, x)
    return (turned.reshape(-1, inputs) @ x).reshape(width, columns, -1)


def _times_transposed(x: Array, e: Array, out: Array) -> None:
    """A unit's X E^T, (w, f, k), of one X (f, n) and stacks E (w, k, n)."""
    width, columns, n = e.shape
    if columns >= _BY_UNIT:
        namespace(x).matmul(x, e.swapaxes(1, 2), out=out)
    else:
        out[:] = (e.reshape(-1, n) @ x.T).reshape(width, columns, -1).swapaxes(1, 2)


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
