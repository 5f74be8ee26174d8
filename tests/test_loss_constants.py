"""What a loss lacks of a log-likelihood."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from gpu_hodlr.networks.losses import read_loss  # noqa: E402


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (read_loss("mse"), "real"),
        (read_loss(torch.nn.HuberLoss(delta=0.7)), "real"),
        (read_loss(torch.nn.SmoothL1Loss(beta=0.4)), "real"),
        (read_loss(partial(torch.nn.functional.gaussian_nll_loss, var=0.3)), "real"),
        (read_loss(partial(torch.nn.functional.gaussian_nll_loss, var=0.3, full=True)), "real"),
        (read_loss(torch.nn.PoissonNLLLoss()), "count"),
        (read_loss(torch.nn.PoissonNLLLoss(full=True)), "count"),
        (read_loss("binary_cross_entropy_with_logits"), "label"),
        (read_loss("cross_entropy"), "class"),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_log_constant_makes_a_density(loss: Any, targets: str):
    """exp(-value - log_constant), summed over all targets of a sample, is 1."""
    outputs = torch.tensor([[0.4, -1.3]], dtype=torch.float64)
    grid, step = {
        "real": (torch.linspace(-40, 40, 4001, dtype=torch.float64), 0.02),
        "count": (torch.arange(40.0, dtype=torch.float64), 1.0),
        "label": (torch.arange(2.0, dtype=torch.float64), 1.0),
        "class": (torch.arange(2), 1.0),
    }[targets]
    total = 0.0
    one = outputs if targets == "class" else outputs[:, :1]
    for t in grid:
        target = t[None] if targets == "class" else t[None, None]
        total += step * float(torch.exp(-loss.value(one, target) - loss.log_constant(one, target)))
    assert abs(total - 1) < 1e-4
