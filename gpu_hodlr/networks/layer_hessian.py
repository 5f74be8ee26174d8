"""Products with the exact Hessian of Linear layers and activations, by their own formulas."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from gpu_hodlr import batched
from gpu_hodlr.devices import Array, device_of, move, namespace
from gpu_hodlr.distributed import shares
from gpu_hodlr.networks.access import Access, chunk_of_blocks
from gpu_hodlr.networks.functional import Functional
from gpu_hodlr.networks.layer_products import pull_back, push_forward
from gpu_hodlr.networks.layers import Evaluated, Layer
from gpu_hodlr.networks.output_hessian import OutputHessian
from gpu_hodlr.operators import Runs

_COLUMN_BYTES = 1 << 22  # of one column's tangents in all units: more samples go one after another


@dataclass(frozen=True)
class LayerTerms:
    """H v of a network h_l = phi(z_l), z_l = W_l h_l-1 + b_l, by Pearlmutter's R-operator.

    With tangents R z_l = V_l h_l-1 + W_l R h_l-1 and cotangents e_l = dL / dz_l of the pre-
    activations, rows of layer l are R e_l h_l-1^T + e_l R h_l-1^T, where R e of the last layer is
    the loss's Hessian times R z, and below R e_l-1 = phi' (W_l^T R e_l + V_l^T e_l) + phi'' W_l^T
    e_l R z_l-1 (Pearlmutter, Neural Computation 6 (1994)).

    Attributes:
        layers: of the network.
        hessian: of the loss in the last pre-activations.
        cotangents: e (d_out, n) of every layer.
        bends: phi'' dL / dh (d_out, n) of every layer; None where phi is piecewise linear.
    """

    layers: list[Layer]
    hessian: OutputHessian
    cotangents: list[Array]
    bends: list[Array | None]

    @classmethod
    def of_network(cls, found: Evaluated) -> LayerTerms:
        """Of a network with second derivatives."""
        gradient, slope = found.gradient, found.slope
        cotangents: list[Array] = []
        bends: list[Array | None] = []
        with batched.one_blas_thread():
            for layer, bend in zip(found.layers[::-1], found.bends[::-1], strict=True):
                bends.insert(0, None if bend is None else bend * gradient)
                slope = slope if layer.derivative is None else layer.derivative
                cotangents.insert(0, gradient if slope is None else gradient * slope)
                gradient = layer.weight.T @ cotangents[0]
        return cls(found.layers, found.hessian, cotangents, bends)

    def of(self, samples: slice) -> LayerTerms:
        """The same at some of the samples."""
        return LayerTerms(
            [layer.of(samples) for layer in self.layers],
            self.hessian.of(samples),
            [e[:, samples] for e in self.cotangents],
            [None if x is None else x[:, samples] for x in self.bends],
        )

    def on(self, device: str) -> LayerTerms:
        """The same with its arrays on a device."""
        return LayerTerms(
            [layer.on(device) for layer in self.layers],
            self.hessian.on(device),
            [move(e, device) for e in self.cotangents],
            [None if x is None else move(x, device) for x in self.bends],
        )

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.cotangents[0].shape[1])

    def room(self, columns: int) -> list[tuple[Array, Array, Array]]:
        """Where `multiply` works, (units, columns, n) thrice a layer.

        In one piece: new memory is slow, and of small pieces given back every product has it new.
        """
        e, start, parts = self.cotangents[0], 0, []
        widths = [layer.width for layer in self.layers]
        units = 2 * sum(widths) + max(widths)
        every = namespace(e).empty((units, columns, self.num_samples), e.dtype)
        for layer in self.layers:
            split, stop = start + layer.width, start + 2 * layer.width
            parts.append((every[start:split], every[split:stop], every[-layer.width :]))
            start = stop
        return parts

    def multiply(self, v: Array, out: Array, room: list[tuple[Array, Array, Array]]) -> None:
        """Write H v, (N, columns), for v alike."""
        xp = namespace(v)
        self._push_forward(v, room)
        stop, columns = len(v), v.shape[1]
        e, bent, _ = room[-1]
        self.hessian.apply(e)
        if self.bends[-1] is not None:
            e += bent
        for i in range(len(self.layers))[::-1]:
            layer, cotangent = self.layers[i], self.cotangents[i]
            width, inputs, start = layer.width, layer.inputs, stop - self._rows(i)
            split = start + width * inputs
            pull_back(layer, e, out[start:stop])
            if not i:
                break
            h, bent, spare = room[i - 1]
            if inputs:
                made = cotangent @ h.reshape(inputs * columns, -1).T
                out[start:split] += made.reshape(-1, columns)
            # The tangent of the layer's inputs is needed no more: its place is their cotangent's.
            xp.matmul(layer.weight.T, e.reshape(width, -1), out=h.reshape(len(h), -1))
            if inputs:
                given = v[start:split].reshape(width, inputs * columns)
                xp.matmul(given.T, cotangent, out=spare.reshape(inputs * columns, -1))
                h += spare
            slope = self.layers[i - 1].derivative
            assert slope is not None  # of hidden layers
            h *= slope[:, None]
            if self.bends[i - 1] is not None:
                h += bent
            e, stop = h, start

    def _rows(self, i: int) -> int:
        return self.layers[i].width * len(self.layers[i].features)

    def _push_forward(self, v: Array, room: list[tuple[Array, Array, Array]]) -> None:
        """Write phi' R z and phi'' dL / dh R z of every layer, (units, columns, n)."""
        xp = namespace(v)
        start, below = 0, None
        for i, (layer, (h, z, spare), bend) in enumerate(
            zip(self.layers, room, self.bends, strict=True)
        ):
            width, stop = layer.width, start + self._rows(i)
            push_forward(layer, v[start:stop], z)
            if below is not None:
                flat = below.reshape(len(below), -1)
                xp.matmul(layer.weight, flat, out=spare.reshape(width, -1))
                z += spare
            if layer.derivative is None:
                h[:] = z
            else:
                xp.multiply(z, layer.derivative[:, None], out=h)
            if bend is not None:
                z *= bend[:, None]
            below, start = h, stop


