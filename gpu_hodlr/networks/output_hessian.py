"""Losses, and their Hessian in the outputs of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_hodlr.arrays import as_array, check_finite
from gpu_hodlr.devices import Array, move, namespace
from gpu_hodlr.errors import ArgumentError, DtypeError, ShapeError
from gpu_hodlr.networks.modules import changed, torch_class

if TYPE_CHECKING:
    import torch

LOSSES = ("mse", "cross_entropy")
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class OutputHessian:
    """The loss's Hessian in the last pre-activations, E = C (I - r r^T) C, C = diag(c), a sample.

    MSE: c = sqrt(2 s) phi', r = 0. Cross entropy: c = sqrt(s p) phi', r = sqrt(p), with softmax
    probabilities p, phi' the derivative of an activation after the last layer, and s the
    weight of the sample in the loss (1/n, 1/(n d), 1). As r^T r = 1, (I - r r^T) C is a root.

    Attributes:
        c: (d, n).
        r: (d, n) or None for r = 0.
    """

    c: Array
    r: Array | None

    def on(self, device: str) -> OutputHessian:
        """The same Hessian with its arrays on a device."""
        return OutputHessian(move(self.c, device), None if self.r is None else move(self.r, device))

    def of(self, samples: slice) -> OutputHessian:
        """The same Hessian at some of the samples."""
        return OutputHessian(self.c[:, samples], None if self.r is None else self.r[:, samples])

    def project(self, z: Array) -> Array:
        """(I - r r^T) z for z (..., d, n)."""
        if self.r is None:
            return z
        return z - self.r * (self.r * z).sum(axis=-2, keepdims=True)

    def apply(self, z: Array) -> Array:
        """E z for z (..., d, n), in place."""
        if self.r is None:
            z *= self.c * self.c
            return z
        z *= self.c
        z -= self.r * (self.r * z).sum(axis=-2, keepdims=True)
        z *= self.c
        return z


@dataclass(frozen=True)
class Loss:
    """What is to be known of a loss.

    Attributes:
        name: "mse" or "cross_entropy".
        reduction: "mean", "sum" or "none".
        ignore_index: the class whose samples do not count.
        class_weights: (classes,) or None.
        label_smoothing: share of every class in every target.
    """

    name: str
    reduction: str
    ignore_index: int = -100
    class_weights: torch.Tensor | None = None
    label_smoothing: float = 0.0


def read_loss(loss: Any, reduction: str | None) -> Loss:
    """A loss given by its name, or as torch's module.

    Raises:
        ArgumentError: another loss, reduction, class weight or label smoothing.
    """
    import torch

    known = {torch.nn.MSELoss: "mse", torch.nn.CrossEntropyLoss: "cross_entropy"}
    wanted = f"loss must be one of {', '.join(LOSSES)}, or torch's MSELoss or CrossEntropyLoss, got"
    if isinstance(loss, str):
        name = loss
        if name not in LOSSES:
            raise ArgumentError(f"{wanted} {name!r}")
    else:
        kind = torch_class(loss, known)
        if kind is None:
            said = f"the class {loss.__name__}" if isinstance(loss, type) else changed(loss, known)
            raise ArgumentError(f"{wanted} {said}")
        if loss._forward_hooks or loss._forward_pre_hooks:
            raise ArgumentError(f"{wanted} {kind.__name__} with forward hooks")
        name = known[kind]
        reduction = loss.reduction if reduction is None else reduction
    reduction = "mean" if reduction is None else reduction
    if reduction not in REDUCTIONS:
        raise ArgumentError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if isinstance(loss, str) or name == "mse":
        return Loss(name, reduction)
    smoothing = float(loss.label_smoothing)
    if not 0 <= smoothing <= 1:
        raise ArgumentError(f"loss.label_smoothing must lie in 0 .. 1, got {smoothing}")
    return Loss(name, reduction, int(loss.ignore_index), loss.weight, smoothing)


def output_hessian(
    outputs: torch.Tensor, targets: torch.Tensor, loss: Loss, slope: Array | None
) -> OutputHessian:
    """The loss's Hessian in the last pre-activations.

    Args:
        outputs: (n, d) of the network.
        targets: of the loss.
        loss: what is known of it.
        slope: (d, n) derivative of an activation after the last layer, or None.

    Raises:
        ArgumentError, DtypeError, ShapeError: outputs overflow, or targets do not fit.
    """
    import torch

    n, d = outputs.shape
    check_finite(as_array(outputs, "model(inputs)"), "model(inputs)")
    if targets.is_complex():
        raise DtypeError(f"targets must be real, got {targets.dtype}")
    if loss.name == "mse":
        if tuple(targets.shape) != (n, d):
            raise ShapeError(f"targets must have shape ({n}, {d}), got {tuple(targets.shape)}")
        if not bool(torch.isfinite(targets).all()):
            raise ArgumentError("targets have NaN or infinite entries")
        scale = 1.0 / (n * d) if loss.reduction == "mean" else 1.0
        c = torch.full_like(outputs.T, (2 * scale) ** 0.5)
        r = None
    else:
        weight = _sample_weights(targets, n, d, loss).to(outputs)
        root = torch.exp(0.5 * torch.log_softmax(outputs, dim=1)).T
        c = root * weight.sqrt()
        r = contiguous(as_array(root, "r"))
    c_array = contiguous(as_array(c, "c"))
    return OutputHessian(c_array if slope is None else c_array * slope, r)


def contiguous(x: Array) -> Array:
    """In C order."""
    return namespace(x).ascontiguousarray(x)


def _sample_weights(targets: torch.Tensor, n: int, d: int, loss: Loss) -> torch.Tensor:
    """The weight of each sample in a cross entropy, (n,): its Hessian's factor.

    The loss of a sample is -sum_c w_c t_c log p_c for weights w of the classes and the smoothed
    target t, and its Hessian sum_c w_c t_c times that of -log p.
    """
    import torch

    w = _class_weights(loss, d, targets.device)
    kept = (1 - loss.label_smoothing) if w is not None or targets.is_floating_point() else 1.0
    spread = 0.0 if kept == 1 else loss.label_smoothing * (1.0 if w is None else float(w.mean()))
    if targets.is_floating_point():
        if tuple(targets.shape) != (n, d):
            raise ShapeError(
                f"targets must be ({n},) class indices or ({n}, {d}) probabilities, "
                f"got {tuple(targets.shape)}"
            )
        if not bool((torch.isfinite(targets) & (targets >= 0)).all()):
            raise ArgumentError("targets: probabilities must be finite and >= 0")
        wide = targets.to(torch.float64)
        weight = kept * (wide if w is None else wide * w).sum(dim=1) + spread
        return weight / n if loss.reduction == "mean" else weight
    if tuple(targets.shape) != (n,):
        raise ShapeError(f"targets must have shape ({n},), got {tuple(targets.shape)}")
    counts = targets != loss.ignore_index
    wrong = counts & ((targets < 0) | (targets >= d))
    if bool(wrong.any()):
        first = int(targets[wrong][0])
        raise ArgumentError(f"targets must lie in 0 .. {d - 1}, got {first}")
    every = counts.to(torch.float64)
    own = every if w is None else every * w[torch.where(counts, targets, 0).long()]
    weight = own if kept == 1 else kept * own + spread * every
    if loss.reduction == "mean":
        if not bool(counts.any()):
            raise ArgumentError("targets: every sample has the ignored index")
        if not bool(own.any()):
            raise ArgumentError("loss.weight is 0 for the class of every sample")
        weight = weight / own.sum()
    return weight


def _class_weights(loss: Loss, d: int, place: torch.device) -> torch.Tensor | None:
    """(d,) float64, or None where all are 1."""
    import torch

    if loss.class_weights is None:
        return None
    w = loss.class_weights.detach().to(place, torch.float64)
    if tuple(w.shape) != (d,):
        raise ShapeError(f"loss.weight must have shape ({d},), got {tuple(w.shape)}")
    if not bool((torch.isfinite(w) & (w >= 0)).all()):
        raise ArgumentError("loss.weight: class weights must be finite and >= 0")
    return w
