"""Cross entropy: of class indices or probabilities, of samples or of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpu_hodlr.errors import ArgumentError, DtypeError, ShapeError
from gpu_hodlr.networks.losses.loss import Loss, Targets, check_outputs, check_real

if TYPE_CHECKING:
    import torch


class CrossEntropy(Loss):
    """-sum_c w_c t_c log p_c of every position, for softmax probabilities p.

    Its Hessian is s (diag(p) - p p^T) with the position's weight s = sum_c w_c t_c, and
    sqrt(s) (I - r r^T) diag(r) is a root of that for r = sqrt(p). t is the smoothed target.

    Outputs are (n, classes) or (n, classes, d1, ...), as torch has it, and targets indices (n,) or
    (n, d1, ...), or probabilities of the outputs' shape. Outputs (n, d1, ..., classes), as language
    models have it, are known by targets of shape (n, d1, ...), unless these fit torch's order too:
    then torch's order counts.

    Args:
        reduction: "mean", "sum" or "none".
        weight: (classes,) or None.
        ignore_index: the class whose positions do not count.
        label_smoothing: share of every class in every target.
    """

    name = "cross_entropy"
    empty = "every target has the ignored index, or loss.weight is 0 for its class"

    def __init__(
        self,
        reduction: str = "mean",
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(reduction)
        if not 0 <= label_smoothing <= 1:
            raise ArgumentError(f"loss.label_smoothing must lie in 0 .. 1, got {label_smoothing}")
        self.weight = weight
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def check(self, outputs: torch.Tensor, targets: Targets) -> None:
        """Refuse targets that do not fit.

        Raises:
            ShapeError, DtypeError, ArgumentError: shapes, dtypes, classes out of range, weights.
        """
        import torch

        check_outputs(outputs)
        given = _single(targets)
        if outputs.ndim < 2:
            raise ShapeError(
                f"model(inputs) must be (n, classes, ...) for {self.name}, "
                f"got {tuple(outputs.shape)}"
            )
        axis = self.class_axis(outputs, given)
        self._check_weight(outputs.shape[axis])
        if given.is_floating_point():
            check_real(given, "targets")
            if not bool((given >= 0).all()):
                raise ArgumentError("targets: probabilities must be finite and >= 0")
            return
        if given.is_complex() or given.dtype is torch.bool:
            raise DtypeError(
                f"targets must be real: class indices or probabilities, got {given.dtype}"
            )
        classes = outputs.shape[axis]
        wrong = (given != self.ignore_index) & ((given < 0) | (given >= classes))
        if bool(wrong.any()):
            first = int(given[wrong][0])
            raise ArgumentError(f"targets must lie in 0 .. {classes - 1}, got {first}")

    def _check_weight(self, classes: int) -> None:
        if self.weight is None:
            return
        check_real(self.weight, "loss.weight", (classes,))
        if not bool((self.weight >= 0).all()):
            raise ArgumentError("loss.weight: class weights must be finite and >= 0")

    def class_axis(self, outputs: torch.Tensor, targets: Targets) -> int:
        """The axis of the classes, 1 or the last.

        Raises:
            ShapeError: targets fit neither.
        """
        given = _single(targets)
        have = tuple(outputs.shape)
        shape = tuple(given.shape)
        if given.is_floating_point():
            if shape == have:
                return 1
            wanted = f"{have[:1] + have[2:]} class indices or {have} probabilities"
        else:
            if shape == have[:1] + have[2:]:
                return 1
            if shape == have[:-1]:
                return outputs.ndim - 1
            wanted = f"{have[:1] + have[2:]} class indices"
            if outputs.ndim > 2:
                wanted += f", {have[:-1]} with classes last,"
            wanted += f" or {have} probabilities"
        raise ShapeError(f"targets must have shape {wanted}, got {shape} of {given.dtype}")

    def position_weights(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """S = sum_c w_c t_c of every position, (n, d1, ...) float64."""
        import torch

        given = _single(targets)
        axis = self.class_axis(outputs, given)
        w = self._wide_weight(outputs)
        if given.is_floating_point():
            kept, spread = self._smoothed(w)
            wide = given.to(torch.float64)
            along = wide if w is None else wide * _along(w, wide.ndim, axis)
            return kept * along.sum(dim=axis) + spread
        counts, own = self._own_weights(given, w)
        if w is None:
            return own  # the smoothed target sums to 1
        kept, spread = self._smoothed(w)
        return own if kept == 1 else kept * own + spread * counts

    def _smoothed(self, w: torch.Tensor | None) -> tuple[float, float]:
        """kept, spread: s is kept times that of the target, plus what smoothing gives all."""
        eps = self.label_smoothing
        return 1 - eps, 0.0 if eps == 0 else eps * (1.0 if w is None else float(w.mean()))

    def _wide_weight(self, outputs: torch.Tensor) -> torch.Tensor | None:
        import torch

        if self.weight is None:
            return None
        return self.weight.detach().to(outputs.device, torch.float64)

    def _own_weights(
        self, targets: torch.Tensor, w: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """1 where a position counts, and the weight of its class, float64."""
        import torch

        counts = targets != self.ignore_index
        every = counts.to(torch.float64)
        if w is None:
            return every, every
        return every, every * w[torch.where(counts, targets, 0).long()]

    def total(self, outputs: torch.Tensor, targets: Targets) -> float:
        """The weights of the targets' classes; of probabilities their number."""
        given = _single(targets)
        if given.is_floating_point():
            return float(given.numel() // given.shape[1])
        return float(self._own_weights(given, self._wide_weight(outputs))[1].sum())

    def value(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The sum over the positions, a scalar."""
        import torch

        given = _single(targets)
        axis = self.class_axis(outputs, given)
        classes = outputs.shape[axis]
        log_p = torch.log_softmax(outputs, dim=axis)
        w = self._wide_weight(outputs)
        weighted = log_p if w is None else log_p * _along(w.to(outputs), outputs.ndim, axis)
        eps = self.label_smoothing
        if given.is_floating_point():
            smoothed = given.to(outputs)
            if eps:
                smoothed = smoothed * (1 - eps) + eps / classes
            return -(smoothed * weighted).sum()
        counts, own = self._own_weights(given, w)
        index = torch.where(given != self.ignore_index, given, 0).long().unsqueeze(axis)
        value = -(own.to(outputs) * log_p.gather(axis, index).squeeze(axis)).sum()
        if not eps:
            return value
        spread = -(counts.to(outputs) * weighted.sum(dim=axis)).sum()
        return (1 - eps) * value + (eps / classes) * spread

    def _parts(self, outputs: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, int]:
        """S in the outputs' dtype with an axis for the classes, and which axis that is."""
        axis = self.class_axis(outputs, targets)
        return self.position_weights(outputs, targets).to(outputs).unsqueeze(axis), axis

    def hessian_matmat(
        self, outputs: torch.Tensor, targets: Targets, z: torch.Tensor
    ) -> torch.Tensor:
        """S (diag(p) - p p^T) z."""
        import torch

        s, axis = self._parts(outputs, targets)
        p = torch.softmax(outputs, dim=axis)
        return s * p * (z - (p * z).sum(dim=axis + 1, keepdim=True))

    def root_transpose_matmat(
        self, outputs: torch.Tensor, targets: Targets, w: torch.Tensor
    ) -> torch.Tensor:
        """sqrt(s) diag(r) (I - r r^T) w."""
        import torch

        s, axis = self._parts(outputs, targets)
        r = torch.exp(0.5 * torch.log_softmax(outputs, dim=axis))
        w = w.reshape(-1, *outputs.shape)
        return s.sqrt() * r * (w - r * (r * w).sum(dim=axis + 1, keepdim=True))

    def sample(self, outputs: torch.Tensor, generator: torch.Generator, num: int) -> torch.Tensor:
        """Class indices (num, n, d1, ...) drawn from p, classes in axis 1."""
        return self._draw(outputs, 1, generator, num)

    def _draw(
        self, outputs: torch.Tensor, axis: int, generator: torch.Generator, num: int
    ) -> torch.Tensor:
        import torch

        last = torch.softmax(outputs.detach(), dim=axis).movedim(axis, -1)
        flat = last.reshape(-1, last.shape[-1])
        drawn = torch.multinomial(flat, num, replacement=True, generator=generator)
        return drawn.T.reshape(num, *last.shape[:-1])

    def sampled_gradients(
        self, outputs: torch.Tensor, targets: Targets, generator: torch.Generator, num: int
    ) -> torch.Tensor:
        """sqrt(s) (p - e_y) for y drawn from p."""
        import torch

        s, axis = self._parts(outputs, targets)
        index = self._draw(outputs, axis, generator, num).unsqueeze(axis + 1)
        p = torch.softmax(outputs, dim=axis).expand(num, *outputs.shape)
        minus = torch.full(index.shape, -1.0, dtype=outputs.dtype, device=outputs.device)
        return s.sqrt() * p.scatter_add(axis + 1, index, minus)


class NLL(CrossEntropy):
    """Negative log-likelihood of log-probabilities: the cross entropy with them as logits.

    `log_softmax` changes log-probabilities by nothing, so that the values are the same, and of
    a module that ends in LogSoftmax both matrices too: J^T H J with this H is that of the logits
    before. (The Hessian of -log p_t in log p itself is zero, and so would be its J^T H J.)
    """

    name = "nll"

    def check(self, outputs: torch.Tensor, targets: Targets) -> None:
        """Refuse targets that do not fit, and outputs that are no log-probabilities.

        Raises:
            ShapeError, DtypeError, ArgumentError: says which.
        """
        import torch

        super().check(outputs, targets)
        if _single(targets).is_floating_point():
            raise DtypeError(
                f"targets must be class indices for nll, got {_single(targets).dtype}; "
                "cross_entropy takes probabilities"
            )
        axis = self.class_axis(outputs, targets)
        off = float(torch.logsumexp(outputs.detach().double(), dim=axis).abs().max())
        if off > outputs.shape[axis] * 8 * torch.finfo(outputs.dtype).eps + 1e-6:
            raise ArgumentError(
                "model(inputs) must be log-probabilities for nll: the logarithm of their sum is "
                f"off 0 by {off:.1e}; cross_entropy takes logits"
            )


def _along(w: torch.Tensor, ndim: int, axis: int) -> torch.Tensor:
    """W along one axis of ndim."""
    return w.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _single(targets: Targets) -> torch.Tensor:
    """Targets that are one tensor.

    Raises:
        DtypeError: they are something else.
    """
    import torch

    if not isinstance(targets, torch.Tensor):
        raise DtypeError(f"targets must be one tensor, got {type(targets).__name__}")
    return targets
