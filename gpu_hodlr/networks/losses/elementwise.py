"""Losses that are sums over the outputs: their Hessian is a diagonal."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import TYPE_CHECKING

from gpu_hodlr.errors import ArgumentError, DtypeError, ShapeError
from gpu_hodlr.networks.losses.loss import Loss, Targets, check_outputs, check_real

if TYPE_CHECKING:
    import torch


class Elementwise(Loss):
    """sum_i w_i l(o_i, t_i) over the outputs o and targets t of one shape; "mean" is over outputs.

    Its Hessian is diag(w l''), and the root of that sqrt of it.
    """

    def check(self, outputs: torch.Tensor, targets: Targets) -> None:
        """Refuse targets that do not fit.

        Raises:
            ShapeError, DtypeError, ArgumentError: shapes, dtypes, values.
        """
        check_outputs(outputs)
        check_real(self.target(targets), "targets", tuple(outputs.shape))

    def target(self, targets: Targets) -> torch.Tensor:
        """The tensor of the outputs' shape.

        Raises:
            DtypeError: targets are something else.
        """
        import torch

        if not isinstance(targets, torch.Tensor):
            raise DtypeError(f"targets must be one tensor, got {type(targets).__name__}")
        return targets

    def total(self, outputs: torch.Tensor, targets: Targets) -> float:
        """The number of outputs."""
        return float(outputs.numel())

    @abstractmethod
    def curvature(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """W l'', of the outputs' shape or one that broadcasts to it; >= 0."""

    def hessian_matmat(
        self, outputs: torch.Tensor, targets: Targets, z: torch.Tensor
    ) -> torch.Tensor:
        """diag(w l'') z."""
        return self.curvature(outputs, targets) * z

    def root_transpose_matmat(
        self, outputs: torch.Tensor, targets: Targets, w: torch.Tensor
    ) -> torch.Tensor:
        """diag(sqrt(w l'')) w."""
        return self.curvature(outputs, targets).sqrt() * w.reshape(-1, *outputs.shape)


