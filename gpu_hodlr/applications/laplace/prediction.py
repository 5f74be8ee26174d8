"""What a posterior says of new inputs: outputs with their variance, and classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu_hodlr.applications.laplace.likelihood import Likelihood
from gpu_hodlr.applications.linearized import Linearized
from gpu_hodlr.arrays import as_array, tensor_of
from gpu_hodlr.devices import move
from gpu_hodlr.errors import ArgumentError
from gpu_hodlr.networks.data import Batch

if TYPE_CHECKING:
    import torch

LINKS = ("auto", "probit", "mc")


@dataclass(frozen=True, eq=False)
class LaplacePrediction:
    """What `Laplace.predict` found, tensors where the model is.

    Attributes:
        mean: (n, ...) the network's outputs.
        variance: of the shape of mean, theirs, without that of an observation.
        covariance: (n, d, d) of the d outputs of each sample, flattened; None where not asked for.
        probabilities: of the shape of mean, of the classes (or labels); None where there are none.

    Example:
        >>> import torch
        >>> x = torch.ones(4, 1, dtype=torch.float64)
        >>> posterior = gh.Laplace(torch.nn.Linear(1, 1).double(), "mse", (x, x), 1.0)
        >>> found = posterior.predict(x[:1], covariance=True)  # 2 parameters, G = 8 [1 1; 1 1]
        >>> round(float(found.variance), 4), found.covariance.shape, found.probabilities
        (0.1176, torch.Size([1, 1, 1]), None)
    """

    mean: torch.Tensor
    variance: torch.Tensor
    covariance: torch.Tensor | None
    probabilities: torch.Tensor | None


def check_link(link: Any, kind: str) -> str | None:
    """The link that is meant, None for none.

    Raises:
        ArgumentError: there is no such link, or the loss has no classes.
    """
    if link is not None and link not in LINKS:
        raise ArgumentError(f"link must be None or one of {', '.join(LINKS)}, got {link!r}")
    if kind == "values":
        if link in ("probit", "mc"):
            raise ArgumentError(f"link {link!r} is for losses with classes, and this has none")
        return None
    return "probit" if link == "auto" else link


def predicted(
    linear: Linearized,
    factor: Any,
    batch: Batch,
    likelihood: Likelihood,
    link: str | None,
    covariance: bool,
    num_samples: int,
    seed: int,
) -> LaplacePrediction:
    """See `Laplace.predict`."""
    import torch

    whole = covariance or link == "mc"
    means, spreads = [], []
    for outputs, J in linear.jacobians(batch):
        means.append(outputs)
        spreads.append(products_with_inverse(factor, J) if whole else _variance(factor, J))
    mean, spread = torch.cat(means), torch.cat(spreads)
    variance = spread.diagonal(dim1=1, dim2=2) if whole else spread
    variance = variance.reshape(mean.shape)
    probabilities = None
    with torch.no_grad():
        if link == "probit":
            scaled = mean / (1 + math.pi / 8 * variance).sqrt()
            probabilities = _probabilities(scaled, likelihood)
        elif link == "mc":
            probabilities = _drawn(mean, spread, likelihood, num_samples, seed)
    return LaplacePrediction(mean, variance, spread if covariance else None, probabilities)


def _variance(factor: Any, J: torch.Tensor) -> torch.Tensor:
    """j^T (G + P)^-1 j of the rows j of J (n, d, N), (n, d)."""
    columns = move(as_array(J.flatten(0, 1).T, "J"), factor.device)
    found = factor.quadratic_form(columns)
    return _tensor(found, J).reshape(J.shape[:2])


def products_with_inverse(factor: Any, J: torch.Tensor) -> torch.Tensor:
    """J (G + P)^-1 J^T of every sample, (n, d, d), for J (n, d, N)."""
    import torch

    columns = move(as_array(J.flatten(0, 1).T, "J"), factor.device)
    solved = _tensor(factor.solve(columns), J).T.reshape(J.shape)
    found = torch.einsum("ndp,nep->nde", J, solved)
    return (found + found.mT) / 2


def _tensor(x: Any, like: torch.Tensor) -> torch.Tensor:
    """An array of the matrix's library where and as a tensor is."""
    return tensor_of(move(x, like.device.type)).to(like)


def _probabilities(outputs: torch.Tensor, likelihood: Likelihood) -> torch.Tensor:
    """Sigmoid or softmax of outputs (n, ...)."""
    import torch

    if likelihood.kind == "binary":
        return outputs.sigmoid()
    return torch.softmax(outputs, dim=likelihood.axis)


def _drawn(
    mean: torch.Tensor, covariance: torch.Tensor, likelihood: Likelihood, num: int, seed: int
) -> torch.Tensor:
    """The mean of the probabilities at drawn outputs, one draw at a time."""
    import torch

    # An output that nothing is known of beyond another one's leaves a zero: no Cholesky factor.
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt()[:, None]
    generator = torch.Generator(mean.device).manual_seed(seed)
    total = torch.zeros_like(mean)
    for _ in range(num):
        z = torch.randn(root.shape[:2], dtype=mean.dtype, device=mean.device, generator=generator)
        drawn = mean + torch.einsum("nde,ne->nd", root, z).reshape(mean.shape)
        total += _probabilities(drawn, likelihood)
    return total / num
