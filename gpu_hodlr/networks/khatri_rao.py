"""The generalized Gauss-Newton matrix of a torch network."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import check_dtype
from gpu_hodlr.devices import AnyArray, Array, is_torch, move, namespace, resolve_device
from gpu_hodlr.distributed import ALONE, Communicator, shares
from gpu_hodlr.eigenbasis import Rotated, rotated
from gpu_hodlr.errors import DtypeError
from gpu_hodlr.networks.layers import evaluate
from gpu_hodlr.networks.unit_gram import UnitGram
from gpu_hodlr.operators import Operator, Runs

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.devices import AnyDevice, AnyDtype


class GGNOperator(Operator):
    """K = J^T H J of a network of Linear layers and elementwise activations.

    J is the Jacobian of all outputs in the parameters that require grad, in the order of
    `torch.nn.utils.parameters_to_vector`; frozen ones are constants. H is the Hessian of the loss
    in the outputs, with the loss's reduction ("none" counts like "sum"). Entry of parameters i, j,
    weights or biases of units u, v with inputs x: K_ij = sum_k x_i,k x_j,k G_uv,k, a Khatri-Rao
    product (Schraudolph, Neural Computation 14 (2002); Martens, JMLR 21 (2020), section 8).
    rank(K) <= n * outputs.

    Args:
        model: torch.nn.Sequential, nested or not; it is read once and not kept.
        loss: "mse" or "cross_entropy", or torch's MSELoss or CrossEntropyLoss (its reduction,
            ignore_index, class weights and label smoothing count). One's own losses and layers are
            refused, unless they are subclasses that change nothing.
        inputs: (n, d_in), torch or NumPy.
        targets: (n, outputs) for mse; (n,) class indices or (n, outputs) probabilities.
        dtype: float32 or float64, in which everything is computed; the model's by default. It must
            be given for a model in half precision.
        device: "cpu" or "cuda", or a torch.device; the model's by default.
        reduction: "mean", "sum" or "none"; the loss's, or "mean", by default.

    Raises:
        UnsupportedLayerError: a layer this matrix is not known for, by name.
        ShapeError, DtypeError, ArgumentError: inputs, targets, loss or reduction do not fit; no
            parameter requires grad.
        MemoryEstimateError: the hidden units' Jacobian does not fit.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1)).double()
        >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> op = gh.GGNOperator(model, "mse", inputs, targets=inputs[:, :1])
        >>> op.to_dense()  # of a linear model: the sum over samples of 2 / n [x; 1] [x; 1]^T
        array([[1., 0., 1.],
               [0., 4., 2.],
               [1., 2., 2.]])
        >>> op.rank_bound
        2
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: str | torch.nn.Module,
        inputs: AnyArray,
        targets: AnyArray,
        dtype: AnyDtype | None = None,
        device: AnyDevice | None = None,
        *,
        reduction: str | None = None,
    ) -> None:
        first = next(iter(getattr(model, "parameters", lambda: ())()), None)
        if dtype is None:
            dtype = np.dtype(np.float64) if first is None else first.dtype
            if first is not None and first.dtype.itemsize == 2:
                raise DtypeError(
                    f"dtype must be float32 or float64 for a model in {first.dtype}; "
                    "dtype=np.float32 computes in float32"
                )
        kind = check_dtype(dtype, "dtype")
        device = resolve_device(device, *(x for x in (first, inputs) if is_torch(x)))
        layers, hessian = evaluate(model, loss, reduction, inputs, targets, kind)
        self._layers = [layer.on(device) for layer in layers]
        self._hessian = hessian.on(device)
        widths = [layer.weight.shape[0] for layer in self._layers]
        super().__init__(
            sum(w * len(layer.features) for w, layer in zip(widths, self._layers, strict=True)),
            kind,
            device,
        )
        self.has_eigenbasis = True
        self.num_outputs, self.num_samples = self._hessian.c.shape
        self.rank_bound = self.num_outputs * self.num_samples
        self._gram = UnitGram(self._layers, self._hessian)
        self._features = namespace(self._hessian.c).concatenate([a.features for a in self._layers])
        self._feature_of, self._unit_of = _parameter_maps(self._layers)
        self.product_cost = 4.0 * self.num_samples * self.shape[0]
        self.entry_cost = 2.0 * self.num_samples

    def _move_data(self, device: str) -> None:
        self._layers = [layer.on(device) for layer in self._layers]
        self._hessian = self._hessian.on(device)
        self._gram = UnitGram(self._layers, self._hessian)
        self._features = move(self._features, device)

    def summand(self, index: int, count: int) -> GGNOperator:
        """What a share of the samples contributes to K; for products.

        Example:
            >>> import torch
            >>> x = torch.arange(8.0).reshape(4, 2)
            >>> op = gh.GGNOperator(torch.nn.Sequential(torch.nn.Linear(2, 1)), "mse", x, x[:, :1])
            >>> v = torch.ones(3)
            >>> torch.allclose(sum(op.summand(i, 2) @ v for i in range(2)), op @ v)
            True
        """
        samples = shares(self.num_samples, count)[index]
        part = copy.copy(self)
        part._layers = [layer.of(samples) for layer in self._layers]
        part._hessian = self._hessian.of(samples)
        part.num_samples = samples.stop - samples.start
        part.has_entries = part.has_eigenbasis = False
        return part

    def runs(self) -> Runs:
        """Parameters unit by unit, a unit's bias beside its weights.

        Example:
            >>> import torch
            >>> x = torch.arange(8.0).reshape(4, 2)
            >>> op = gh.GGNOperator(torch.nn.Sequential(torch.nn.Linear(2, 2)), "mse", x, x)
            >>> op.runs().permutation  # a unit's two weights and its bias, unit by unit
            array([0, 1, 4, 2, 3, 5])
        """
        permutation = np.lexsort((self._feature_of, self._unit_of))
        units = self._unit_of[permutation]
        return Runs(permutation, np.nonzero(np.diff(units, prepend=-1))[0])

    def eigenbasis(self) -> Rotated:
        """K in the Kronecker-factored eigenbasis of its layers (George et al., NeurIPS 2018).

        Raises:
            MemoryEstimateError: the network's Jacobian in it does not fit.

        Example:
            >>> import torch
            >>> x = torch.arange(8.0).reshape(4, 2)
            >>> op = gh.GGNOperator(torch.nn.Sequential(torch.nn.Linear(2, 2)), "mse", x, x)
            >>> op.eigenbasis().basis.n  # of one layer under "mse" nothing is left off the diagonal
            6
        """
        return rotated(self._layers, self._hessian, self._gram.down)

    def _blocks(self, rows: Array, cols: Array) -> Array:
        return batched.khatri_rao_entries(
            self._features, self._feature_of, self._unit_of, self._gram, rows, cols
        )

    @batched.one_blas_thread()
    def _diagonal(self) -> Array:
        xp = namespace(self._features)
        units = np.arange(self._gram.num_hidden + self._gram.num_outputs)
        by_feature_and_unit = (self._features**2) @ self._gram.pairs(units, units).T
        return by_feature_and_unit[xp.asarray(self._feature_of), xp.asarray(self._unit_of)]

    def _chunk(self) -> int:
        widest = max(layer.weight.shape[0] for layer in self._layers)
        column = widest * self.num_samples * self.dtype.itemsize
        return batched.columns_at_once(self._features, max(column, 1))

    def _matmat(self, v: Array) -> Array:
        """One forward-mode and one backward pass for many columns: about 4 N n a column."""
        return self._in_chunks(v, self._chunk())

    def _matmat_by_blocks(self, v: Array, width: int) -> Array:
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

        Example:
            >>> import torch
            >>> x = torch.arange(8.0).reshape(4, 2)
            >>> op = gh.GGNOperator(torch.nn.Sequential(torch.nn.Linear(2, 1)), "mse", x, x[:, :1])
            >>> op.gram_vectors(16, seed=0).shape
            (3, 16)
        """
        c = self._hessian.c
        chunk = min(comm.share(self._chunk()))  # GPUs may have different free memory
        edges = np.minimum(np.arange(0, num + chunk, chunk), num)
        parts = [slice(*edges[[p.start, p.stop]]) for p in shares(len(edges) - 1, comm.size)]
        normal = batched.normal_source((seed,), self.device)
        omega = normal((c.size, num), self.dtype, parts[comm.rank])
        omega /= num**0.5
        omega = omega.T.reshape(-1, *c.shape)
        own = namespace(c).empty((len(omega), self.shape[0]), self.dtype)
        with batched.one_blas_thread():
            for i in range(0, len(own), chunk):
                part = c * self._hessian.project(omega[i : i + chunk])
                own[i : i + chunk] = self._pull_back(part)
        return comm.allgather(own, [int(part.stop - part.start) for part in parts]).T

    def _push_forward(self, vt: Array) -> Array:
        """J v in the last pre-activations, (columns, outputs, n), for v^T (columns, N)."""
        xp = namespace(vt)
        columns = len(vt)
        start, tangent = 0, None
        for layer in self._layers:
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
        stop = self.shape[0]
        out = namespace(e).empty((columns, stop), e.dtype)
        for layer, below in zip(self._layers[::-1], [*self._layers[-2::-1], None], strict=True):
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
