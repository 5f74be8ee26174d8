"""A `hessian_structure` of laplace-torch: its full Gauss-Newton matrix, compressed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from laplace.baselaplace import ParametricLaplace

from gpu_hodlr.applications.laplace.curvature import Curvature
from gpu_hodlr.applications.laplace.prediction import products_with_inverse
from gpu_hodlr.applications.laplace.prior import Prior
from gpu_hodlr.arrays import tensor_of
from gpu_hodlr.compressed.structured import StructuredMatrix
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.networks import GGNOperator

_LOSS = {"classification": "cross_entropy", "regression": "mse"}


class CompressedLaplace(ParametricLaplace):  # type: ignore[misc]  # of no type
    """What laplace-torch's FullLaplace is, with H compressed: `hessian_structure="gpu_hodlr"`.

    Importing `gpu_hodlr.laplace_torch` registers it. Evidence, the optimization of prior and noise
    by its gradient, predictions, samples and state_dict are laplace-torch's own methods. H is the
    Gauss-Newton matrix of all parameters that require grad, compressed for the smallest prior
    precision so far as `gpu_hodlr.Laplace` does it; a smaller one compresses it again. H / sigma^2
    / temperature + P is factorized once for every prior.

    Args:
        model: see laplace-torch, like what is not named here; `backend` gives Jacobians alone.
        likelihood: "classification", (n, classes) outputs, or "regression".
        compression: options of `gpu_hodlr.compress`: scheme, rtol, max_rank, ...; see
            `gpu_hodlr.Laplace`.

    Attributes:
        H: the compressed matrix; None before `fit`.

    Raises:
        ArgumentError: another likelihood; enable_backprop, which a compressed matrix has not.

    Warns:
        AccuracyWarning: see `gpu_hodlr.Laplace`.
    """

    _key = ("all", "gpu_hodlr")

    def __init__(
        self,
        model: torch.nn.Module,
        likelihood: str,
        *args: Any,
        compression: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._options = {"scheme": "auto", "seed": 0, **(compression or {})}
        super().__init__(model, likelihood, *args, **kwargs)
        if self.likelihood not in _LOSS:
            raise ArgumentError(
                f"likelihood must be one of {', '.join(_LOSS)}, got {self.likelihood!r}"
            )
        if self.enable_backprop:
            raise ArgumentError("enable_backprop: a variance has no gradient in the inputs here")
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._sizes = {name: p.numel() for name, p in named}

    @property
    def H(self) -> StructuredMatrix | None:  # noqa: N802  laplace-torch's names
        """The Gauss-Newton matrix of the summed loss, without noise; twice that of regression."""
        return None if self._curvature is None else self._curvature.matrix

    @H.setter
    def H(self, matrix: StructuredMatrix | None) -> None:  # noqa: N802
        """What `load_state_dict` brings, which cannot be compressed again."""
        self._curvature = None if matrix is None else Curvature(None, matrix, {})
        self._factorized: tuple[bytes, Any] = (b"", None)

    def _init_H(self) -> None:  # noqa: N802
        self.H = None

    def fit(self, train_loader: Any, override: bool = True, progress_bar: bool = False) -> None:
        """See laplace-torch; batches of (inputs, targets), read once and kept.

        Args:
            train_loader: a DataLoader.
            override: True: a compressed matrix is not added to.
            progress_bar: of the compression.

        Raises:
            ArgumentError: override is False, batches are not pairs of tensors; see `GGNOperator`.
        """
        if not override:
            raise ArgumentError("override must be True: a compressed matrix is not added to")
        self.model.eval()
        self._init_H()
        self.mean = torch.nn.utils.parameters_to_vector(self.params).detach()
        self.loss, pieces = 0.0, []
        for batch in train_loader:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise ArgumentError(
                    f"train_loader must give pairs of tensors, got {type(batch).__name__}"
                )
            x, y = (part.to(self._device) for part in batch)
            with torch.no_grad():
                outputs = self.model(x)
                self.loss += self.backend.factor * self.backend.lossfunc(outputs, y)
            pieces.append((x, y))
        self.n_outputs = self.model.output_size = outputs.shape[-1]
        self.n_data = len(train_loader.dataset)
        inputs, targets = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        op = GGNOperator(
            self.model, _LOSS[self.likelihood], inputs, targets, reduction="sum",
            seed=self._options["seed"],
        )  # fmt: skip
        self._curvature = Curvature(op, None, {**self._options, "progress": progress_bar})
        self._at(self.prior_precision, self._H_factor)

    def _scale(self, H_factor: torch.Tensor) -> float:
        """What H is multiplied by; laplace-torch takes half the squared error."""
        return float(H_factor) * float(self.backend.factor)

    def _at(self, precision: torch.Tensor, H_factor: torch.Tensor) -> tuple[Any, Prior, float]:
        """Of s H + P the factor of H + P / s, the prior P / s, and s."""
        self._check_H_init()
        curvature: Any = self._curvature
        scale = self._scale(H_factor)
        rows = precision.detach().double().cpu().numpy() / scale
        given: Any = rows
        if len(rows) == 1:
            given = float(rows[0])
        elif len(rows) != self.n_params:
            given = dict(zip(self._sizes, rows, strict=True))
        prior = Prior.read(given, self._sizes)
        key = rows.tobytes()
        if self._factorized[0] != key:
            self._factorized = key, curvature.factor(prior)
            curvature.warn(prior, frames=3)
        return self._factorized[1], prior, scale

    def _check_H_init(self) -> None:  # noqa: N802
        """See laplace-torch; while `fit` compresses there is no H yet."""
        if self._curvature is None:
            raise AttributeError("Laplace not fitted. Run fit() first.")

    @property
    def factor(self) -> tuple[Any, float]:
        """F and s: the posterior precision is s times what F is the factor of."""
        found, _, scale = self._at(self.prior_precision, self._H_factor)
        return found, scale

    @property
    def posterior_precision(self) -> tuple[tuple[StructuredMatrix | None, float], torch.Tensor]:
        """((H, s), P) of s H + diag(P), as LowRankLaplace has it."""
        self._check_H_init()
        return (self.H, self._scale(self._H_factor)), self.prior_precision_diag

    @property
    def log_det_posterior_precision(self) -> torch.Tensor:
        """Log det(s H + P), with gradients in prior_precision and sigma_noise."""
        found: torch.Tensor = _LogDet.apply(self.prior_precision, self._H_factor, self)
        return found

    def square_norm(self, value: torch.Tensor) -> torch.Tensor:
        """(value - mean)^T (s H + P) (value - mean)."""
        (H, scale), precision = self.posterior_precision
        assert H is not None
        delta = value - self.mean
        return scale * (delta @ (H @ delta)) + delta @ (precision * delta)

    def functional_variance(self, Js: torch.Tensor) -> torch.Tensor:
        """J (s H + P)^-1 J^T of every sample, (n, outputs, outputs), for (n, outputs, N)."""
        F, scale = self.factor
        return products_with_inverse(F, Js) / scale

    def functional_covariance(self, Js: torch.Tensor) -> torch.Tensor:
        """The same of all samples together, (n outputs, n outputs)."""
        F, scale = self.factor
        return products_with_inverse(F, Js.flatten(0, 1)[None])[0] / scale

    def sample(
        self, n_samples: int = 100, generator: torch.Generator | None = None
    ) -> torch.Tensor:
        """Parameters drawn from the posterior, (n_samples, N); see `Laplace.sample`."""
        F, scale = self.factor
        device = None if generator is None else generator.device
        seed = int(torch.randint(1 << 31, (), generator=generator, device=device))
        noise = to_host(F.sample(n_samples, seed, inverse=True)).T / scale**0.5
        return self.mean + tensor_of(np.ascontiguousarray(noise)).to(self.mean)


class _LogDet(torch.autograd.Function):  # type: ignore[misc]  # of no type
    """Log det(s H + P), s proportional to H_factor: its derivatives are traces of the inverse."""

    @staticmethod
    def forward(
        ctx: Any, precision: torch.Tensor, H_factor: torch.Tensor, owner: CompressedLaplace
    ) -> torch.Tensor:
        ctx.owner = owner
        ctx.save_for_backward(precision, H_factor)
        F, _, scale = owner._at(precision, H_factor)
        return precision.new_tensor(owner.n_params * np.log(scale) + F.logdet())

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        precision, H_factor = ctx.saved_tensors
        F, prior, scale = ctx.owner._at(precision, H_factor)
        n = ctx.owner.n_params
        if len(precision) == 1:
            traces = np.array([F.logdet_gradient()])
        else:
            diagonal = to_host(F.inverse_diagonal()).astype(np.float64)
            traces = diagonal if len(precision) == n else prior.sums(diagonal)
        slope = precision.new_tensor(traces / scale)
        # tr((s H + P)^-1 s H) = N - tr((s H + P)^-1 P)
        decided = (n - precision @ slope) / H_factor
        return gradients[0] * slope, gradients[0] * decided, None
