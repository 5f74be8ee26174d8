"""Gauss-Newton steps as an optimizer of torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpu_hodlr import streams
from gpu_hodlr.applications.training.objective import Objective, Point
from gpu_hodlr.applications.training.preconditioner import Compressed, Kronecker, Moments
from gpu_hodlr.applications.training.quadratic import Quadratic
from gpu_hodlr.checks import check_count, check_number
from gpu_hodlr.errors import ArgumentError, UnsupportedLayerError
from gpu_hodlr.networks import GGNOperator
from gpu_hodlr.networks.data import Tree, inputs_and_targets
from gpu_hodlr.networks.model import Model, Output, Params
from gpu_hodlr.networks.unit_root import recorded, trained_linear
from gpu_hodlr.schemes import SCHEMES

if TYPE_CHECKING:
    from gpu_hodlr.devices import AnyDtype

_GOOD, _BAD = 0.75, 0.25  # ratios of decreases between which the damping stays
_HALVES = 4  # of a step, before it is given up
_REJECTED = 4.0  # times the damping, where it is
_REFRESH = {"kronecker": 5}  # steps with one matrix
_REFRESH_COMPRESSED = 50
_TRIED_SAMPLES = 64  # that the layers' part in the model is found out with
_OPTIONS = {"rtol": 0.1, "max_rank": 256}  # of a compression


@dataclass(frozen=True)
class StepInfo:
    """What a step of `GaussNewton` did.

    Attributes:
        loss: of the batch before, with the weight decay's part.
        new_loss: of the batch after; as before where the step was given up.
        ratio: the decrease over that of the quadratic model; NaN where rounding hides it.
        length: what the step was shortened to: 1, 1/2, ..; 0 where it was given up.
        damping: of the step.
        refreshed: whether the matrix was made anew for it.
    """

    loss: float
    new_loss: float
    ratio: float
    length: float
    damping: float
    refreshed: bool


class GaussNewton(torch.optim.Optimizer):  # type: ignore[misc]  # of no type
    """Levenberg-Marquardt steps on batches, preconditioned by a matrix that lasts for many.

    A step s minimizes g^T s + s^T (G + (weight_decay + damping) I) s / 2 over a few directions: the
    gradient g solved with a cheap matrix M near G, the step before (Martens and Grosse, ICML 2015,
    section 7), and further conjugate gradients where asked for. G is the exact Gauss-Newton matrix
    of the batch, by a forward pass a direction; so M decides how fast, and never how far. The loss
    after the step, over what the quadratic model said, raises or lowers the damping (Martens,
    ICML 2010); where it rises, the step is halved, and at last given up. M is made of a batch, and
    made anew when it is old, or when the model was bad.

    It is a torch optimizer: `param_groups` (one, as the matrix is one of all parameters) holds the
    options that can be changed while it runs, learning rate schedulers multiply the step by "lr",
    and `state_dict` has all but a compressed M, which is made anew. `.grad` is neither read nor
    written. Parameters, their modes and their device stay as they are: batch normalization and
    dropout must be in evaluation mode, as `GGNOperator` needs them.

    Args:
        model, loss, output, reduction: see `GGNOperator`. A mean is over the batch.
        params: see there too: what is trained, those that require grad by default.
        lr: what steps are multiplied by.
        damping: to begin with; None for the mean of G's diagonal at the first batch.
        weight_decay: of weight_decay norm(theta)^2 / 2, added to the loss.
        momentum: whether the step before is a direction.
        cg_steps: directions of M: 1 is the gradient's, more are conjugate gradients, a forward and
            a backward pass each.
        preconditioner: "kronecker", the factors of Linear layers (Martens and Grosse), or a form
            of `compress`: "kfe", "lowrank", "hss", ..; "auto" is "kronecker" where all that is
            trained are Linear layers that every sample goes through once, else "lowrank".
        curvature_samples: of the batch, that M is made of.
        model_samples: of the batch, that the quadratic model is made of.
        refresh_every: steps with one M at most; 5 of "kronecker", 50 of a compressed one.
        damping_decay: what the damping is multiplied by after a step that the model was right of,
            and divided by after one that it was wrong of; <= 1.
        dtype: see `GGNOperator`.
        seed: of the random vectors that M is made with.
        **options: of `compress`, for a compressed M: rtol (0.1), max_rank (256), ..

    Attributes:
        info: `StepInfo` of the last step, None before.

    Raises:
        ArgumentError, DtypeError, UnsupportedLayerError: as of `GGNOperator`, and an option.

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 40)[:, None]
        >>> model = torch.nn.Linear(1, 1)
        >>> optimizer = gh.GaussNewton(model, "mse", damping=1e-9)
        >>> _ = optimizer.step(x, 3 * x - 1)  # of a quadratic loss: to its minimum
        >>> [round(p.item(), 3) for p in model.parameters()]
        [3.0, -1.0]
    """

    def __init__(
        self,
        model: Model,
        loss: object,
        params: Params = None,
        *,
        lr: float = 1.0,
        damping: float | None = None,
        weight_decay: float = 0.0,
        momentum: bool = True,
        cg_steps: int = 1,
        preconditioner: str = "auto",
        curvature_samples: int = 1000,
        model_samples: int = 500,
        refresh_every: int | None = None,
        damping_decay: float = 0.9,
        output: Output = None,
        reduction: str | None = None,
        dtype: AnyDtype | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        names = ("auto", "kronecker", *(name for name in SCHEMES))
        if preconditioner not in names:
            raise ArgumentError(
                f"preconditioner must be one of {', '.join(names)}, got {preconditioner!r}"
            )
        if preconditioner == "kronecker" and options:
            raise ArgumentError(
                f"preconditioner 'kronecker' takes no option of compress, got {', '.join(options)}"
            )
        self._objective = Objective(model, loss, params, output, reduction, dtype, seed)
        self._arguments: dict[str, Any] = {
            "params": params, "output": output, "reduction": reduction, "dtype": dtype,
        }  # fmt: skip
        self._model, self._loss = model, loss
        self._seed = check_count(seed, "seed", least=0)
        self._kind = preconditioner
        self._options = {**_OPTIONS, "seed": seed, **options}
        self._curvature_samples = check_count(curvature_samples, "curvature_samples")
        self._model_samples = check_count(model_samples, "model_samples")
        self._linear = trained_linear(self._objective.chosen)
        if preconditioner == "kronecker" and self._linear is None:
            raise UnsupportedLayerError(
                "preconditioner='kronecker' needs all parameters in Linear layers, each in one "
                "place"
            )
        self._matrix: Kronecker | Compressed | None = None
        self.info: StepInfo | None = None
        own = [*self._objective.chosen.named.values()]
        super().__init__(
            own,
            {
                "lr": lr, "damping": damping, "weight_decay": weight_decay, "momentum": momentum,
                "cg_steps": cg_steps, "refresh_every": refresh_every,
                "damping_decay": damping_decay, "steps": 0, "age": None, "least_damping": 0.0,
                "matrix_damping": 0.0,
            },
        )  # fmt: skip
        self._checked()

    @property
    def _group(self) -> dict[str, Any]:
        group: dict[str, Any] = self.param_groups[0]
        return group

    def _checked(self) -> dict[str, Any]:
        """The options, which may have been changed.

        Raises:
            ArgumentError, DtypeError: one cannot be used.
        """
        group = self._group
        for name in ("lr", "weight_decay"):
            check_number(group[name], name)
        if check_number(group["damping_decay"], "damping_decay", positive=True) > 1:
            raise ArgumentError(f"damping_decay must be <= 1, got {group['damping_decay']}")
        check_count(group["cg_steps"], "cg_steps")
        if group["damping"] is not None:
            check_number(group["damping"], "damping", positive=True)
        if group["refresh_every"] is not None:
            check_count(group["refresh_every"], "refresh_every")
        return group

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Of the constructor alone: one matrix is of all parameters.

        Raises:
            ArgumentError: there is a group.

        Example:
            >>> import torch
            >>> optimizer = gh.GaussNewton(torch.nn.Linear(1, 1), "mse")
            >>> optimizer.add_param_group({"params": [torch.zeros(1)]})
            Traceback (most recent call last):
            gpu_hodlr.errors.ArgumentError: GaussNewton has one group: name all in params
        """
        if self.param_groups:
            raise ArgumentError("GaussNewton has one group: name all in params")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another one stood.

        Example:
            >>> import torch
            >>> model, x = torch.nn.Linear(2, 1), torch.eye(2)
            >>> one, two = (gh.GaussNewton(model, "mse") for _ in range(2))
            >>> _ = one.step(x, x[:, :1])
            >>> two.load_state_dict(one.state_dict())
            >>> two.param_groups[0]["steps"]
            1
        """
        super().load_state_dict(state_dict)
        self._matrix = None
        group, moments = self._group, []
        for p in self._objective.chosen.named.values():
            state = self.state.get(p, {})
            if "inputs_moment" in state:
                made = (state[key].to(self._objective.kind) for key in _MOMENTS)
                moments.append(Moments(*made))
        fits = self._linear is not None and len(moments) == len(self._linear)
        if moments and fits and self._kind in ("auto", "kronecker"):
            assert self._linear is not None
            self._matrix = Kronecker(self._linear, moments)
            if group["matrix_damping"]:
                self._matrix.invert(group["matrix_damping"])

    def __getstate__(self) -> dict[str, Any]:
        """All, where torch leaves out what a subclass has; without what schedulers put around."""
        return {name: value for name, value in vars(self).items() if name != "step"}

    def step(self, inputs: Tree | Callable[[], Tree], targets: Tree = None) -> float:
        """Train with a batch.

        Args:
            inputs: see `GGNOperator`; or a pair (inputs, targets), such as a DataLoader gives; or
                a closure that returns such a pair.
            targets: of the loss.

        Returns:
            The loss of the batch before the step.

        Raises:
            ArgumentError: the loss or its gradient is not finite; data that do not fit.
            ShapeError, DtypeError, DeviceError, UnsupportedLayerError: see `GGNOperator`.

        Example:
            >>> import torch
            >>> _ = torch.manual_seed(0)
            >>> x, y = torch.randn(60, 4), torch.arange(60) % 3
            >>> layers = torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
            >>> optimizer = gh.GaussNewton(torch.nn.Sequential(*layers), "cross_entropy")
            >>> losses = [optimizer.step(x, y) for _ in range(30)]
            >>> bool(losses[0] > 1), bool(losses[-1] < 0.2)
            (True, True)
        """
        if targets is None:
            closure = callable(inputs)
            given = inputs() if callable(inputs) else inputs
            inputs, targets = inputs_and_targets(tuple(given) if isinstance(given, list) else given)
            if targets is None and closure:
                raise ArgumentError(
                    "a closure must return (inputs, targets) of one batch, got "
                    f"{type(given).__name__}: loss and gradient are computed inside"
                )
            if targets is None:
                raise ArgumentError("targets are missing: give inputs and targets of one batch")
        group = self._checked()
        point = self._objective.at(inputs, targets)
        with point.network.plain():
            return self._step(point, group)

    def _step(self, point: Point, group: dict[str, Any]) -> float:
        decay = float(group["weight_decay"])
        point, loss, gradient = point.evaluated()
        theta = point.theta()
        if decay:
            gradient += decay * theta

        def objective(at: torch.Tensor) -> float:
            return point.value(at) + (0.5 * decay * float(at @ at) if decay else 0.0)

        before = loss + (0.5 * decay * float(theta @ theta) if decay else 0.0)
        slope = float(gradient @ gradient)
        if not (math.isfinite(before) and math.isfinite(slope)):
            raise ArgumentError(
                f"the loss of the batch is {before:.4g}, its gradient's norm {slope**0.5:.4g}: "
                "parameters or data have NaN or infinity, or are too large"
            )
        if slope == 0:
            self.info = StepInfo(before, before, math.nan, 1.0, group["damping"] or 0.0, False)
            return loss
        refreshed = self._prepared(point, group)
        damping = float(group["damping"])
        quadratic = Quadratic(
            point.part(self._model_samples), gradient, decay + damping, self._solve
        )
        step, predicted = quadratic.minimized(self._last(group), group["cg_steps"])
        rounding = 100 * float(torch.finfo(theta.dtype).eps) * abs(before)
        length, after, ratio = self._searched(
            objective, theta, step, float(group["lr"]), before, predicted, rounding
        )
        self._written(theta, step, float(group["lr"]) * length, group)
        self._adapt(group, ratio, length)
        group["steps"] += 1
        group["age"] += 1
        self.info = StepInfo(before, after, ratio, length, damping, refreshed)
        return loss

    # --- the matrix -------------------------------------------------------------------------------

    def _solve(self, b: torch.Tensor) -> torch.Tensor:
        assert self._matrix is not None
        group = self._group
        found = self._matrix.solve(b, group["damping"] + group["weight_decay"])
        group["matrix_damping"] = self._matrix.damping
        return found

    def _prepared(self, point: Point, group: dict[str, Any]) -> bool:
        """Make the matrix where there is none, or it is too old; True where it is made."""
        if self._kind == "auto" or (self._kind == "kronecker" and group["steps"] == 0):
            self._kind = self._chosen_kind(point)
        limit = group["refresh_every"] or _REFRESH.get(self._kind, _REFRESH_COMPRESSED)
        old = self._matrix is None or group["age"] is None or group["age"] >= limit
        if old:
            self._refresh(point.part(self._curvature_samples), group)
        if group["damping"] is None:
            assert self._matrix is not None
            group["damping"] = self._matrix.mean_diagonal or 1.0
        return old

    def _refresh(self, sample: Point, group: dict[str, Any]) -> None:
        """Make the matrix of some samples."""
        if self._kind == "kronecker":
            assert self._linear is not None
            made = Kronecker.of(sample, self._linear, self._stream(group))
            for layer, moments in zip(self._linear, made.moments, strict=True):
                state = self.state[layer.module.weight if layer.weight else layer.module.bias]
                state.update(zip(_MOMENTS, (moments.inputs, moments.units), strict=True))
            self._matrix = made
        else:
            self._matrix = self._compressed(sample)
        group["age"] = 0
        eps = float(torch.finfo(self._objective.kind).eps)
        group["least_damping"] = self._matrix.mean_diagonal * eps

    def _stream(self, group: dict[str, Any]) -> int:
        """The seed of a step."""
        mixed = np.random.SeedSequence((self._seed, streams.CURVATURE, group["steps"]))
        return int(mixed.generate_state(1)[0])

    def _chosen_kind(self, point: Point) -> str:
        """What "auto" stands for; "kronecker" is held to the network.

        Raises:
            UnsupportedLayerError: "kronecker" was asked for, and is not of this network.
        """
        try:
            if self._linear is not None:
                few = point.part(_TRIED_SAMPLES)
                recorded(few.problem, few.batch, self._linear)
                return "kronecker"
        except UnsupportedLayerError:
            if self._kind == "kronecker":
                raise
        return "lowrank"

    def _compressed(self, sample: Point) -> Compressed:
        batch = sample.batch
        entries = "none" if self._kind == "lowrank" else "auto"
        op = GGNOperator(
            self._model, self._loss, batch.inputs, batch.targets, entries=entries,
            **self._arguments,
        )  # fmt: skip
        factor = sample.scale * sample.problem.loss.divisor(
            sample.problem.loss.total(sample.problem.outputs(batch), batch.targets)
        )
        return Compressed(op, factor, {"scheme": self._kind, **self._options})

    # --- the step ---------------------------------------------------------------------------------

    def _last(self, group: dict[str, Any]) -> torch.Tensor | None:
        """The step before, (N,)."""
        own = self._objective.chosen.named.values()
        if not group["momentum"] or any("last_step" not in self.state[p] for p in own):
            return None
        parts = [self.state[p]["last_step"].reshape(-1) for p in own]
        return torch.cat(parts).to(self._objective.kind)

    def _searched(
        self, objective: Callable[[torch.Tensor], float], theta: torch.Tensor, step: torch.Tensor,
        lr: float, before: float, predicted: Callable[[float], float], rounding: float,
    ) -> tuple[float, float, float]:  # fmt: skip
        """What the step is shortened to, the loss there, and the ratio of the whole step."""
        ratio, said = math.nan, predicted(lr)
        for halves in range(_HALVES + 1):
            length = 0.5**halves
            after = objective(theta + lr * length * step)
            if halves == 0 and -said > rounding:
                ratio = (after - before) / said if math.isfinite(after) else -math.inf
            if after <= before + rounding:
                return length, after, ratio
        return 0.0, before, ratio

    def _written(
        self, theta: torch.Tensor, step: torch.Tensor, length: float, group: dict[str, Any]
    ) -> None:
        if not length:
            for p in self._objective.chosen.named.values():
                self.state[p].pop("last_step", None)
            return
        moved = length * step
        self._objective.written(theta + moved)
        start = 0
        for p in self._objective.chosen.named.values():
            self.state[p]["last_step"] = moved[start : start + p.numel()].reshape(p.shape)
            start += p.numel()

    def _adapt(self, group: dict[str, Any], ratio: float, length: float) -> None:
        """The damping by the ratio, and the matrix's age where the model was bad."""
        decay = float(group["damping_decay"])
        if not length:
            group["damping"] *= _REJECTED
        elif ratio > _GOOD:
            group["damping"] = max(group["damping"] * decay, group["least_damping"])
        elif ratio < _BAD:
            group["damping"] /= decay
        if not length or ratio < _BAD:
            group["age"] = math.inf  # a new matrix for the next step


_MOMENTS = "inputs_moment", "units_moment"
