"""What objects say of themselves: shape, type, device, storage, error or damping."""

import dataclasses
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import device_of
from gpu_hodlr.factor import MultipoleSolver
from gpu_hodlr.operators import SharedOperator
from gpu_hodlr.operators.scaled import ScaledOperator

N = 120
A = toeplitz(N) + np.eye(N)
NUMBER = r"\d[\d.e+-]*"


def compressed(scheme: str, xp: Any = np, **options: Any) -> Any:
    if scheme == "fmm":
        options["budget"] = 0.2
    return gh.compress(xp.asarray(A), scheme, rtol=1e-4, max_rank=N, leaf_size=20, **options)


def said(x: object, device: str, *more: str, dtype: str = "float64") -> bool:
    """Whether the repr is "Class(N x N, dtype, device, ...)" with exactly this."""
    first = f"{type(x).__name__}({N} x {N}, {dtype}, {device}, "
    return re.fullmatch(re.escape(first) + ", ".join(more) + r"\)", repr(x)) is not None


@pytest.mark.parametrize("scheme", ["hss", "hodlr", "fmm", "lowrank"])
def test_matrices_and_factors(scheme: str, xp: ModuleType):
    K = compressed(scheme, xp)
    device = device_of(xp.empty(0))
    assert said(K, device, f"{NUMBER} % stored", f"error {NUMBER}")
    stored = f"{100 * K.storage_fraction:.3g} % stored"
    assert stored in repr(K)
    assert f"error {K.report.error:.2g}" in repr(K)
    assert said(K.structure, device, stored)
    F = K.factorize(0.25)
    with_it = ("0.25 of preconditioner",) if scheme == "fmm" else ()
    size = f"{F.nbytes / 1e6:.3g} MB"
    assert said(F, device, "damping 0.25", *with_it, size)
    G = K.factorize(xp.full(N, 0.25))
    assert said(G, device, "damping of every row", *with_it, f"{G.nbytes / 1e6:.3g} MB")


def test_the_eigenbasis():
    pytest.importorskip("torch")
    from eigenbasis_cases import operator

    K = gh.compress(operator("autoencoder"), "kfe", rtol=1e-4)
    for made, kind in ((K, "KFEMatrix"), (-2 * K, "KFEMatrix"), (K.factorize(0.1), "KFEFactor")):
        n = made.shape[0]
        assert repr(made).startswith(f"{kind}({n} x {n}, float64, cpu, ")
        assert re.search(r"(stored, error|damping 0.1, .*, [\d.]+ MB)", repr(made))


def test_narrow_blocks():
    K = compressed("hss", storage_dtype="float32")
    assert said(K, "cpu", f"{NUMBER} % stored in float32", f"error {NUMBER}")
    assert said(K.structure, "cpu", f"{NUMBER} % stored", dtype="float32")


def test_a_solver_without_a_preconditioner():
    F = MultipoleSolver(compressed("fmm").structure, 0.25, None, rtol=1e-4)
    assert said(F, "cpu", "damping 0.25", "no preconditioner", "0 MB")


def test_ranks():
    def run(comm: Any) -> tuple[str, str, str]:
        K = compressed("hss", comm=comm)
        return repr(K), repr(K.structure), repr(K.factorize(0.1))

    for rank, texts in enumerate(on_threads(2, run)):
        assert all(text.endswith(f", rank {rank} of 2)") for text in texts)
        stored = [re.search(f"{NUMBER} % stored", text) for text in texts[:2]]
        assert stored[0] is not None
        assert stored[1] is not None
        assert stored[0][0] == stored[1][0]  # of all ranks


OPERATORS: dict[str, Callable[[], Any]] = {
    "dense": lambda: gh.DenseOperator(A),
    "kernel": lambda: gh.KernelOperator(np.random.default_rng(0).random((N, 2))),
    "function": lambda: gh.FunctionOperator(N, matmat=lambda v: A @ v),
    "diagonal": lambda: gh.Diagonal(np.ones(N)),
    "scaled": lambda: ScaledOperator(gh.DenseOperator(A), 2.0),
    "shared": lambda: on_threads(1, lambda comm: SharedOperator(gh.DenseOperator(A), comm))[0],
}


@pytest.mark.parametrize("make", OPERATORS.values(), ids=OPERATORS)
def test_operators(make: Callable[[], Any]):
    given = "(products|entries|products and entries)"
    assert said(make(), "cpu", given, "positive semi-definite by declaration")


def test_reports_and_trees():
    K = compressed("hss")
    for part in (f"error={K.report.error!r}", "rtol=0.0001", "scheme='hss'", "rank_cap_hit=False"):
        assert part in repr(K.report)
    said = str(K.report).splitlines()
    assert said[0].startswith("hss, natural ordering, sampled by products+entries: ")
    assert said[1].startswith(f"error {K.report.error:.2g} of norm(K)_F = ")
    assert said[-1].startswith(f"{K.report.cpu_seconds:.2g} CPU seconds; seconds by phase: ")
    assert not any("max_rank" in line for line in said)
    capped = dataclasses.replace(K.report, rank_cap_hit=True, capped_levels=(2, 1), damping=0.5)
    assert "max_rank was hit on levels 2, 1 (root = 0)" in str(capped)
    assert "measured, for a damping of 0.5" in str(capped)
    assert repr(K.tree) == f"ClusterTree({N} rows in 8 leaves of at most 15)"
    info = gh.cg(A, np.ones(N))[1]
    assert repr(info).startswith(f"CGInfo(converged=True, iterations={info.iterations}, ")
