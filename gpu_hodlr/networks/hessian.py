"""The exact Hessian of a loss in the parameters of a torch network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_hodlr.networks.curvature import CurvatureOperator, Reading
from gpu_hodlr.networks.data import Tree
from gpu_hodlr.networks.model import Model, Output, Params

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDevice, AnyDtype


class HessianOperator(CurvatureOperator):
    """H = d^2 L / d theta^2 for L(theta) = sum_k l(f(theta, x_k), y_k), with the loss's reduction.

    Unlike the Gauss-Newton matrix it has negative eigenvalues, as a rule: `definite` is False.
    Products are by reverse mode twice, or, of Linear layers and elementwise activations under a
    convex loss, by the layers' own formulas (of data in memory). Layers that are piecewise linear,
    ReLU and max pooling, have the derivatives that torch gives them.

    Args:
        model, loss, inputs, targets, params, output, reduction, num_data, dtype, device, seed: see
            `GGNOperator`. The loss need not be convex.
        entries: "dense" (H is stored, N^2 numbers), "none" (products alone) or "auto".

    Attributes:
        access: "dense" or "none".
        num_samples: n.

    Raises:
        UnsupportedLayerError, ShapeError, DtypeError, ArgumentError, MemoryEstimateError: see
            `GGNOperator`.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1))
        >>> _ = [p.data.fill_(1.0) for p in model.double().parameters()]
        >>> x = torch.ones(2, 1, dtype=torch.float64)
        >>> gh.HessianOperator(model, "mse", x, x).to_dense()  # (b a x + c - y)^2 at 1, 1, 1
        array([[2., 4., 2.],
               [4., 2., 2.],
               [2., 2., 2.]])
    """

    definite = False

    def __init__(
        self,
        model: Model,
        loss: object,
        inputs: Tree,
        targets: Tree = None,
        *,
        params: Params = None,
        output: Output = None,
        reduction: str | None = None,
        num_data: int | None = None,
        dtype: AnyDtype | None = None,
        device: AnyDevice | None = None,
        entries: str = "auto",
        seed: int = 0,
    ) -> None:
        reading = Reading(
            model, loss, inputs, targets, params=params, output=output, reduction=reduction,
            num_data=num_data, dtype=dtype, entries=entries, seed=seed,
            allowed=("auto", "dense", "none"),
        )  # fmt: skip
        access, self.num_samples = reading.hessian()
        self._read_through(reading, access, device)
