"""Gradients of the loss of every sample in a network's parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gpu_hodlr.arrays import as_array
from gpu_hodlr.devices import Array
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.networks.curvature import Reading
from gpu_hodlr.networks.data import Tree
from gpu_hodlr.networks.losses import Loss
from gpu_hodlr.networks.metric import LossHessian
from gpu_hodlr.networks.model import Model, Output, Params

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.devices import AnyDtype
    from gpu_hodlr.networks.losses import Targets


class SampleGradients:
    """Columns g_i = d l_i / d theta of the samples' losses, in their order, some at a time.

    The loss that a network is trained with is the mean of the l_i, or their sum, as its reduction
    says. Of a mean over something else than samples (every output of "mse", weights of classes) l_i
    is scaled so that this holds; of other samples than those trained with as of these (`like`).

    Args:
        model, loss, inputs, targets, params, output, reduction, dtype, seed: see `GGNOperator`.
        name: of the data, for what is said.
        like: the gradients of the samples trained with, where these are others.

    Attributes:
        num_samples: n.

    Raises:
        ArgumentError: data whose samples may come in another order at every pass; see
            `GGNOperator`.
        UnsupportedLayerError, ShapeError, DtypeError: see `GGNOperator`.
    """

    def __init__(
        self,
        model: Model,
        loss: object,
        inputs: Tree,
        targets: Tree,
        *,
        params: Params,
        output: Output,
        reduction: str | None,
        dtype: AnyDtype | None,
        seed: int,
        name: str,
        like: SampleGradients | None = None,
    ) -> None:
        reading = Reading(
            model, loss, inputs, targets, params=params, output=output, reduction=reduction,
            num_data=None, dtype=dtype, entries="none", seed=seed,
        )  # fmt: skip
        if not reading.data.ordered:
            raise ArgumentError(
                f"{name} must give its samples in the same order at every pass: a list of batches, "
                "or a DataLoader with shuffle=False"
            )
        self._problem = reading.functional(LossHessian(reading.loss)).problem
        self.num_samples = self._problem.num_samples
        mean = reading.loss.reduction == "mean"
        own = self._problem.scale * (self.num_samples if mean else 1)
        self._scale: float = own if like is None else like._scale

    def __iter__(self) -> Iterator[Array]:
        """(N, samples) of the network's dtype, on its device."""
        problem = self._problem
        for batch in problem.data:
            for piece in batch.pieces(min(problem.together, problem.columns(1))):
                with problem.network.plain():
                    slope = _slope(problem.loss, problem.outputs(piece), piece.targets)
                    rows = problem.derivatives.rows(problem.network, piece, slope[:, None])
                    found = (rows[:, 0] * self._scale).detach()
                yield as_array(found, "gradients").T


def _slope(loss: Loss, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The gradient in the outputs: a sum over samples has that of each at its place."""
    import torch

    leaf = outputs.detach().requires_grad_()
    return torch.autograd.grad(loss.value(leaf, targets), leaf)[0]
