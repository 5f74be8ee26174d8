"""The Hessian of a loss in the outputs of a network, for outputs (n, d)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

from gpu_hodlr.arrays import as_array
from gpu_hodlr.devices import Array, move, namespace
from gpu_hodlr.networks.losses import CrossEntropy, Elementwise, Loss, Targets

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class OutputHessian:
    """The loss's Hessian in the last pre-activations, E = C (I - r r^T) C, C = diag(c), a sample.

    A sum over outputs: c = sqrt(s l'') phi', r = 0. Cross entropy: c = sqrt(s p) phi', r = sqrt(p),
    with softmax probabilities p, phi' the derivative of an activation after the last layer, and s
    the weight of the sample in the loss (1/n, 1/(n d), 1). As r^T r = 1, (I - r r^T) C is a root.

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
        """(I - r r^T) z for z (d, ..., n)."""
        if self.r is None:
            return z
        r = _between(self.r, z)
        return z - r * (r * z).sum(axis=0)

    def apply(self, z: Array) -> Array:
        """E z for z (d, ..., n), in place."""
        c = _between(self.c, z)
        if self.r is None:
            z *= c * c
            return z
        r = _between(self.r, z)
        z *= c
        z -= r * (r * z).sum(axis=0)
        z *= c
        return z


def _between(x: Array, z: Array) -> Array:
    """X (d, n) with the axes that z (d, ..., n) has between."""
    return x.reshape(len(x), *[1] * (z.ndim - 2), x.shape[1])


def has_output_hessian(loss: Loss) -> TypeGuard[CrossEntropy | Elementwise]:
    """Whether a loss has a Hessian of the form above."""
    return isinstance(loss, (CrossEntropy, Elementwise))


def output_hessian(
    outputs: torch.Tensor,
    targets: Targets,
    loss: CrossEntropy | Elementwise,
    slope: Array | None,
    divisor: float,
) -> OutputHessian:
    """The loss's Hessian in the last pre-activations.

    Args:
        outputs: (n, d) of the network.
        targets: of the loss, checked.
        loss: what is known of it.
        slope: (d, n) derivative of an activation after the last layer, or None.
        divisor: what the sum over the samples is divided by.
    """
    import torch

    if isinstance(loss, CrossEntropy):
        weight = (loss.position_weights(outputs, targets) / divisor).to(outputs)
        root = torch.exp(0.5 * torch.log_softmax(outputs, dim=1)).T
        c = root * weight.sqrt()
        r = contiguous(as_array(root, "r"))
    else:
        c = (loss.curvature(outputs, targets).double() / divisor).sqrt().to(outputs).T
        r = None
    c_array = contiguous(as_array(c, "c"))
    return OutputHessian(c_array if slope is None else c_array * slope, r)


def contiguous(x: Array) -> Array:
    """In C order."""
    return namespace(x).ascontiguousarray(x)
