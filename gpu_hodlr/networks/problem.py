"""A network, its data and its loss: read, checked and counted before any heavy work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr.devices import working_bytes
from gpu_hodlr.errors import (
    ArgumentError,
    GpuHodlrError,
    ShapeError,
    UnsupportedLayerError,
)
from gpu_hodlr.networks.data import Batch, Data
from gpu_hodlr.networks.derivatives import Derivatives
from gpu_hodlr.networks.losses import Loss
from gpu_hodlr.networks.metric import Metric
from gpu_hodlr.networks.model import Network

if TYPE_CHECKING:
    import torch

_WORKING_BYTES = 1 << 28  # on the CPU, of what is differentiated together
_ALIKE = {4: 1e-4, 8: 1e-10}  # relative: what another order of the same sums may change
_TRIED = 3  # samples that derivatives are tried with


@dataclass(frozen=True)
class Problem:
    """A network at its data.

    Attributes:
        network: the function of the parameters.
        data: inputs and targets.
        loss: as a sum over samples.
        metric: M of K = J^T M J; None for the Hessian in the parameters.
        scale: what the sum is multiplied by.
        num_samples: n.
        rows: of the root, of all samples; outputs where there is none.
        root_size: of these a sample has, the most there are.
        sample_bytes: what reverse mode keeps of a sample.
        sample_flops: operations of one evaluation at one sample.
        derivatives: how derivatives are computed.
    """

    network: Network
    data: Data
    loss: Loss
    metric: Metric | None
    scale: float
    num_samples: int
    rows: int
    root_size: int
    sample_bytes: int
    sample_flops: float
    derivatives: Derivatives

    @property
    def n(self) -> int:
        """N."""
        return self.network.n

    @property
    def working_bytes(self) -> int:
        """What may be taken by what is differentiated together."""
        if self.network.place.type == "cpu":
            return _WORKING_BYTES
        return working_bytes("cuda")

    @property
    def together(self) -> int:
        """Samples that are computed together."""
        return max(1, self.working_bytes // 8 // self.sample_bytes)

    def columns(self, samples: int) -> int:
        """Columns that go through so many samples together."""
        # A column's tangents live a layer at a time; what reverse mode keeps bounds them.
        column = samples * self.sample_bytes + 3 * self.n * self.network.theta[0].dtype.itemsize
        return max(1, self.working_bytes // column)

    def pieces(self) -> Iterator[Batch]:
        """This rank's samples, as many together as fit; with what the metric draws for them."""
        for batch in self.data:
            if self.metric is not None and self.metric.draws:
                batch = self.metric.drawn(self.outputs(batch), batch)
            mine = self.data.share_of(batch)
            if mine.size:
                yield from mine.pieces(self.together)

    def outputs(self, batch: Batch) -> torch.Tensor:
        """The predictions of a batch, without derivatives; within `Network.plain`."""
        import torch

        with torch.no_grad():
            parts = [
                self.network(self.network.theta, piece.inputs)
                for piece in batch.pieces(self.together)
            ]
            return torch.cat(parts)

    def share(self, index: int, count: int) -> Problem:
        """The same of one of `count` ranks."""
        return replace(self, data=self.data.share(index, count))

    def on(self, place: torch.device) -> Problem:
        """The same, computed elsewhere."""
        return replace(self, network=self.network.on(place), data=self.data.on(place))


def read_problem(
    network: Network,
    data: Data,
    loss: Loss,
    metric: Metric | None,
    num_data: int | None,
    seed: int,
) -> Problem:
    """Check a network, its data and its loss in one pass through the data, and count.

    Raises:
        ArgumentError, ShapeError, DtypeError: outputs or targets do not fit the loss; num_data.
        UnsupportedLayerError: outputs depend on other samples or on chance, or have no derivatives.
    """
    found = Problem(network, data, loss, metric, 1.0, 0, 0, 0, 1, 1.0, Derivatives())
    total, alone = 0.0, False
    with network.plain():
        for batch in data:
            if not found.num_samples:
                found = _measured(found, batch, seed)
            outputs = found.outputs(batch)
            _check_shape(outputs, batch)
            loss.check(outputs, batch.targets)
            if not alone:
                alone = check_samples_alone(network, batch, outputs)
            total += loss.total(outputs, batch.targets)
            own = outputs[0].numel() if metric is None else metric.size(outputs, batch)
            found = replace(
                found,
                num_samples=found.num_samples + batch.size,
                rows=found.rows + batch.size * own,
                root_size=max(found.root_size, own),
            )
    scale = 1.0 / loss.divisor(total)
    if num_data is not None and loss.reduction == "mean":
        scale *= found.num_samples / num_data
    return replace(found, scale=scale)


