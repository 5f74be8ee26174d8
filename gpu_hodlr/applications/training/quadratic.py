"""The quadratic model of a loss over a few directions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from gpu_hodlr.devices import HostArray

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.applications.training.objective import Point

_DROPPED = 10.0  # times rounding: eigenvalues of few directions that are none


class Quadratic:
    """m(s) = g^T s + s^T (G + damping I) s / 2.

    Args:
        point: the samples that G, the Gauss-Newton matrix, is of.
        gradient: g, (N,).
        damping: > 0.
        precondition: an approximate inverse of G + damping I.
    """

    def __init__(
        self,
        point: Point,
        gradient: torch.Tensor,
        damping: float,
        precondition: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._linearized = point.linearized()
        self._gradient, self._damping = gradient, damping
        self._precondition = precondition

    def minimized(
        self, last: torch.Tensor | None, directions: int
    ) -> tuple[torch.Tensor, Callable[[float], float]]:
        """The step (N,), and m of it times a number.

        The minimum over the preconditioned gradient and `last`; then over these and what
        preconditioned residuals add, one after the other: conjugate gradients in exact arithmetic,
        which remember all directions.

        Args:
            last: a direction of its own.
            directions: of the preconditioner.
        """
        import torch

        first = [_unit(self._precondition(-self._gradient))]
        if last is not None and bool(last.any()):
            first.append(_unit(last))
        D = torch.stack(first)
        images = self._linearized.images(D)
        coefficients, slope, curvature = self._solved(D, images.gram())
        for _ in range(directions - 1):
            c = torch.as_tensor(coefficients, dtype=D.dtype, device=D.device)
            product = self._linearized.pulled(images.combined(c))
            residual = -self._gradient - product - self._damping * (c @ D)
            if not bool(residual.any()):
                break
            d = _unit(self._precondition(residual))[None]
            D, images = torch.cat([D, d]), images.joined(self._linearized.images(d))
            coefficients, slope, curvature = self._solved(D, images.gram())
        c = torch.as_tensor(coefficients, dtype=D.dtype, device=D.device)
        return c @ D, lambda t: t * slope + 0.5 * t * t * curvature

    def _solved(self, D: torch.Tensor, gram: torch.Tensor) -> tuple[HostArray, float, float]:
        """Coefficients of the minimum over the span of D, and slope and curvature along it."""
        import torch

        damped = gram + self._damping * (D @ D.T)
        both = torch.cat([damped, (D @ self._gradient)[:, None]], dim=1)
        host = both.detach().cpu().numpy().astype(np.float64)  # the one wait for the device
        A, b = (host[:, :-1] + host[:, :-1].T) / 2, host[:, -1]
        values, vectors = np.linalg.eigh(A)
        rounding = _DROPPED * float(torch.finfo(D.dtype).eps)
        kept = values > rounding * values[-1]
        inverse = np.where(kept, 1 / np.where(kept, values, 1.0), 0.0)
        c = -(vectors * inverse) @ (vectors.T @ b)
        return c, float(b @ c), float(c @ A @ c)


def _unit(v: torch.Tensor) -> torch.Tensor:
    """The direction of v, so that Gram matrices are within the range of numbers."""
    return v / v.norm()
