"""Linear layers anywhere in a model, which every sample goes through once: their units' root."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import as_array
from gpu_hodlr.devices import Array, check_memory, move, namespace
from gpu_hodlr.distributed import ALONE, Communicator, shares
from gpu_hodlr.eigenbasis import Rotated, rotated_units
from gpu_hodlr.errors import UnsupportedLayerError
from gpu_hodlr.networks.by_layers import ByLayers
from gpu_hodlr.networks.derivatives import FAILURES, allowed, random
from gpu_hodlr.networks.functional import Functional
from gpu_hodlr.networks.model import Chosen, Network, reads_model
from gpu_hodlr.networks.modules import check_plain, torch_class
from gpu_hodlr.networks.unit_gram import RootGram
from gpu_hodlr.networks.unit_products import UnitProducts
from gpu_hodlr.operators import Dual

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.networks.data import Batch
    from gpu_hodlr.networks.problem import Problem


@dataclass(frozen=True)
class UnitInputs:
    """A Linear layer's inputs at the given samples.

    Attributes:
        features: (f, n): the d_in inputs where the weight is trained, and a last row of ones where
            the bias is.
        width: units.
        bias: whether the bias is trained.
    """

    features: Array
    width: int
    bias: bool

    @property
    def inputs(self) -> int:
        """Trained columns of the weight: d_in or 0."""
        return len(self.features) - self.bias

    def of(self, samples: slice) -> UnitInputs:
        """The same at some of the samples."""
        return replace(self, features=self.features[:, samples])


class UnitRoot(ByLayers):
    """K = A^T A, where row (k, r) of A is C_u,r,k x_k for the parameters of unit u.

    C_r,k (units,) is the derivative of row r of the root of sample k's loss in the units'
    pre-activations: of any loss, and whatever the model does between its layers. The model is read
    once and not kept.

    Args:
        layers: their inputs.
        root: (n, rows, units) C.
    """

    gram: RootGram

    def __init__(self, layers: Sequence[UnitInputs], root: Array) -> None:
        xp = namespace(root)
        gram = RootGram(xp.ascontiguousarray(root.transpose(2, 1, 0)))
        super().__init__(layers, gram, len(root), root)
        self._take(UnitProducts(layers, root))

    def _take(self, units: UnitProducts[UnitInputs]) -> None:
        self._units, self.product_cost = units, units.product_cost

    def on(self, device: str) -> UnitRoot:
        """The same with its arrays there."""
        layers = [replace(x, features=move(x.features, device)) for x in self.layers]
        return UnitRoot(layers, move(self.units_root, device))

    def summand(self, index: int, count: int) -> UnitRoot:
        """What a share of the samples contributes to K; for products."""
        samples = shares(self.num_samples, count)[index]
        part = copy.copy(self)
        part._take(self._units.of(samples))
        part.num_samples = samples.stop - samples.start
        part.has_entries = part.has_eigenbasis = False
        return part

    @property
    def layers(self) -> Sequence[UnitInputs]:
        """Their inputs."""
        return self._units.layers

    def eigenbasis(self) -> Rotated:
        """K in the Kronecker-factored eigenbasis of its layers (George et al., NeurIPS 2018).

        Raises:
            MemoryEstimateError: a second root does not fit.
        """
        return rotated_units(self.layers, self.gram.root)

    @property
    def units_root(self) -> Array:
        """C (n, rows, units)."""
        return self._units.root

    def dual(self) -> Dual:
        """Of A, never stored."""
        return _Dual(self)

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array:
        """A^T Omega / sqrt(num)."""
        n, rows, _ = self.units_root.shape
        normal = batched.normal_source((seed,), self.device)
        omega = normal((n * rows, num), self.dtype)
        omega /= self.dtype.type(num**0.5)
        return self.pull_back(omega.reshape(n, rows, num))

    def _products(self, columns: int) -> UnitProducts[UnitInputs]:
        return self._units

    def pull_back(self, w: Array) -> Array:
        """A^T w, (N, columns), for w (n, rows, columns)."""
        out = namespace(w).empty((self.n, w.shape[2]), w.dtype)
        self._units.pull_back(w, out, self._units.chunk())
        return out


class _Dual(Dual):
    """A A^T of (sample, row) rows: a sum over layers of (x_k . x_l) (C_kr . C_ls), in double.

    Args:
        access: has A by its layers.
    """

    def __init__(self, access: UnitRoot) -> None:
        n, rows, units = access.units_root.shape
        super().__init__(n * rows, 2.0 * units * float(n * rows) ** 2)
        self._access = access

    @batched.one_blas_thread()
    def gram(self, comm: Communicator = ALONE.comm) -> Array:
        """See `Dual`: each rank forms the rows of some samples."""
        access = self._access
        n, rows, _ = access.units_root.shape
        xp, parts, first = namespace(access.units_root), shares(n, comm.size), 0
        mine = parts[comm.rank]
        own = xp.zeros((mine.stop - mine.start, rows, n, rows), np.float64)
        for layer in access.layers:
            x = layer.features.astype(np.float64)
            e = access.units_root[:, :, first : first + layer.width].astype(np.float64)
            flat = e.reshape(n * rows, -1)
            product = flat[mine.start * rows : mine.stop * rows] @ flat.T
            own += product.reshape(own.shape) * (x[:, mine].T @ x)[:, None, :, None]
            first += layer.width
        widths = [rows * (part.stop - part.start) for part in parts]
        return comm.allgather(own.reshape(-1, n * rows), widths)

    def combine(self, w: Array) -> Array:
        """See `Dual`."""
        access = self._access
        n, rows, _ = access.units_root.shape
        return access.pull_back(w.reshape(n, rows, -1))


@dataclass(frozen=True)
class TrainedLinear:
    """A Linear layer of a model, and which of its parameters the matrix is of."""

    name: str
    module: torch.nn.Linear
    weight: bool
    bias: bool


@reads_model
def trained_linear(chosen: Chosen) -> list[TrainedLinear] | None:
    """The layers, where all parameters chosen are weights and biases of Linear layers, each once.

    In the order of the parameters; None where there are others.
    """
    import torch

    if not chosen.module:
        return None
    model: Any = chosen.model
    parts: dict[str, list[str]] = {}
    for name in chosen.named:
        place, _, key = name.rpartition(".")
        parts.setdefault(place, []).append(key)
    every = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    tied = any(every.count(id(p)) > 1 for p in chosen.named.values())
    if tied or [k for keys in parts.values() for k in keys] != [
        name.rpartition(".")[2] for name in chosen.named
    ]:
        return None
    found = []
    for place, keys in parts.items():
        module = model.get_submodule(place)
        kind = torch_class(module, (torch.nn.Linear,))
        if kind is None or keys not in (["weight"], ["bias"], ["weight", "bias"]):
            return None
        try:
            check_plain(module, place)
        except UnsupportedLayerError:
            return None
        found.append(TrainedLinear(place or "model", module, "weight" in keys, "bias" in keys))
    return found


def unit_root_bytes(functional: Functional, linear: Sequence[TrainedLinear]) -> float:
    """Of the root, twice, and the layers' inputs."""
    problem = functional.problem
    units = sum(layer.module.out_features for layer in linear)
    inputs = sum(layer.module.in_features + 1 for layer in linear)
    numbers = 2 * problem.root_size * units + 2 * inputs
    return float(problem.num_samples * numbers * functional.dtype.itemsize)


