"""Random stacks of matrices for tests of the batched primitives."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpu_hodlr.devices import to_host


def tolerance(dtype: Any) -> float:
    return 200 * float(np.finfo(dtype).eps)


def stack(*shape: int, dtype: Any, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def close(got: Any, want: np.ndarray, factor: float = 1.0) -> None:
    """Same shape, same dtype, and equal to rounding relative to the largest entry."""
    host = to_host(got)
    assert host.shape == want.shape
    assert host.dtype == want.dtype
    allowed = factor * tolerance(want.dtype) * max(1.0, np.abs(want).max(initial=0.0))
    np.testing.assert_allclose(host, want, rtol=0, atol=allowed)
