"""A small classifier to prune, and what dense linear algebra says of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gpu_hodlr as gh

torch = pytest.importorskip("torch")
from seeds import seeded  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.utils import parameters_to_vector  # noqa: E402

from gpu_hodlr.applications.pruning import surgery  # noqa: E402

DAMPING = 1e-3
EXACT: dict[str, Any] = {"scheme": "hss", "rtol": 1e-12, "leaf_size": 16, "max_rank": 200}


def data(num: int = 60, kind: Any = torch.float64) -> tuple[Any, Any]:
    """Three clouds."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(num) % 3
    x = torch.randn(num, 6, dtype=kind, generator=generator)
    x[:, 0] += 1.5 * y
    return x, y


def trained(act: Any = nn.Tanh, kind: Any = torch.float64) -> Any:
    """A classifier of the clouds, N = 6 * 8 + 8 + 8 * 5 + 5 + 5 * 3 + 3 = 119."""
    x, y = data(kind=kind)
    with seeded():
        layers = nn.Linear(6, 8), act(), nn.Linear(8, 5), act(), nn.Linear(5, 3)
    model = nn.Sequential(*layers).to(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def vector(model: Any) -> np.ndarray:
    return parameters_to_vector(model.parameters()).detach().numpy().astype(np.float64)


def kept_of(model: Any, masks: dict[str, Any]) -> np.ndarray:
    """(N,) bool, of a model that is not pruned."""
    parts = [
        masks[name].numpy().ravel() if name in masks else np.ones(p.numel(), bool)
        for name, p in model.named_parameters()
    ]
    return np.concatenate(parts)


def values(model: Any) -> np.ndarray:
    """(N,) of a pruned model, by the names of one that is not."""
    own = {name.removesuffix("_orig"): p for name, p in model.named_parameters()}
    order = [f"{i}.{kind}" for i in range(len(model)) for kind in ("weight", "bias")]
    return torch.cat([own[x].detach().ravel() for x in order if x in own]).double().numpy()


def constrained(H: np.ndarray, theta: np.ndarray, pruned: np.ndarray) -> np.ndarray:
    """The step that minimizes delta^T H delta / 2 with delta = -theta where pruned: by the inverse
    and multipliers, as Hassibi and Stork write it."""
    inverse = np.linalg.inv(H)[:, pruned]
    return -inverse @ np.linalg.solve(inverse[pruned], theta[pruned])


def hessian(model: Any, damping: float = DAMPING) -> np.ndarray:
    return gh.GGNOperator(model, "cross_entropy", *data()).to_dense() + damping * np.eye(119)


@pytest.fixture
def whole_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they go too far."""
    monkeypatch.setattr(surgery._Run, "_mended", lambda self, theta, step: theta + step)
