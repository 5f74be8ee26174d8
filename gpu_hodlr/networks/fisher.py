"""Fisher's information of a torch network, by gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_hodlr.checks import check_count
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.networks.curvature import CurvatureOperator, Reading
from gpu_hodlr.networks.data import Tree
from gpu_hodlr.networks.metric import Gradients
from gpu_hodlr.networks.model import Model, Output, Params

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDevice, AnyDtype

KINDS = ("mc", "empirical")


class FisherOperator(CurvatureOperator):
    """K = s sum_k 1/m sum_j g_kj g_kj^T, with gradients g_kj = J_k^T d l(f_k, y_kj) / d f_k.

    s is what the reduction multiplies the sum over samples by: 1 / n for the mean of a cross
    entropy, 1 / (n d) for that of squares. The gradients are of the sum, without s.

    - "mc": targets y_kj, j = 1 .. m, are drawn from the model's own likelihood, exp(-l). The
      expectation is the Gauss-Newton matrix for the losses whose Hessian in the outputs depends on
      the targets by their weight alone (all here but Huber's); of a sample with a weight, g is
      multiplied by its root. With few samples it is the cheaper matrix: m rows a sample, and not
      as many as there are outputs.
    - "empirical": y_k1 are the targets themselves, m = 1. It is no approximation of the
      Gauss-Newton matrix (Kunstner, Balles, Hennig, NeurIPS 2019).

    Args:
        model, loss, inputs, targets, params, output, reduction, num_data, dtype, device: see
            `GGNOperator`.
        kind: "mc" or "empirical".
        samples: m, of "mc".
        entries: "auto", or one of the four ways of `GGNOperator`: of "root" the gradients are
            stored, of "khatri-rao" those in the units of Linear layers.
        seed: of the targets drawn. The same seed gives the same matrix, for the same batches; a
            DataLoader that shuffles is refused with "mc" unless the root is stored.

    Attributes:
        access: which of the four ways it is.
        num_samples: n.
        rank_bound: n m.

    Raises:
        UnsupportedLayerError, ShapeError, DtypeError, ArgumentError, MemoryEstimateError: see
            `GGNOperator`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(1, 1, bias=False).double()
        >>> _ = model.weight.data.fill_(2.0)
        >>> layers = torch.nn.Sequential(model, torch.nn.Linear(1, 1, bias=False).double())
        >>> _ = layers[1].weight.data.fill_(1.0)
        >>> x = torch.ones(2, 1, dtype=torch.float64)
        >>> gh.FisherOperator(layers, "mse", x, x, kind="empirical").to_dense()  # g = 2 (2 - 1)
        array([[ 4.,  8.],
               [ 8., 16.]])
    """

    def __init__(
        self,
        model: Model,
        loss: object,
        inputs: Tree,
        targets: Tree = None,
        *,
        kind: str = "mc",
        samples: int = 1,
        params: Params = None,
        output: Output = None,
        reduction: str | None = None,
        num_data: int | None = None,
        dtype: AnyDtype | None = None,
        device: AnyDevice | None = None,
        entries: str = "auto",
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ArgumentError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        check_count(samples, "samples")
        if kind == "empirical" and samples != 1:
            raise ArgumentError(f"samples must be >= 1, and 1 for 'empirical', got {samples}")
        reading = Reading(
            model, loss, inputs, targets, params=params, output=output, reduction=reduction,
            num_data=num_data, dtype=dtype, entries=entries, seed=seed,
        )  # fmt: skip
        metric = Gradients(reading.loss, int(samples) if kind == "mc" else None, reading.seed)
        functional = reading.functional(metric)
        self.num_samples = functional.problem.num_samples
        self.rank_bound = functional.problem.rows
        access = reading.best(functional)
        if metric.draws and access is functional and not reading.data.ordered:
            raise ArgumentError(
                "kind='mc' draws targets for the batches in their order, and this DataLoader is "
                "not known to keep it: give shuffle=False, or entries='root'"
            )
        self._read_through(reading, access, device)
