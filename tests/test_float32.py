"""What float32 reaches: rtol 1e-5 in every form, and no less where less is asked for."""

from __future__ import annotations

from functools import cache
from typing import Any

import dense_oracles
import numpy as np
import pytest

import gpu_hodlr as gh

FORMS: dict[str, dict[str, Any]] = {
    "hss": {"scheme": "hss"},
    "hss, products": {"scheme": "hss", "sampler": "products"},
    "hss, entries": {"scheme": "hss", "sampler": "entries"},
    "fmm": {"scheme": "fmm", "budget": 0.15},
    "hodlr": {"scheme": "hodlr"},
    "hodlr, products": {"scheme": "hodlr", "sampler": "products"},
    "lowrank": {"scheme": "lowrank"},
}


@cache
def network() -> tuple[gh.GGNOperator, np.ndarray]:
    """A regression on nearly collinear features, N = 1,010.

    Singular values fall slowly, far below 1e-5 of the first; aleximmer's heteroscedastic-nn, issue
    2, is of that kind.
    """
    torch = pytest.importorskip("torch")
    from seeds import seeded

    rng = np.random.default_rng(0)
    base = rng.standard_normal((700, 3))
    inputs = base @ rng.standard_normal((3, 14)) + 1e-3 * rng.standard_normal((700, 14))
    targets = np.stack([np.sin(base[:, 0]), base[:, 1] ** 2], axis=1)
    with seeded():
        model = torch.nn.Sequential(
            torch.nn.Linear(14, 24), torch.nn.ReLU(), torch.nn.Linear(24, 24), torch.nn.ReLU(),
            torch.nn.Linear(24, 2),
        )  # fmt: skip
    x, y = (torch.tensor(a).float() for a in (inputs, targets))
    wide = gh.GGNOperator(model, "mse", x, y, dtype=np.float64)
    return gh.GGNOperator(model, "mse", x, y), wide.to_dense()


@pytest.mark.parametrize("form", FORMS)
def test_reaches_1e_5(form: str):
    op, exact = network()
    K = gh.compress(op, rtol=1e-5, max_rank=800, leaf_size=64, **FORMS[form])
    assert K.dtype == np.float32
    assert K.report.error <= 2e-5
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 2e-5


@pytest.mark.filterwarnings("ignore::gpu_hodlr.errors.AccuracyWarning")
@pytest.mark.filterwarnings("ignore::gpu_hodlr.errors.RankCapWarning")
@pytest.mark.parametrize("form", FORMS)
def test_a_tolerance_out_of_reach_is_no_worse(form: str):
    """What as many columns as skeleton rows leave is no sign of a good basis."""
    op, exact = network()
    K = gh.compress(op, rtol=1e-6, max_rank=800, leaf_size=64, **FORMS[form])
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 1e-5