def unit_root(functional: Functional, linear: Sequence[TrainedLinear]) -> UnitRoot:
    """The way by units, of layers that are called once with a vector of every sample.

    That is told by the tensors, not by the model's code: the layers' inputs and the derivatives in
    what they return make J^T u of random u, as the model as a whole does.

    Args:
        functional: products of the same matrix.
        linear: see `trained_linear`.

    Raises:
        UnsupportedLayerError: a layer is not, or there is more to the model than its layers.
        MemoryEstimateError: the root does not fit.
    """
    import torch

    problem = functional.problem
    metric = problem.metric
    assert metric is not None  # the Hessian has no root
    check_memory(
        int(unit_root_bytes(functional, linear)), "the units' root",
        "the number of samples, or take entries='none'", functional.device,
    )  # fmt: skip
    units = sum(layer.module.out_features for layer in linear)
    inputs: list[list[torch.Tensor]] = [[] for _ in linear]
    root: list[torch.Tensor] = []
    with problem.network.plain():
        for piece in problem.pieces():
            size = metric.size(problem.outputs(piece), piece)
            for part in piece.pieces(max(1, problem.columns(1) // size)):
                found = recorded(problem, part, linear)
                for kept, x in zip(inputs, found.inputs, strict=True):
                    kept.append(x)
                S = metric.root(found.outputs.detach(), part) * problem.scale**0.5
                rows = S.new_zeros((part.size, problem.root_size, units))
                for r in range(size):
                    rows[:, r] = torch.cat(found.slopes(S[:, r]), dim=1)
                root.append(rows)
    return UnitRoot(
        [
            UnitInputs(_features(torch.cat(x), layer), layer.module.out_features, layer.bias)
            for x, layer in zip(inputs, linear, strict=True)
        ],
        as_array(torch.cat(root), "root"),
    )


def _features(x: torch.Tensor, layer: TrainedLinear) -> Array:
    """(f, n) of inputs (n, d_in)."""
    import torch

    parts = [x] if layer.weight else [x[:, :0]]
    if layer.bias:
        parts.append(torch.ones_like(x[:, :1]))
    return as_array(torch.cat(parts, dim=1).T.contiguous(), "features")


@dataclass(frozen=True)
class Recorded:
    """What went through the layers of a model.

    Attributes:
        inputs: (n, d_in) of every layer.
        added: (n, d_out) zeros that were added to what it returned.
        outputs: of the model.
    """

    inputs: list[torch.Tensor]
    added: list[torch.Tensor]
    outputs: torch.Tensor

    def slopes(self, e: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(n, d_out) of every layer: e^T times the outputs' derivatives."""
        import torch

        return torch.autograd.grad(
            self.outputs, self.added, e, retain_graph=True, materialize_grads=True
        )


def recorded(problem: Problem, batch: Batch, linear: Sequence[TrainedLinear]) -> Recorded:
    """Call the model, and hold what went through its layers to its derivatives.

    Raises:
        UnsupportedLayerError: the layers' inputs and slopes do not make J^T.
    """
    found = record(problem.network, batch, linear)
    if not _makes_jacobian(found, problem, batch, linear):
        raise UnsupportedLayerError(
            "entries='khatri-rao': the model computes more of its Linear layers' parameters than "
            "these layers do, or mixes samples"
        )
    return found


def record(network: Network, batch: Batch, linear: Sequence[TrainedLinear]) -> Recorded:
    """Call the model; within `Network.plain`.

    Raises:
        UnsupportedLayerError: a layer is not called once with a vector of every sample.
    """
    import torch

    calls: list[list[tuple[Any, torch.Tensor]]] = [[] for _ in linear]

    def after(own: list[tuple[Any, torch.Tensor]]) -> Any:
        def add(module: torch.nn.Module, args: Any, result: torch.Tensor) -> torch.Tensor:
            zeros = torch.zeros_like(result, requires_grad=True)
            own.append((args[0].detach().clone() if args else None, zeros))
            return result + zeros

        return add

    handles = [
        layer.module.register_forward_hook(after(own))
        for layer, own in zip(linear, calls, strict=True)
    ]
    try:
        outputs = network(network.theta, batch.inputs)
    finally:
        for handle in handles:
            handle.remove()
    for layer, own in zip(linear, calls, strict=True):
        said = f"entries='khatri-rao': layer {layer.name} (Linear) must be called once, "
        if len(own) != 1:
            raise UnsupportedLayerError(f"{said}and is {len(own)} times")
        x = own[0][0]
        if x is None or x.ndim != 2 or len(x) != batch.size:
            got = "by a keyword" if x is None else f"with {tuple(x.shape)} of {batch.size} samples"
            raise UnsupportedLayerError(f"{said}with a vector of every sample, and is {got}")
    inputs, added = zip(*(own[0] for own in calls), strict=True)
    return Recorded(list(inputs), list(added), outputs)


def _makes_jacobian(
    found: Recorded, problem: Problem, batch: Batch, linear: Sequence[TrainedLinear]
) -> bool:
    """Whether J^T u is the same by the layers as by the model, for random u, sample by sample."""
    import torch

    outputs = found.outputs
    u = random(outputs.shape, outputs, 0)
    try:
        slopes = found.slopes(u)
    except FAILURES:  # of torch: no layer has to do with the outputs, or all is computed again
        return False
    share = random((batch.size,), outputs, 1)  # of every sample: layers may see them in any order
    shared = found.slopes(share.reshape(-1, *[1] * (u.ndim - 1)) * u)
    for whole, part in zip(slopes, shared, strict=True):
        if not (part - share[:, None] * whole).norm() <= allowed(outputs) * whole.norm():
            return False
    parts = []
    for layer, x, slope in zip(linear, found.inputs, slopes, strict=True):
        parts += [slope.T @ x] if layer.weight else []
        parts += [slope.sum(dim=0)] if layer.bias else []
    got = torch.cat([part.reshape(-1) for part in parts])
    _, _, pull = problem.derivatives.linearized(problem.network, batch)
    want = pull(u[None])[0]
    return bool((got - want).norm() <= allowed(outputs) * want.norm())
