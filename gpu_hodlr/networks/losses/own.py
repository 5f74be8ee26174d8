"""An object of the user's own as a loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from gpu_hodlr.errors import ArgumentError, ShapeError
from gpu_hodlr.networks.losses.loss import Loss, Targets, check_outputs

if TYPE_CHECKING:
    import torch


class LossLike(Protocol):
    """What an own loss must have: a value, and its Hessian in one of two forms.

    `value(outputs, targets)` is a sum over samples that torch can differentiate twice. One of
    `hessian_matmat(outputs, targets, z)` and `hessian_root(outputs, targets)`, as `Loss` has them,
    or both; `sample(outputs, generator, num)` for the sampled Fisher matrix. It may have `name`,
    `convex` (True by default where it has a root, else it must be said), `reduction` and
    `total(outputs, targets)` (the number of samples by default).
    """

    def value(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The sum over the samples, a scalar."""
        ...


class OwnLoss(Loss):
    """An object with `value` and `hessian_matmat` or `hessian_root`, held to each other by `check`.

    Args:
        own: see `LossLike`.
        reduction: "mean", "sum" or "none"; its own, or "mean", by default.

    Raises:
        ArgumentError: something is missing.
    """

    def __init__(self, own: LossLike, reduction: str | None) -> None:
        super().__init__(getattr(own, "reduction", "mean") if reduction is None else reduction)
        self.name = str(getattr(own, "name", type(own).__qualname__))
        self._own = own
        self._matmat = getattr(own, "hessian_matmat", None)
        self._root = getattr(own, "hessian_root", None)
        if self._matmat is None and self._root is None:
            raise ArgumentError(f"loss {self.name} must have hessian_matmat or hessian_root")
        convex = getattr(own, "convex", None)
        if convex is None and self._root is None:
            raise ArgumentError(
                f"loss {self.name} must say whether it is convex in the outputs: convex = True or "
                "False, or hessian_root"
            )
        self.convex = True if convex is None else bool(convex)

    def check(self, outputs: torch.Tensor, targets: Targets) -> None:
        """Its own check; then hold its Hessian to its value at these outputs.

        Raises:
            ShapeError, DtypeError, ArgumentError: not a sum over samples, or another Hessian.
        """
        import torch

        check_outputs(outputs)
        own_check = getattr(self._own, "check", None)
        if own_check is not None:
            own_check(outputs, targets)
        self._check_sum(outputs, targets)
        generator = torch.Generator(outputs.device).manual_seed(0)
        z = torch.randn(
            (2, *outputs.shape), dtype=outputs.dtype, device=outputs.device, generator=generator
        )
        z[1, ::2] = 0  # what the Hessian makes of some samples stays with them
        want = self._second_derivative(outputs, targets, z)
        scale = float(want.abs().max())
        tolerance = 1e4 * torch.finfo(outputs.dtype).eps * scale
        if float(want[1, ::2].abs().max()) > tolerance:
            raise ArgumentError(f"loss {self.name}: its value must be a sum over samples")
        for form, matmat in (("hessian_matmat", self._matmat), ("hessian_root", self._by_root)):
            if matmat is None or (form == "hessian_root" and self._root is None):
                continue
            got = matmat(outputs, targets, z)
            if got.shape != z.shape:
                raise ShapeError(
                    f"loss {self.name}: {form} gives {tuple(got.shape)}, wanted {tuple(z.shape)}"
                )
            off = float((got - want).abs().max())
            if not off <= tolerance:
                raise ArgumentError(
                    f"loss {self.name}: {form} must be the Hessian of its value, from which it "
                    f"differs by {off:.1e} of {scale:.1e}"
                )

    def _check_sum(self, outputs: torch.Tensor, targets: Targets) -> None:
        """Refuse a value that is another of the samples together than of each half.

        Raises:
            ArgumentError: it is.
        """
        import torch

        half = (len(outputs) + 1) // 2
        if half == len(outputs):
            return
        with torch.no_grad():
            whole = float(self.value(outputs, targets))
            parts = [
                float(self.value(outputs[part], _of(targets, part)))
                for part in (slice(0, half), slice(half, None))
            ]
        scale = max(map(abs, (whole, *parts)))
        if not abs(whole - sum(parts)) <= 1e4 * torch.finfo(outputs.dtype).eps * scale:
            raise ArgumentError(
                f"loss {self.name}: its value must be a sum over samples, got {whole:.6g} of all "
                f"and {parts[0]:.6g} + {parts[1]:.6g} of halves; reduction='mean' divides by total"
            )

    def _gradient(
        self, outputs: torch.Tensor, targets: Targets, again: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The outputs as a leaf, and the gradient of the value in it."""
        import torch

        with torch.inference_mode(False), torch.enable_grad():
            leaf = outputs.detach().clone().requires_grad_()
            value = self.value(leaf, targets)
            if not isinstance(value, torch.Tensor) or value.ndim or not value.requires_grad:
                raise ArgumentError(
                    f"loss {self.name}: its value must be a scalar tensor that torch can "
                    "differentiate in the outputs"
                )
            (gradient,) = torch.autograd.grad(value, leaf, create_graph=again)
        return leaf, gradient

    def _second_derivative(
        self, outputs: torch.Tensor, targets: Targets, z: torch.Tensor
    ) -> torch.Tensor:
        """H z by reverse over reverse."""
        import torch

        leaf, gradient = self._gradient(outputs, targets, again=True)
        if not gradient.requires_grad:
            return torch.zeros_like(z)
        parts = []
        for column in z:
            (part,) = torch.autograd.grad(
                gradient, leaf, column, retain_graph=True, materialize_grads=True
            )
            parts.append(part)
        return torch.stack(parts)

    def value(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The sum over the samples, a scalar."""
        return self._own.value(outputs, targets)

    def total(self, outputs: torch.Tensor, targets: Targets) -> float:
        """Its own, or the number of samples."""
        total = getattr(self._own, "total", None)
        return float(len(outputs) if total is None else total(outputs, targets))

    def hessian_matmat(
        self, outputs: torch.Tensor, targets: Targets, z: torch.Tensor
    ) -> torch.Tensor:
        """Its own, or S^T S z."""
        own = self._by_root if self._matmat is None else self._matmat
        return own(outputs, targets, z)

    def _by_root(self, outputs: torch.Tensor, targets: Targets, z: torch.Tensor) -> torch.Tensor:
        import torch

        root = self.hessian_root(outputs, targets).flatten(2)
        pushed = torch.einsum("nrd,knd->knr", root, z.reshape(len(z), len(outputs), -1))
        return torch.einsum("nrd,knr->knd", root, pushed).reshape(z.shape)

    def root_size(self, outputs: torch.Tensor, targets: Targets) -> int:
        """Rows r of a sample's root."""
        return self.hessian_root(outputs[:1], _of(targets, slice(0, 1))).shape[1]

    def hessian_root(self, outputs: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Its own; else sqrt(D) V^T of the eigendecomposition of each sample's Hessian.

        Raises:
            ArgumentError: it has a negative eigenvalue.
        """
        import torch

        if self._root is not None:
            return self._root(outputs, targets)
        n, d = len(outputs), outputs[0].numel()
        identity = torch.eye(d, dtype=outputs.dtype, device=outputs.device)
        z = identity[:, None].expand(d, n, d).reshape(d, *outputs.shape)
        dense = self.hessian_matmat(outputs, targets, z).reshape(d, n, d).transpose(0, 1)
        values, vectors = torch.linalg.eigh((dense + dense.mT) / 2)
        floor = 1e2 * d * torch.finfo(outputs.dtype).eps * float(values.abs().max())
        if float(values.min()) < -floor:
            raise ArgumentError(
                f"loss {self.name} is not convex in the outputs: its Hessian has the eigenvalue "
                f"{float(values.min()):.1e}"
            )
        root = values.clamp(min=0).sqrt()[:, :, None] * vectors.mT
        return root.reshape(n, d, *outputs.shape[1:])

    def root_transpose_matmat(
        self, outputs: torch.Tensor, targets: Targets, w: torch.Tensor
    ) -> torch.Tensor:
        """S^T w."""
        import torch

        root = self.hessian_root(outputs, targets).flatten(2)
        return torch.einsum("nrd,knr->knd", root, w).reshape(len(w), *outputs.shape)

    def sample(self, outputs: torch.Tensor, generator: torch.Generator, num: int) -> torch.Tensor:
        """Its own.

        Raises:
            ArgumentError: it has none.
        """
        own = getattr(self._own, "sample", None)
        if own is None:
            raise ArgumentError(f"loss {self.name} must have sample(outputs, generator, num)")
        return own(outputs, generator, num)

    def sampled_gradients(
        self, outputs: torch.Tensor, targets: Targets, generator: torch.Generator, num: int
    ) -> torch.Tensor:
        """Gradients of its value at its own samples; weights that it takes from targets count not.

        Raises:
            ArgumentError: it has no samples.
        """
        import torch

        drawn = self.sample(outputs, generator, num)
        return torch.stack([self._gradient(outputs, y, again=False)[1] for y in drawn])


def _of(targets: Targets, part: slice) -> Targets:
    """Of some samples."""
    if isinstance(targets, (tuple, list)):
        return tuple(t[part] for t in targets)
    return targets[part]
