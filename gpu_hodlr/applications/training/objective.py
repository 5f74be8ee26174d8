"""The loss of a network at one batch: its value, gradient, and Gauss-Newton products."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from gpu_hodlr.networks.curvature import check_convex, kind_of
from gpu_hodlr.networks.data import Batch, Data, Tree
from gpu_hodlr.networks.losses import Loss, read_loss
from gpu_hodlr.networks.metric import LossHessian
from gpu_hodlr.networks.model import Chosen, Model, Network, Output, Params, Theta, choose
from gpu_hodlr.networks.problem import Problem, check_samples_alone, read_problem

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.devices import AnyDtype


class Objective:
    """The loss of a model, whose parameters change from batch to batch.

    What is found out of the model once, at the first batch, holds for all: that samples stand
    alone, that nothing is left to chance, how derivatives are computed.

    Args:
        model, loss, params, output, reduction, dtype, seed: see `GGNOperator`.

    Attributes:
        chosen: the model and its parameters.
        loss: as a sum over samples.
        kind: in which all is computed.
    """

    def __init__(
        self,
        model: Model,
        loss: object,
        params: Params,
        output: Output,
        reduction: str | None,
        dtype: AnyDtype | None,
        seed: int,
    ) -> None:
        self.chosen: Chosen = choose(model, params)
        self.loss: Loss = read_loss(loss, reduction)
        check_convex(self.loss)
        self.kind: torch.dtype = kind_of(self.chosen, dtype)
        self._output, self._seed = output, seed
        self._known: Problem | None = None
        self._alone = False

    def at(self, inputs: Tree, targets: Tree) -> Point:
        """The loss of a batch at the parameters that the model has now.

        Raises:
            ArgumentError, ShapeError, DtypeError, DeviceError, UnsupportedLayerError: see
                `GGNOperator`.
        """
        first = self._known is None
        network = Network.of(self.chosen, self._output, self.kind, copied=first)
        data = Data(inputs, targets, self.kind, network.place, copied=first)
        if self._known is None:
            metric = LossHessian(self.loss)
            self._known = read_problem(network, data, self.loss, metric, None, self._seed)
            self._alone = self._known.num_samples > 1
        (batch,) = data
        problem = replace(self._known, network=network, data=data)
        if not self._alone and batch.size > 1:  # the first batches may have had one sample
            with network.plain():
                self._alone = check_samples_alone(network, batch, problem.outputs(batch))
        return Point(problem, batch)

    def written(self, theta: torch.Tensor) -> None:
        """Give the model the parameters (N,)."""
        import torch

        with torch.no_grad():
            start = 0
            for p in self.chosen.named.values():
                p.copy_(theta[start : start + p.numel()].reshape(p.shape))
                start += p.numel()


@dataclass(frozen=True)
class Point:
    """A batch and the parameters of a network; all methods within `network.plain()`.

    Only `evaluated` gives one whose scale is that of the batch.

    Attributes:
        problem: the network there.
        batch: its samples.
    """

    problem: Problem
    batch: Batch

    @property
    def network(self) -> Network:
        """The function of the parameters."""
        return self.problem.network

    def theta(self) -> torch.Tensor:
        """(N,), a copy."""
        return self.network.joined(tuple(p[None] for p in self.network.theta))[0]

    def moved(self, theta: torch.Tensor) -> Theta:
        """Parameters (N,) as the network takes them."""
        return tuple(p[0] for p in self.network.split(theta[None]))

    def value(self, theta: torch.Tensor) -> float:
        """The loss at parameters (N,)."""
        import torch

        parameters = self.moved(theta)
        with torch.no_grad():
            sums = [
                self.problem.loss.value(self.network(parameters, piece.inputs), piece.targets)
                for piece in self._pieces()
            ]
            return float(torch.stack(sums).sum(dtype=torch.float64)) * self.scale

    def evaluated(self) -> tuple[Point, float, torch.Tensor]:
        """The same with its scale, the loss, and its gradient (N,): one backward pass.

        Raises:
            ShapeError, DtypeError, ArgumentError: targets do not fit.
        """
        import torch

        loss, total = self.problem.loss, 0.0
        leaves = tuple(p.detach().requires_grad_() for p in self.network.theta)
        value = torch.zeros((), dtype=torch.float64, device=self.network.place)
        gradient = torch.zeros_like(self.theta())
        for piece in self._pieces():
            outputs = self.network(leaves, piece.inputs)
            loss.check(outputs.detach(), piece.targets)
            total += loss.total(outputs.detach(), piece.targets)
            part = loss.value(outputs, piece.targets)
            slopes = torch.autograd.grad(part, leaves, materialize_grads=True)
            gradient += self.network.joined(tuple(g[None] for g in slopes))[0]
            value += part.detach()
        scaled = self._scaled(loss.factor(total))
        return scaled, float(value) * scaled.scale, gradient.mul_(scaled.scale)

    def _scaled(self, scale: float) -> Point:
        return replace(self, problem=replace(self.problem, scale=scale))

    @property
    def scale(self) -> float:
        """What the sum over samples is multiplied by."""
        return self.problem.scale

    def part(self, samples: int) -> Point:
        """The same of the first samples, as many as these, that stand for all."""
        few = self.batch.of(slice(0, samples))
        return replace(self, batch=few)._scaled(self.scale * self.batch.size / few.size)

    def _pieces(self) -> Iterator[Batch]:
        return self.batch.pieces(self.problem.together)

    def linearized(self) -> Linearized:
        """The Gauss-Newton matrix of these samples."""
        return Linearized(self)


class Linearized:
    """K = J^T H J of some samples by its factors; a forward or backward pass each.

    Args:
        point: the samples.
    """

    def __init__(self, point: Point) -> None:
        self._point = point
        problem = point.problem
        self._parts: list[tuple[Batch, torch.Tensor, Callable[..., torch.Tensor],
                                Callable[..., torch.Tensor]]] = []  # fmt: skip
        for piece in point.batch.pieces(problem.together):
            outputs, push, pull = problem.derivatives.linearized(problem.network, piece)
            self._parts.append((piece, outputs.detach(), push, pull))

    def images(self, directions: torch.Tensor) -> Images:
        """J and H J times directions (k, N)."""
        metric = self._point.problem.metric
        assert metric is not None
        pushed, weighed = [], []
        for piece, outputs, push, _ in self._parts:
            z = push(directions).detach()
            pushed.append(z)
            weighed.append(metric.matmat(outputs, piece, z) * self._point.scale)
        return Images(pushed, weighed)

    def pulled(self, weighed: list[torch.Tensor]) -> torch.Tensor:
        """J^T e (N,), for e (1, *outputs.shape) a piece of the samples."""
        parts = [pull(e) for (_, _, _, pull), e in zip(self._parts, weighed, strict=True)]
        total: torch.Tensor = parts[0]
        for part in parts[1:]:
            total = total + part
        return total[0]


@dataclass(frozen=True)
class Images:
    """What J makes of directions.

    Attributes:
        pushed: J d, (k, *outputs.shape), a piece of the samples each.
        weighed: H J d likewise.
    """

    pushed: list[torch.Tensor]
    weighed: list[torch.Tensor]

    def joined(self, other: Images) -> Images:
        """Of the directions of both."""
        import torch

        def both(a: list[torch.Tensor], b: list[torch.Tensor]) -> list[torch.Tensor]:
            return [torch.cat(parts) for parts in zip(a, b, strict=True)]

        return Images(both(self.pushed, other.pushed), both(self.weighed, other.weighed))

    def gram(self) -> torch.Tensor:
        """D K D^T (k, k)."""
        parts = [
            z.flatten(1) @ hz.flatten(1).T for z, hz in zip(self.pushed, self.weighed, strict=True)
        ]
        total: torch.Tensor = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def combined(self, coefficients: torch.Tensor) -> list[torch.Tensor]:
        """H J of the sum of the directions times coefficients (k,), one direction."""
        import torch

        return [torch.tensordot(coefficients, hz, 1)[None] for hz in self.weighed]