class LayerHessian(Access):
    """The exact Hessian by its layers: 4 n operations a column and first layer's weight, then 12 n.

    Arrays alone: the network itself is where it was.

    Args:
        functional: products of the same matrix by torch.
        terms: of the layers.
    """

    name = "none"

    def __init__(self, functional: Functional, terms: LayerTerms) -> None:
        like = terms.cotangents[0]
        super().__init__(functional.n, like.dtype, device_of(like))
        self._functional, self._terms = functional, terms
        self.product_cost = functional.product_cost

    def on(self, device: str) -> LayerHessian:
        """The same with its arrays there."""
        return LayerHessian(self._functional, self._terms.on(device))

    def summand(self, index: int, count: int) -> LayerHessian:
        """Of a share of the samples."""
        part = copy.copy(self)
        part._terms = self._terms.of(shares(self._terms.num_samples, count)[index])
        return part

    def runs(self) -> Runs:
        """Unit by unit."""
        return self._functional.runs()

    @property
    def has_diagonal(self) -> bool:
        """It costs N products."""
        return False

    def diagonal(self) -> Array:
        """By products with unit vectors."""
        xp = namespace(self._terms.cotangents[0])
        found, most = xp.empty(self.n, self.dtype), self._chunk()
        for start in range(0, self.n, most):
            columns = min(most, self.n - start)
            made = self.matmat(xp.eye(self.n, columns, -start, self.dtype))
            found[start : start + columns] = made[start : start + columns].diagonal()
        return found

    def matmat(self, v: Array) -> Array:
        """H v, chunks of columns at a time."""
        return self._in_chunks(v, self._chunk())

    def matmat_by_blocks(self, v: Array, width: int) -> Array:
        """In chunks that cut no block."""
        return self._in_chunks(v, chunk_of_blocks(width, self._chunk()))

    def _in_chunks(self, v: Array, chunk: int) -> Array:
        out = namespace(v).empty(v.shape, v.dtype)
        first, *others = self._pieces()

        def work(columns: slice) -> None:
            mine, made = v[:, columns], out[:, columns]
            first.multiply(mine, made, first.room(mine.shape[1]))
            for piece in others:
                more = namespace(v).empty(mine.shape, v.dtype)
                piece.multiply(mine, more, piece.room(mine.shape[1]))
                made += more

        batched.over_columns(work, v, chunk)
        return out

    @property
    def _sample_bytes(self) -> int:
        """Of one column's tangents in the units."""
        return sum(layer.width for layer in self._terms.layers) * self.dtype.itemsize

    def _pieces(self) -> Iterator[LayerTerms]:
        """Samples that go through together."""
        step, n = max(1, _COLUMN_BYTES // self._sample_bytes), self._terms.num_samples
        if n <= step:
            yield self._terms
            return
        for start in range(0, n, step):
            yield self._terms.of(slice(start, min(start + step, n)))

    def _chunk(self) -> int:
        column = self._sample_bytes * self._terms.num_samples
        return batched.columns_at_once(
            self._terms.cotangents[0], max(1, min(column, _COLUMN_BYTES))
        )
