"""What the solver of an FMM form is made of: its preconditioner, and what it takes for definite."""

from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from test_memory import peak

import gpu_hodlr as gh
from gpu_hodlr.errors import NotPositiveDefiniteError
from gpu_hodlr.factor import MultipoleSolver, ULVCholesky, multipole_solver
from gpu_hodlr.factor.multipole_solver import first_damping, preconditioner_of
from gpu_hodlr.factor.solver import IndefiniteError
from gpu_hodlr.krylov import CGInfo

N = 100
EXACT = toeplitz(N) - 0.5 * np.eye(N)  # indefinite


def lowered() -> gh.FMMMatrix:
    return gh.compress(EXACT, "fmm", rtol=1e-8, leaf_size=20, budget=0.1)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_what_conjugate_gradients_do_not_see_the_solution_tells(
    scale: float, monkeypatch: pytest.MonkeyPatch
):
    """One column of several has x^T A x <= 0: A is not positive definite."""
    v = scale * np.linalg.eigh(EXACT)[1][:, [-1, 0]]
    F = lowered().factorize(1.0)
    F._added = 0.01
    info = CGInfo(True, 1, (1.0, 0.0))
    monkeypatch.setattr(F, "_cg", lambda b, *options: (v[:, : b.shape[1]], info))
    F.solve(scale * np.ones((N, 1)), rtol=1.0)
    monkeypatch.setattr(MultipoleSolver, "verified", lambda self: False)  # that it advises none
    with pytest.raises(NotPositiveDefiniteError):
        F.solve(scale * np.ones((N, 2)), rtol=1.0)
    monkeypatch.setattr(F, "_damped_product", np.zeros_like)
    with pytest.raises(NotPositiveDefiniteError):
        F.solve(scale * np.ones((N, 1)), rtol=1.0)


SCALES = [(np.float64, e) for e in (-200, -164, -163, 0, 200)]
SCALES += [(np.float32, e) for e in (-30, -24, -23, 0, 30)]


@pytest.mark.parametrize(("dtype", "exponent"), SCALES)
def test_the_scale_of_b_does_not_matter(dtype: Any, exponent: int):
    """x^T A x of numbers whose squares are below all is 0, and was taken for a direction."""
    points = np.random.default_rng(0).random((300, 2)).astype(dtype)
    op = gh.KernelOperator(points, "laplace", 0.3, nugget=1e-3)
    K = gh.compress(op, "fmm", budget=0.1, leaf_size=20, rtol=1e-4)
    F = K.factorize(0.01)
    b = np.random.default_rng(0).standard_normal((300, 3)).astype(dtype)
    x = F.solve(b * dtype(10.0**exponent)).astype(np.float64) / 10.0**exponent
    left = b - (K.to_dense() @ x + 0.01 * x)
    limit = {np.float32: 2e-4, np.float64: 1e-9}[dtype]
    assert np.linalg.norm(left) <= limit * np.linalg.norm(b)


def test_where_a_preconditioner_begins():
    """With the damping, else with what rounding needs; in range of the smallest eigenvalue."""
    form, eps = lowered().structure, float(np.finfo(np.float64).eps)
    for damping, ends, want in (
        (0.2, (0.1, 3.0), (0.2, 0.3)), (0.2, (-0.1, 3.0), (0.2, 0.2)),
        (0.0, (0.1, 4.0), (4 * eps, 0.1 + 4 * eps)), (0.0, (0.0, 0.0), (1.0, 1.0)),
        (10 - 1e-13, (-10.0, 1.0), (10 - 1e-13, 10 - 1e-13)),  # 100 roundings of the norm
    ):  # fmt: skip
        assert first_damping(form, damping, ends) == pytest.approx(want, rel=1e-15)
    for damping, ends in ((10 - 4e-13, (-10.0, 1.0)), (0.0, (-0.1, 3.0))):
        with pytest.raises(IndefiniteError):
            first_damping(form, damping, ends)


def test_the_damping_of_a_preconditioner_is_raised(monkeypatch: pytest.MonkeyPatch):
    """At once past what Lanczos finds, then by halves; not for ever."""
    weak = gh.compress(EXACT, "hss", rtol=1e-8, leaf_size=20).structure
    smallest = np.linalg.eigvalsh(EXACT)[0]
    F = preconditioner_of(weak, 1e-3)
    assert F.damping == pytest.approx(-1.5 * smallest, rel=1e-2)
    b = np.ones(N)
    want = np.linalg.solve(EXACT + F.damping * np.eye(N), b)
    np.testing.assert_allclose(F.solve(b), want, rtol=1e-5)
    assert preconditioner_of(weak, 2.0).damping == 2.0
    tried: list[float] = []

    def none(weak: Any, damping: float) -> None:
        tried.append(damping)
        raise IndefiniteError

    monkeypatch.setattr(multipole_solver, "ULVCholesky", none)
    assert preconditioner_of(weak, 1e-3) is None
    np.testing.assert_allclose(tried[1:], -smallest * 1.5 ** np.arange(1, 8), rtol=1e-2)


def test_memory_is_estimated_within_half():
    """Without a near field it is that of the factor, which then is made."""
    op = gh.KernelOperator(np.random.default_rng(0).random((900, 2)), "laplace", 0.3, nugget=0.5)
    for budget in (0.1, 0.0):
        K = gh.compress(op, "fmm", budget=budget, leaf_size=25, rtol=1e-3)
        F, most = peak(lambda K=K: K.factorize(0.5))
        assert isinstance(F, MultipoleSolver if budget else ULVCholesky)
        assert 1 / 1.5 < MultipoleSolver.memory(K.structure) / most < 1.5
