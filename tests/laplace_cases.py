"""A small network, its losses and priors, and Laplace's approximation of it by LAPACK."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from network_cases import case  # noqa: E402

NAME = "two layers"  # 6 - 5 - 3, N = 53
N, SAMPLES = 53, 40
LAYERS = {"0": 0.7, "2": 2.5}
TIGHT: dict[str, Any] = {"rtol": 1e-13, "leaf_size": 10, "scheme": "hss"}
FORMS: dict[str, dict[str, Any]] = {
    "hss": {},
    "hodlr": {"scheme": "hodlr"},
    "lowrank": {"scheme": "lowrank", "max_rank": N},
}
GIVEN = torch.nn.functional.gaussian_nll_loss


def labels(inputs: Any, targets: Any) -> tuple[Any, Any]:
    return inputs, (targets > 0).double()


# name: (kind of data, change of it, loss)
LOSSES: dict[str, tuple[str, Callable[..., Any], Any]] = {
    "cross_entropy": ("cross_entropy", lambda x, y: (x, y), "cross_entropy"),
    "binary": ("mse", labels, "binary_cross_entropy_with_logits"),
    "mse": ("mse", lambda x, y: (x, y), "mse"),
    "gaussian": ("mse", lambda x, y: (x, y), partial(GIVEN, var=0.3, full=True)),
}


def problem(loss: str = "cross_entropy", n: int = SAMPLES, dtype: Any = torch.float64) -> Any:
    """Model, loss, (inputs, targets)."""
    kind, change, given = LOSSES[loss]
    model, inputs, targets = case(NAME, kind, dtype, n)
    return model, given, change(inputs, targets)


def rows_of(prior: Any) -> np.ndarray:
    """P of a number, LAYERS, or an array."""
    if isinstance(prior, dict):
        return np.repeat([prior["0"], prior["2"]], [35, 18])
    return np.broadcast_to(np.asarray(prior, float), N)


class Dense:
    """The same by LAPACK, with derivatives by torch alone."""

    def __init__(self, model: Any, loss: str, data: Any) -> None:
        inputs, targets = data
        self.theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
        self.J = self.jacobian(model, inputs)
        outputs = model(inputs).detach()
        self.f = outputs.numpy()
        p = torch.softmax(outputs, 1) if loss == "cross_entropy" else outputs.sigmoid()
        p = p.numpy()
        if loss == "cross_entropy":
            H = np.einsum("nd,de->nde", p, np.eye(3)) - p[:, :, None] * p[:, None]
            self.fit = float(np.log(p[np.arange(len(p)), targets]).sum())
        elif loss == "binary":
            H = np.einsum("nd,de->nde", p * (1 - p), np.eye(3))
            t = targets.numpy()
            self.fit = float((t * np.log(p) + (1 - t) * np.log(1 - p)).sum())
        else:
            variance = {"mse": 0.5, "gaussian": 0.3}[loss]
            H = np.broadcast_to(np.eye(3) / variance, (len(p), 3, 3))
            square = ((self.f - targets.numpy()) ** 2).sum()
            count = self.f.size
            self.fit = -0.5 * square / variance - 0.5 * count * math.log(2 * math.pi * variance)
        self.G = np.einsum("ndp,nde,neq->pq", self.J, H, self.J)

    @staticmethod
    def jacobian(model: Any, inputs: Any) -> np.ndarray:
        """(n, outputs, N), a row at a time."""
        rows = []
        for output in model(inputs).flatten():
            parts = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in parts]))
        return torch.stack(rows).reshape(len(inputs), -1, len(rows[0])).numpy()

    def evidence(self, prior: Any) -> float:
        P = rows_of(prior)
        half = np.log(P).sum() - np.linalg.slogdet(self.G + np.diag(P))[1]
        return float(self.fit - 0.5 * P @ self.theta**2 + 0.5 * half)

    def covariance(self, prior: Any, J: np.ndarray) -> np.ndarray:
        inverse = np.linalg.inv(self.G + np.diag(rows_of(prior)))
        return np.einsum("ndp,pq,neq->nde", J, inverse, J)


PRIORS: dict[str, Any] = {
    "number": 1.3,
    "layers": LAYERS,
    "every": 0.5 + np.random.default_rng(0).random(N),
}
