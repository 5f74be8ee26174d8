"""The generalized Gauss-Newton matrix of a torch network."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from gpu_hodlr.networks.curvature import (
    CurvatureOperator,
    Reading,
    check_convex,
    placed_by_position,
)
from gpu_hodlr.networks.data import Tree
from gpu_hodlr.networks.metric import LossHessian
from gpu_hodlr.networks.model import Model, Output, Params

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDevice, AnyDtype


class GGNOperator(CurvatureOperator):
    """K = sum_k J_k^T H_k J_k of any torch network: the generalized Gauss-Newton matrix.

    J_k is the Jacobian of the outputs for sample k in the parameters, H_k the Hessian of the loss
    in these outputs, with the loss's reduction: "mean" divides by what torch's does, over all data,
    "none" counts like "sum". Rows are parameters in the order of
    `torch.nn.utils.parameters_to_vector`, those of `params` alone; others are constants. Dropout
    and batch normalization must be in evaluation mode. The parameters are copied: training goes on
    without a change of K.

    There are four ways to K, chosen by bytes and operations or by `entries`:

    ==============  ==============================================================================
    "khatri-rao"    Linear layers that every sample goes through once, wherever they are in the
                    model: their inputs, and the outputs' derivatives in their units, are stored
    "root"          A (rows, N) is stored, K = A^T A, a row for every output of every sample
    "dense"         K is stored: fewer parameters than rows, as of a language model
    "none"          products alone, by `torch.func`; memory does not grow with the data
    ==============  ==============================================================================

    Args:
        model: a torch.nn.Module, or a function f(params, inputs) with params a dict of tensors.
        loss: "mse", "cross_entropy", ..., torch's module or function of one, or an object of one's
            own, see `gpu_hodlr.networks.losses.read_loss`. It must be convex in the outputs.
        inputs: a tensor or array whose first axis counts the samples, a tuple of them (arguments of
            forward) or a dict (its keyword arguments). Or, without targets, an iterable of pairs
            (inputs, targets), such as a DataLoader or a list: it is read again at every product,
            and must give the same samples.
        targets: of the loss; on the model's device like the inputs. Batches are moved there.
        params: names, tensors, a module of the model, or a predicate of names (or of names and
            tensors): the parameters that K is of; those that require grad by default. Of a function
            the dict of its tensors.
        output: the predictions in what the model returns: an index, a key, an attribute, or a
            function, which may also move axes. By default what it returns, or its `logits`.
        reduction: "mean", "sum" or "none"; the loss's, or "mean", by default.
        num_data: samples that a mean is over, where the data are a part of more; all by default.
        dtype: float32 or float64, in which everything is computed; that of the model's
            widest parameter by default, and float32 for one in half precision, which `repr` says.
        device: "cpu" or "cuda", or a torch.device; the model's by default.
        entries: "auto", or one of the four ways.
        seed: of the random vectors that derivatives are tried with.

    Attributes:
        access: which of the four ways it is.
        num_samples: n.
        num_outputs: outputs of a sample (the most there are).
        rank_bound: n * outputs.

    Raises:
        UnsupportedLayerError: outputs that depend on other samples or on chance, layers without
            derivatives; for "khatri-rao" a layer it is not known for, by name.
        ShapeError, DtypeError, ArgumentError: inputs, targets, loss or options do not fit; no
            parameter requires grad; a loss that is not convex; data that can be read once only.
        MemoryEstimateError: what was asked for does not fit.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1)).double()
        >>> inputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> op = gh.GGNOperator(model, "mse", inputs, targets=inputs[:, :1])
        >>> op.to_dense()  # of a linear model: the sum over samples of 2 / n [x; 1] [x; 1]^T
        array([[1., 0., 1.],
               [0., 4., 2.],
               [1., 2., 2.]])
        >>> op.rank_bound
        2
        >>> batches = [(inputs[:1], inputs[:1, :1]), (inputs[1:], inputs[1:, :1])]
        >>> op = gh.GGNOperator(model, "mse", batches, params=["0.weight"], entries="none")
        >>> op @ torch.ones(2, dtype=torch.float64)
        tensor([1., 4.], dtype=torch.float64)
    """

    def __init__(
        self,
        model: Model,
        loss: object,
        inputs: Tree,
        targets: Tree = None,
        *old: object,
        params: Params = None,
        output: Output = None,
        reduction: str | None = None,
        num_data: int | None = None,
        dtype: AnyDtype | None = None,
        device: AnyDevice | None = None,
        entries: str = "auto",
        seed: int = 0,
    ) -> None:
        dtype, device = placed_by_position(old, dtype, device)
        reading = Reading(
            model, loss, inputs, targets, params=params, output=output, reduction=reduction,
            num_data=num_data, dtype=dtype, entries=entries, seed=seed,
        )  # fmt: skip
        self._read(reading, device)

    @classmethod
    def of(cls, reading: Reading) -> Self:
        """Of what is read already: data in batches are held to those of the passes before."""
        self = cls.__new__(cls)
        self._read(reading, None)
        return self

    def _read(self, reading: Reading, device: AnyDevice | None) -> None:
        check_convex(reading.loss)
        by_layers = reading.by_layers()
        if by_layers is not None:
            self.num_outputs, self.num_samples = by_layers.num_outputs, by_layers.num_samples
            self.rank_bound = self.num_outputs * self.num_samples
            self._read_through(reading, by_layers, device)
            return
        functional = reading.functional(LossHessian(reading.loss))
        problem = functional.problem
        self.num_outputs, self.num_samples = problem.root_size, problem.num_samples
        self.rank_bound = problem.rows
        self._read_through(reading, reading.best(functional), device)
