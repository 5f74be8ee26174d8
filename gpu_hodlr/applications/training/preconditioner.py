"""Matrices that stand for the Gauss-Newton matrix over some steps, and solves with them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_hodlr.applications.training.objective import Point
from gpu_hodlr.compression import compress
from gpu_hodlr.errors import ArgumentError, closeness_unsaid
from gpu_hodlr.networks.derivatives import random
from gpu_hodlr.networks.losses.elementwise import Elementwise
from gpu_hodlr.networks.unit_root import TrainedLinear, record
from gpu_hodlr.operators import Operator

if TYPE_CHECKING:
    import torch

_CLOSE = 2.0  # dampings within this factor share an inverse
_TRIED = 16  # dampings of a moment


class Preconditioner(ABC):
    """A matrix M near K, and (M + damping I)^-1.

    Attributes:
        damping: that of the inverse there is; 0 for none yet.
    """

    damping = 0.0

    def solve(self, b: torch.Tensor, damping: float) -> torch.Tensor:
        """(M + damping I)^-1 b for b (N,), of a damping near this one."""
        if not self.damping / _CLOSE <= damping <= self.damping * _CLOSE:
            self.invert(damping)
        return self._solve(b)

    def invert(self, damping: float) -> None:
        """Make the inverse of M + damping I."""
        self.damping = damping
        self._invert(damping)

    @property
    @abstractmethod
    def mean_diagonal(self) -> float:
        """Of M: the scale of dampings."""

    @abstractmethod
    def _invert(self, damping: float) -> None:
        """See `invert`."""

    @abstractmethod
    def _solve(self, b: torch.Tensor) -> torch.Tensor:
        """See `solve`, with the inverse there is."""


@dataclass(frozen=True)
class Moments:
    """What a Linear layer's block of K is taken to be: units x inputs.

    Attributes:
        inputs: (f, f) mean of x x^T, of the layer's inputs x, with a last 1 where there is a bias.
        units: (w, w) of K in the layer's pre-activations; (w,) where that is diagonal.
    """

    inputs: torch.Tensor
    units: torch.Tensor


class Kronecker(Preconditioner):
    """The Kronecker factors of Linear layers (Martens and Grosse, ICML 2015).

    A layer's block is G x A, A the second moment of its inputs and G that of the derivatives of
    random rows of K's root in its units: A of the layer's inputs, G without its targets. The
    damping is shared between both, (G + sqrt(damping) / p I) x (A + p sqrt(damping) I) with p^2 the
    ratio of their mean eigenvalues: larger than `damping` where one of them is, which is what keeps
    steps short where blocks off the diagonal are missing.

    Args:
        linear: the layers, whose parameters are all there are, in order.
        moments: of each.
    """

    def __init__(self, linear: Sequence[TrainedLinear], moments: Sequence[Moments]) -> None:
        self._linear, self.moments = linear, moments
        self._inverses: list[tuple[torch.Tensor, torch.Tensor]] = []

    @classmethod
    def of(cls, point: Point, linear: Sequence[TrainedLinear], seed: int) -> Kronecker:
        """Of a batch; the rows of the root are drawn by the seed.

        Raises:
            UnsupportedLayerError: a layer is not called once with a vector of every sample.
        """
        import torch

        problem, batch = point.problem, point.batch
        assert problem.metric is not None
        sums: list[list[torch.Tensor]] = []
        for index, piece in enumerate(batch.pieces(problem.together)):
            found = record(problem.network, piece, linear)
            outputs = found.outputs.detach()
            shape = 1, piece.size, problem.metric.size(outputs, piece)
            w = random(shape, outputs, seed + index)
            e = problem.metric.root_transpose_matmat(outputs, piece, w)[0]
            slopes = found.slopes(e)
            own: list[torch.Tensor] = []
            for layer, x, slope in zip(linear, found.inputs, slopes, strict=True):
                ones = [torch.ones_like(x[:, :1])] if layer.bias else []
                x = torch.cat([x[:, : None if layer.weight else 0], *ones], dim=1)
                own += [x.T @ x / batch.size]
                if isinstance(problem.loss, Elementwise) and torch.equal(slope, e):
                    exact = problem.loss.curvature(outputs, piece.targets)  # of the outputs
                    own += [exact.expand_as(outputs).sum(0)]
                else:
                    own += [slope.T @ slope]
            sums.append(own)
        total = [torch.stack(parts).sum(0) for parts in zip(*sums, strict=True)]
        moments = [
            Moments(A, G * point.scale) for A, G in zip(total[::2], total[1::2], strict=True)
        ]
        return cls(linear, moments)

    @property
    def mean_diagonal(self) -> float:
        """See `Preconditioner`."""
        pairs = [(layer.inputs.diagonal(), _diagonal(layer.units)) for layer in self.moments]
        trace = sum(float(A.sum()) * float(G.sum()) for A, G in pairs)
        return trace / sum(len(A) * len(G) for A, G in pairs)

    def _invert(self, damping: float) -> None:
        self._inverses = []
        for layer in self.moments:
            A, G = layer.inputs, layer.units
            of_units, of_inputs = float(_diagonal(G).mean()), float(A.diagonal().mean())
            # A dead layer has nothing to share by.
            share = math.sqrt(of_inputs / of_units) if of_units > 0 and of_inputs > 0 else 1.0
            root = math.sqrt(damping)
            inverse = 1 / (G + root / share) if G.ndim == 1 else _inverse(G, root / share)
            self._inverses.append((_inverse(A, share * root), inverse))

    def _solve(self, b: torch.Tensor) -> torch.Tensor:
        import torch

        parts, start = [], 0
        for layer, (A, G) in zip(self._linear, self._inverses, strict=True):
            width = layer.module.out_features
            inputs = layer.module.in_features if layer.weight else 0
            cut = start + width * inputs
            x = b[start:cut].reshape(width, inputs)
            if layer.bias:
                x = torch.cat([x, b[cut : cut + width, None]], dim=1)
            x = x @ A
            x = G[:, None] * x if G.ndim == 1 else G @ x
            parts += [x[:, :inputs].reshape(-1), *([x[:, -1]] if layer.bias else [])]
            start = cut + width * layer.bias
        return torch.cat(parts)


def _diagonal(moment: torch.Tensor) -> torch.Tensor:
    return moment if moment.ndim == 1 else moment.diagonal()


def _inverse(moment: torch.Tensor, damping: float) -> torch.Tensor:
    """(moment + damping I)^-1; of a damping that rounding leaves nothing of, ten times more."""
    import torch

    for _ in range(_TRIED):
        damped = moment.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return torch.cholesky_inverse(lower)
        damping *= 10
    raise ArgumentError("a moment of a layer's inputs or units has NaN or infinity")


class Compressed(Preconditioner):
    """A compressed matrix and its factor: any form of `compress`.

    Args:
        op: K of some samples.
        factor: what K is multiplied by to stand for all.
        options: of `compress`.
    """

    def __init__(self, op: Operator, factor: float, options: Mapping[str, Any]) -> None:
        self._factor: Any = None
        self._scale = factor
        with closeness_unsaid():  # what it misses costs steps, and no accuracy
            self._matrix: Any = compress(op, **options)

    @property
    def mean_diagonal(self) -> float:
        """See `Preconditioner`."""
        return self._scale * float(self._matrix.trace()) / int(self._matrix.shape[0])

    def _invert(self, damping: float) -> None:
        with closeness_unsaid():
            self._factor = self._matrix.factorize(damping / self._scale, shift="auto")

    def _solve(self, b: torch.Tensor) -> torch.Tensor:
        solve = getattr(self._factor, "precondition", self._factor.solve)
        with closeness_unsaid():
            found: torch.Tensor = solve(b) / self._scale
        return found