class MSE(Elementwise):
    """sum (o - t)^2; the likelihood exp(-value) is N(o, 1/2)."""

    name = "mse"

    def value(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The sum over all outputs, a scalar."""
        return ((outputs - self.target(targets).to(outputs)) ** 2).sum()

    def log_constant(self, outputs: torch.Tensor, targets: Targets) -> float:
        """Log(pi) / 2 of every output."""
        return 0.5 * math.log(math.pi) * outputs.numel()

    def curvature(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """2."""
        import torch

        return torch.full_like(outputs, 2.0)

    def sample(self, outputs: torch.Tensor, generator: torch.Generator, num: int) -> torch.Tensor:
        """Normal around the outputs, (num, *outputs.shape)."""
        return outputs + math.sqrt(0.5) * _normal(outputs, generator, num)

    def sampled_gradients(
        self, outputs: torch.Tensor, targets: Targets, generator: torch.Generator, num: int
    ) -> torch.Tensor:
        """2 (o - y) for y ~ N(o, 1/2)."""
        return -math.sqrt(2.0) * _normal(outputs, generator, num)


class BinaryCrossEntropy(Elementwise):
    """-w (q t log p + (1 - t) log(1 - p)) for the sigmoid p of the output; w, q >= 0.

    l'' = (q t + 1 - t) p (1 - p). Of many labels each output is one.

    Args:
        reduction: "mean", "sum" or "none".
        weight: w, broadcast to the outputs, the same for every sample; or None.
        pos_weight: q, likewise.
    """

    name = "binary_cross_entropy_with_logits"

    def __init__(
        self,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        pos_weight: torch.Tensor | None = None,
    ) -> None:
        super().__init__(reduction)
        self.weight = weight
        self.pos_weight = pos_weight

    def check(self, outputs: torch.Tensor, targets: Targets) -> None:
        """Refuse targets outside 0 .. 1, and weights that do not fit.

        Raises:
            ShapeError, DtypeError, ArgumentError: says which.
        """
        super().check(outputs, targets)
        given = self.target(targets)
        if not bool(((given >= 0) & (given <= 1)).all()):
            raise ArgumentError(f"targets must lie in 0 .. 1 for {self.name}")
        for name, w in (("loss.weight", self.weight), ("loss.pos_weight", self.pos_weight)):
            if w is not None:
                _check_broadcast(w, name, outputs)

    def value(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The sum over all outputs, a scalar."""
        from torch.nn import functional

        t = self.target(targets).to(outputs)
        positive = t if self.pos_weight is None else t * self.pos_weight.to(outputs)
        losses = -positive * functional.logsigmoid(outputs) - (1 - t) * functional.logsigmoid(
            -outputs
        )
        return (losses if self.weight is None else losses * self.weight.to(outputs)).sum()

    def _weights(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """W (q t + 1 - t)."""
        t = self.target(targets).to(outputs)
        both = t * 0 + 1 if self.pos_weight is None else t * self.pos_weight.to(outputs) + (1 - t)
        return both if self.weight is None else both * self.weight.to(outputs)

    def curvature(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """W (q t + 1 - t) p (1 - p)."""
        p = outputs.sigmoid()
        return self._weights(outputs, targets) * p * (-outputs).sigmoid()

    def sample(self, outputs: torch.Tensor, generator: torch.Generator, num: int) -> torch.Tensor:
        """1 with probability p, else 0, (num, *outputs.shape)."""
        p = outputs.detach().sigmoid().expand(num, *outputs.shape)
        return p.bernoulli(generator=generator)

    def sampled_gradients(
        self, outputs: torch.Tensor, targets: Targets, generator: torch.Generator, num: int
    ) -> torch.Tensor:
        """sqrt(w (q t + 1 - t)) (p - y) for y drawn from p."""
        drawn = self.sample(outputs, generator, num)
        return self._weights(outputs, targets).sqrt() * (outputs.sigmoid() - drawn)


class PoissonNLL(Elementwise):
    """exp(o) - t o, or o - t log(o + eps); l'' = exp(o), or t / (o + eps)^2.

    Args:
        reduction: "mean", "sum" or "none".
        log_input: whether the output is the logarithm of the rate.
        full: whether Stirling's term, of the targets alone, counts in the value.
        eps: added to a rate before its logarithm.
    """

    name = "poisson_nll"

    def __init__(
        self,
        reduction: str = "mean",
        log_input: bool = True,
        full: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(reduction)
        if not eps > 0:
            raise ArgumentError(f"loss.eps must be > 0, got {eps}")
        self.log_input = log_input
        self.full = full
        self.eps = eps

    def check(self, outputs: torch.Tensor, targets: Targets) -> None:
        """Refuse negative targets, and rates that are negative.

        Raises:
            ShapeError, DtypeError, ArgumentError: says which.
        """
        super().check(outputs, targets)
        if not bool((self.target(targets) >= 0).all()):
            raise ArgumentError("targets must be >= 0 for poisson_nll")
        if not self.log_input and not bool((outputs >= 0).all()):
            raise ArgumentError("model(inputs) must be rates >= 0 for poisson_nll, log_input=False")

    def value(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The sum over all outputs, a scalar."""
        t = self.target(targets).to(outputs)
        if self.log_input:
            losses = outputs.exp() - t * outputs
        else:
            losses = outputs - t * (outputs + self.eps).log()
        if self.full:
            losses = losses + _stirling(t)
        return losses.sum()

    def curvature(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """exp(o), or t / (o + eps)^2."""
        if self.log_input:
            return outputs.exp()
        return self.target(targets).to(outputs) / (outputs + self.eps) ** 2

    def log_constant(self, outputs: torch.Tensor, targets: Targets) -> float:
        """Log(t!) of every target, or what Stirling's term lacks of it."""
        t = self.target(targets).double()
        exact = (t + 1).lgamma()
        return float((exact - _stirling(t) if self.full else exact).sum())

    def _rate(self, outputs: torch.Tensor) -> torch.Tensor:
        return outputs.exp() if self.log_input else outputs + self.eps

    def sample(self, outputs: torch.Tensor, generator: torch.Generator, num: int) -> torch.Tensor:
        """Counts of the rate, (num, *outputs.shape)."""
        import torch

        rate = self._rate(outputs.detach()).expand(num, *outputs.shape)
        return torch.poisson(rate, generator=generator)

    def sampled_gradients(
        self, outputs: torch.Tensor, targets: Targets, generator: torch.Generator, num: int
    ) -> torch.Tensor:
        """exp(o) - y, or 1 - y / (o + eps), for counts y."""
        rate, drawn = self._rate(outputs), self.sample(outputs, generator, num)
        return rate - drawn if self.log_input else 1 - drawn / rate


class GaussianNLL(Elementwise):
    """(log v + (o - t)^2 / v) / 2 for variances v that are given, no less than eps; l'' = 1 / v.

    Targets are (target, variance), the variance of the outputs' shape or with a last axis of 1 or
    without that; or the target alone where one variance of all is given. With a variance that the
    network predicts the loss is not convex in the outputs.

    Args:
        reduction: "mean", "sum" or "none".
        full: whether log(2 pi) / 2 counts in the value.
        eps: what smaller variances are raised to.
        var: the variance of all outputs, or None.
    """

    name = "gaussian_nll"

    def __init__(
        self,
        reduction: str = "mean",
        full: bool = False,
        eps: float = 1e-6,
        var: float | None = None,
    ) -> None:
        super().__init__(reduction)
        if not eps > 0:
            raise ArgumentError(f"loss.eps must be > 0, got {eps}")
        if var is not None and not isinstance(var, (int, float)):
            raise ArgumentError(
                f"loss.var must be one number, got {type(var).__name__}; variances of samples "
                "stand in targets, (target, variance)"
            )
        if var is not None and not 0 <= var < math.inf:
            raise ArgumentError(f"loss.var must be >= 0 and finite, got {var}")
        self.full = full
        self.eps = eps
        self.var = var

    def target(self, targets: Targets) -> torch.Tensor:
        """The target without its variance.

        Raises:
            ArgumentError: no variance is given.
            DtypeError: targets are neither a pair nor a tensor.
        """
        if self.var is not None:
            return super().target(targets)
        if not isinstance(targets, (tuple, list)) or len(targets) != 2:
            raise ArgumentError(
                "targets must be a pair (target, variance) for gaussian_nll: with a variance that "
                "the network predicts it is not convex in the outputs"
            )
        return super().target(targets[0])

    def check(self, outputs: torch.Tensor, targets: Targets) -> None:
        """Refuse variances that are negative or of another shape.

        Raises:
            ShapeError, DtypeError, ArgumentError: says which.
        """
        super().check(outputs, targets)
        if self.var is not None:
            return
        v, shape = targets[1], tuple(outputs.shape)
        check_real(v, "targets: variances")
        known = {shape, (*shape[:-1], 1)} | ({shape[:-1]} if len(shape) > 1 else set())
        if tuple(v.shape) not in known:
            raise ShapeError(
                f"targets: variances must have shape {shape} or {(*shape[:-1], 1)}, "
                f"got {tuple(v.shape)}"
            )
        if not bool((v >= 0).all()):
            raise ArgumentError("targets: variances must be >= 0")

    def _variance(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """V of the outputs' shape."""
        import torch

        if self.var is not None:
            return torch.full_like(outputs, max(self.var, self.eps))
        v = targets[1].detach().to(outputs).clamp(min=self.eps)
        same = tuple(v.shape) == tuple(outputs.shape)
        if not same and v.ndim == outputs.ndim - 1:
            v = v.unsqueeze(-1)
        return v.expand(outputs.shape)

    def value(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The sum over all outputs, a scalar."""
        v = self._variance(outputs, targets)
        value = 0.5 * (v.log() + (outputs - self.target(targets).to(outputs)) ** 2 / v).sum()
        return value + 0.5 * math.log(2 * math.pi) * outputs.numel() if self.full else value

    def log_constant(self, outputs: torch.Tensor, targets: Targets) -> float:
        """Log(2 pi) / 2 of every output, unless it counts in the value."""
        return 0.0 if self.full else 0.5 * math.log(2 * math.pi) * outputs.numel()

    def curvature(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """1 / v."""
        return 1 / self._variance(outputs, targets)

    def sample(self, outputs: torch.Tensor, generator: torch.Generator, num: int) -> torch.Tensor:
        """Normal around the outputs, (num, *outputs.shape).

        Raises:
            ArgumentError: the variances are in the targets, which `sampled_gradients` takes.
        """
        if self.var is None:
            raise ArgumentError("gaussian_nll is sampled with its variances: sampled_gradients")
        deviation = math.sqrt(max(self.var, self.eps))
        return outputs + deviation * _normal(outputs, generator, num)

    def sampled_gradients(
        self, outputs: torch.Tensor, targets: Targets, generator: torch.Generator, num: int
    ) -> torch.Tensor:
        """(o - y) / v for y ~ N(o, v)."""
        return -self.curvature(outputs, targets).sqrt() * _normal(outputs, generator, num)


class Huber(Elementwise):
    """(e^2 / 2 where |e| < delta, else delta (|e| - delta / 2)) / scale, e = o - t.

    l'' is 1 / scale inside and 0 outside: a convex loss. "smooth_l1" has scale = delta = beta.

    Args:
        reduction: "mean", "sum" or "none".
        delta: where it becomes linear.
        scale: what it is divided by.
        name: "huber" or "smooth_l1".
    """

    def __init__(
        self,
        reduction: str = "mean",
        delta: float = 1.0,
        scale: float = 1.0,
        name: str = "huber",
    ) -> None:
        super().__init__(reduction)
        self.name = name
        if not 0 < delta < math.inf:
            said = "loss.delta" if name == "huber" else "loss.beta"
            raise ArgumentError(f"{said} must be > 0 and finite, got {delta}")
        self.delta = delta
        self.scale = scale

    def value(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The sum over all outputs, a scalar."""
        import torch

        e = outputs - self.target(targets).to(outputs)
        outside = self.delta * (e.abs() - 0.5 * self.delta)
        return torch.where(e.abs() < self.delta, 0.5 * e * e, outside).sum() / self.scale

    def curvature(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """1 / scale inside, 0 outside."""
        inside = (outputs - self.target(targets).to(outputs)).abs() < self.delta
        return inside.to(outputs) / self.scale

    def sample(self, outputs: torch.Tensor, generator: torch.Generator, num: int) -> torch.Tensor:
        """O - e for e of the density exp(-l(e)): normal inside, exponential outside."""
        return outputs - self._residuals(outputs, generator, num)

    def _halves(self) -> tuple[float, float, float, float]:
        """Deviation inside, delta in units of it, and the integrals of exp(-l(e)), e >= 0."""
        deviation = math.sqrt(self.scale)
        cut = self.delta / deviation
        inside = math.sqrt(math.pi / 2) * deviation * math.erf(cut / math.sqrt(2))
        outside = self.scale / self.delta * math.exp(-0.5 * cut * cut)
        return deviation, cut, inside, outside

    def log_constant(self, outputs: torch.Tensor, targets: Targets) -> float:
        """Log of the integral of exp(-l(e)), of every output."""
        return math.log(2 * sum(self._halves()[2:])) * outputs.numel()

    def _residuals(
        self, outputs: torch.Tensor, generator: torch.Generator, num: int
    ) -> torch.Tensor:
        """E by the inverse distribution function of |e|, and a sign."""
        import torch

        deviation, cut, inside, outside = self._halves()
        share = inside / (inside + outside)
        u, sign = torch.rand(
            (2, num, *outputs.shape),
            dtype=outputs.dtype,
            device=outputs.device,
            generator=generator,
        )
        normal = (
            deviation
            * math.sqrt(2)
            * torch.erfinv((u / share).clamp(max=1) * math.erf(cut / math.sqrt(2)))
        )
        left = ((1 - u) / (1 - share)).clamp(min=torch.finfo(u.dtype).tiny, max=1)
        tail = self.delta - self.scale / self.delta * left.log()
        return torch.where(u < share, normal, tail) * torch.where(sign < 0.5, -1.0, 1.0)

    def sampled_gradients(
        self, outputs: torch.Tensor, targets: Targets, generator: torch.Generator, num: int
    ) -> torch.Tensor:
        """l'(e) for drawn e."""
        e = self._residuals(outputs, generator, num)
        return e.clamp(-self.delta, self.delta) / self.scale


def _stirling(t: torch.Tensor) -> torch.Tensor:
    """What torch takes for log(t!)."""
    import torch

    safe = t.clamp(min=1.0)
    return torch.where(t > 1, safe * safe.log() - safe + 0.5 * (2 * math.pi * safe).log(), 0.0)


def _normal(outputs: torch.Tensor, generator: torch.Generator, num: int) -> torch.Tensor:
    """Standard normal numbers (num, *outputs.shape)."""
    import torch

    return torch.randn(
        (num, *outputs.shape), dtype=outputs.dtype, device=outputs.device, generator=generator
    )


def _check_broadcast(w: torch.Tensor, name: str, outputs: torch.Tensor) -> None:
    """Refuse weights that do not broadcast to the outputs, or differ between samples.

    Raises:
        ShapeError, DtypeError, ArgumentError: says which.
    """
    check_real(w, name)
    have, wanted = tuple(w.shape), tuple(outputs.shape)
    aligned = (1,) * (len(wanted) - len(have)) + have
    fits = len(aligned) == len(wanted) and all(
        a in (1, b) for a, b in zip(aligned[1:], wanted[1:], strict=True)
    )
    if not fits or aligned[0] not in (1, wanted[0]):
        raise ShapeError(f"{name} must broadcast to the outputs {wanted}, got {have}")
    if aligned[0] != 1:
        raise ArgumentError(f"{name} must be the same for every sample, got one of {have}")
    if not bool((w >= 0).all()):
        raise ArgumentError(f"{name} must be finite and >= 0")