@contextmanager
def at_first_sample() -> Iterator[None]:
    """The user's code meets new inputs: what it raises is an `ArgumentError`, but for our own."""
    try:
        yield
    except GpuHodlrError:
        raise
    except Exception as e:
        raise ArgumentError(
            f"the model fails at the first sample of the inputs, with {type(e).__name__}: {e}"
        ) from e


def _measured(problem: Problem, batch: Batch, seed: int) -> Problem:
    """With what a sample takes, and how it is differentiated."""
    one, few = batch.of(slice(0, 1)), batch.of(slice(0, _TRIED))
    network = problem.network
    versions = [x._version for x in network.fixed.values()]
    with at_first_sample():
        kept, flops = sample_cost(network, one)
    if versions != [x._version for x in network.fixed.values()]:
        changed = [
            name
            for (name, x), v in zip(network.fixed.items(), versions, strict=True)
            if x._version != v
        ]
        raise UnsupportedLayerError(
            f"the model changes {', '.join(changed)} while it computes: call model.eval() first"
        )
    _check_shape(problem.outputs(few), few)
    check_chance(network, few)
    if problem.metric is None:
        derivatives = Derivatives.of_hessian(
            network,
            lambda theta: problem.loss.value(network(theta, few.inputs), few.targets),
            seed,
        )
    else:
        derivatives = Derivatives.of(network, few, seed)
    return replace(problem, sample_bytes=kept, sample_flops=flops, derivatives=derivatives)


def sample_cost(network: Network, batch: Batch) -> tuple[int, float]:
    """Bytes that reverse mode keeps of a sample, and operations of products and convolutions."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    own = {p.data_ptr() for p in network.theta}
    kept: dict[int, int] = {}
    operations = 0.0

    class Counting(TorchDispatchMode):  # type: ignore[misc]  # of no type
        # Not FlopCounterMode: its global hooks are not for compiled modules.
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), options: Any = None
        ) -> Any:
            nonlocal operations
            made = function(*args, **(options or {}))
            count = flop_registry.get(function._overloadpacket)
            if count is not None:
                operations += count(*args, **(options or {}), out_val=made)
            return made

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() not in own:
            kept[x.data_ptr()] = x.nbytes
        return x

    theta = tuple(p.detach().requires_grad_() for p in network.theta)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), Counting():
        outputs = network(theta, batch.inputs)
    every = outputs.nbytes + sum(kept.values())
    return max(1, every // batch.size), max(operations / batch.size, 2.0 * network.n)


def _check_shape(outputs: torch.Tensor, batch: Batch) -> None:
    """Refuse outputs whose first axis does not count the samples.

    Raises:
        ShapeError: says what there is.
    """
    if outputs.ndim == 0 or len(outputs) != batch.size:
        raise ShapeError(
            f"the model's predictions must be (n, ...) with n = {batch.size} samples, as the "
            f"inputs have, got {tuple(outputs.shape)}; output= can move axes"
        )


def check_chance(network: Network, batch: Batch) -> None:
    """Refuse outputs that two evaluations give differently.

    Raises:
        UnsupportedLayerError: says by how much.
    """
    import torch

    with torch.no_grad():
        one, two = (network(network.theta, batch.inputs) for _ in range(2))
    if not torch.equal(one, two) and bool(one.isfinite().all()):
        raise UnsupportedLayerError(
            "the model's outputs are left to chance: two evaluations at the same inputs are "
            f"{float((one - two).abs().max()):.3g} apart; call model.eval(), or seed what is "
            "random in forward"
        )


def check_samples_alone(network: Network, batch: Batch, outputs: torch.Tensor) -> bool:
    """Whether a sample has the same outputs alone; False where there is but one.

    Raises:
        UnsupportedLayerError: it has not.
    """
    import torch

    if batch.size == 1:
        return False
    with torch.no_grad():
        last = network(network.theta, batch.of(slice(batch.size - 1, None)).inputs)
    size = float(outputs.abs().max())
    gap = float((last - outputs[-1:]).abs().max()) if last.shape == outputs[-1:].shape else np.inf
    if not gap <= _ALIKE[outputs.dtype.itemsize] * size:
        raise UnsupportedLayerError(
            "the model's output for a sample depends on the other samples of its batch: alone it "
            f"is {gap:.3g} off, outputs reach {size:.3g}; the matrix is a sum over samples, of "
            "layers that see one at a time (of inputs whose first axis counts the samples)"
        )
    return True
