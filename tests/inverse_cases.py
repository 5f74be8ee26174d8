"""Small matrices of every scheme, for what factors say of inverses."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matrix_cases import Clustered, toeplitz

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host

N, DAMPING = 150, 0.3
POINTS = np.random.default_rng(0).random((N, 2))
OPTIONS: dict[str, Any] = {"rtol": 1e-3, "leaf_size": 20}


def both_signs() -> np.ndarray:
    """Of low rank, with eigenvalues down to -0.2."""
    Q = np.linalg.qr(np.random.default_rng(5).standard_normal((N, N)))[0]
    exact = (Q * np.r_[0.8 ** np.arange(N - 5), -0.2 * 0.7 ** np.arange(5)]) @ Q.T
    return (exact + exact.T) / 2


def uneven() -> gh.Operator:
    """Leaves of unequal size, and empty ones."""
    return Clustered(toeplitz(N), 1)


def plane(xp: ModuleType, dtype: Any) -> gh.Operator:
    return gh.KernelOperator(xp.asarray(POINTS.astype(dtype)), "laplace", 0.3, nugget=0.1)


def dense(exact: np.ndarray, **options: Any) -> Callable[[ModuleType, Any], gh.Operator]:
    return lambda xp, dtype: gh.DenseOperator(xp.asarray(exact.astype(dtype)), **options)


def network(xp: ModuleType, dtype: Any) -> gh.Operator:
    pytest.importorskip("torch")
    from eigenbasis_cases import operator

    return operator("classifier", dtype=dtype, device="cpu" if xp is np else "cuda")


CASES: dict[str, tuple[Callable[[ModuleType, Any], gh.Operator], dict[str, Any]]] = {
    "hss": (plane, {"scheme": "hss"}),
    "hss of one leaf": (plane, {"scheme": "hss", "leaf_size": N}),
    "hss of leaves of one": (dense(toeplitz(N)), {"scheme": "hss", "leaf_size": 1}),
    "hss of uneven leaves": (lambda xp, dtype: uneven(), {"scheme": "hss", "leaf_size": 3}),
    "hodlr": (plane, {"scheme": "hodlr"}),
    "hodlr of one leaf": (plane, {"scheme": "hodlr", "leaf_size": N}),
    "hodlr of uneven leaves": (lambda xp, dtype: uneven(), {"scheme": "hodlr", "leaf_size": 30}),
    "lowrank": (plane, {"scheme": "lowrank"}),
    "lowrank of full rank": (plane, {"scheme": "lowrank", "rtol": 1e-5, "max_rank": N}),
    "lowrank, tail": (plane, {"scheme": "lowrank", "rtol": 3e-2, "tail": "diagonal"}),
    "lowrank, both signs": (dense(both_signs(), definite=False), {"scheme": "lowrank"}),
    "fmm": (plane, {"scheme": "fmm", "budget": 0.1}),
    "fmm without a near field": (plane, {"scheme": "fmm"}),
    "kfe": (network, {"scheme": "kfe"}),
}
ON_EVERY = ("hss", "hodlr", "lowrank", "lowrank, tail", "fmm", "kfe")  # library


def compressed(name: str, xp: ModuleType = np, dtype: Any = np.float64, **more: Any) -> Any:
    make, options = CASES[name]
    return gh.compress(make(xp, dtype), **{**OPTIONS, **options, **more})


def dense_of(K: Any, damping: Any) -> np.ndarray:
    """K~ plus damping in float64."""
    added = damping * np.ones(K.shape[0])
    return to_host(K.to_dense()).astype(np.float64) + np.diag(added)
