"""What is to be known of a loss: the contract of this room."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Self, TypeAlias

from gpu_hodlr.errors import ArgumentError, DtypeError, ShapeError

if TYPE_CHECKING:
    import torch

REDUCTIONS = ("mean", "sum", "none")

Targets: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...]"


class Loss(ABC):
    """l(outputs, targets) = sum_i l_i(outputs[i], targets[i]), the sum over the samples of a batch.

    The weights of the loss are in it, its mean is not: that divides by `total` over all batches.
    The first axis of outputs and targets counts the samples, and nothing of the loss depends on
    which samples are in a batch. All methods but `check` and `total` do the same whatever the
    numbers are, so that `torch.func` can transform them.

    Attributes:
        name: as a user may write it.
        convex: in the outputs, where `check` has passed.
        reduction: "mean", "sum" or "none", which counts like "sum".
    """

    name: str
    convex: bool = True

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in REDUCTIONS:
            raise ArgumentError(
                f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
            )
        self.reduction = reduction

    def reduced(self, reduction: str) -> Self:
        """The same with another reduction.

        Raises:
            ArgumentError: there is no such reduction.
        """
        other = copy.copy(self)
        Loss.__init__(other, reduction)
        return other

    @abstractmethod
    def check(self, outputs: torch.Tensor, targets: Targets) -> None:
        """Refuse targets that do not fit.

        Raises:
            ShapeError, DtypeError, ArgumentError: shapes, dtypes, values.
        """

    @abstractmethod
    def value(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The sum over the samples, a scalar."""

    def log_constant(self, outputs: torch.Tensor, targets: Targets) -> float:
        """Log of the integral of exp(-`value`) over the targets: log p = -value - this.

        0 where exp(-value) is a probability as it is, or where the constant is not known: a loss
        with weights, smoothed or soft targets, one's own.
        """
        return 0.0

    @abstractmethod
    def total(self, outputs: torch.Tensor, targets: Targets) -> float:
        """What "mean" divides by for this batch; added up over batches."""

    def divisor(self, total: float) -> float:
        """What the sum is divided by: `total`, of all batches, for "mean", else 1.

        Raises:
            ArgumentError: a mean over nothing.
        """
        if self.reduction != "mean":
            return 1.0
        if not total > 0:
            raise ArgumentError(f"targets: the mean of {self.name} is over nothing: {self.empty}")
        return total

    def factor(self, total: float) -> float:
        """What the sum is multiplied by, one over `divisor`.

        Raises:
            ArgumentError: a mean over nothing.
        """
        return 1.0 / self.divisor(total)

    empty = "there is no output"  # why a mean may be over nothing

    @abstractmethod
    def hessian_matmat(
        self, outputs: torch.Tensor, targets: Targets, z: torch.Tensor
    ) -> torch.Tensor:
        """H z, (k, *outputs.shape), for z of that shape and the Hessian H of `value`."""

    def root_size(self, outputs: torch.Tensor, targets: Targets) -> int:
        """Rows r of a sample's root; as many as it has outputs."""
        return outputs[0].numel()

    @abstractmethod
    def root_transpose_matmat(
        self, outputs: torch.Tensor, targets: Targets, w: torch.Tensor
    ) -> torch.Tensor:
        """S^T w, (k, *outputs.shape), for w (k, n, r) and the root S of `hessian_root`."""

    def hessian_root(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """S (n, r, *outputs.shape[1:]) with S^T S = H: a sample's own rows, n r^2 numbers."""
        import torch

        n, r = len(outputs), self.root_size(outputs, targets)
        identity = torch.eye(r, dtype=outputs.dtype, device=outputs.device)
        rows = self.root_transpose_matmat(outputs, targets, identity[:, None].expand(r, n, r))
        return rows.transpose(0, 1)

    @abstractmethod
    def sample(self, outputs: torch.Tensor, generator: torch.Generator, num: int) -> torch.Tensor:
        """Targets (num, ...) drawn from the likelihood, exp(-value) without the weights."""

    @abstractmethod
    def sampled_gradients(
        self, outputs: torch.Tensor, targets: Targets, generator: torch.Generator, num: int
    ) -> torch.Tensor:
        """Gradients g in the outputs at drawn targets, (num, *outputs.shape).

        A sample keeps the weight that it has by its own target, w: g is sqrt(w) times the gradient
        without weights, and E g g^T = w F for the Fisher information F of the likelihood. It is
        H for the losses whose H depends on the targets by their weight alone.
        """


def check_real(x: torch.Tensor, name: str, shape: tuple[int, ...] | None = None) -> None:
    """Refuse what is no dense tensor of finite real numbers, or not of a shape.

    Raises:
        DtypeError, ShapeError, ArgumentError: says which.
    """
    import torch

    if not isinstance(x, torch.Tensor):
        raise DtypeError(f"{name} must be a torch tensor, got {type(x).__name__}")
    if x.is_complex():
        raise DtypeError(f"{name} must be real, got {x.dtype}")
    if shape is not None and tuple(x.shape) != shape:
        raise ShapeError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise ArgumentError(f"{name} have NaN or infinite entries")


def check_outputs(outputs: torch.Tensor) -> None:
    """Refuse outputs without samples, or that are no numbers.

    Raises:
        DtypeError, ShapeError, ArgumentError: says which.
    """
    check_real(outputs, "model(inputs)")
    if not outputs.is_floating_point():
        raise DtypeError(f"model(inputs) must be floating point numbers, got {outputs.dtype}")
    if outputs.ndim == 0 or outputs.numel() == 0:
        raise ShapeError(f"model(inputs) must be (n, ...) outputs, got {tuple(outputs.shape)}")
