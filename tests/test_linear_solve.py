"""One call that solves: plain CG, or a factor, by what is cheaper."""

from __future__ import annotations

import time
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.applications import linear_solve
from gpu_hodlr.errors import ArgumentError, NotPositiveDefiniteError


def smooth(n: int = 600) -> gh.KernelOperator:
    """Whose small damping plain CG takes hundreds of iterations for."""
    return gh.KernelOperator(np.random.default_rng(0).random((n, 2)), "matern52", 0.5)


def check(op: Any, x: np.ndarray, b: np.ndarray, damping: float, rtol: float = 1e-8) -> None:
    residual = b - (op @ x + damping * x)
    assert np.linalg.norm(residual, axis=0).max() <= 10 * rtol * np.linalg.norm(b, axis=0).max()


def test_few_iterations_need_no_factor():
    op, b = gh.DenseOperator(dense_oracles.random_spd(200, smallest=0.5)), np.ones((200, 2))
    x, info = gh.solve(op, b, 0.1)
    check(op, x, b, 0.1)
    assert info.converged
    assert info.preconditioner is None
    assert list(info.seconds) == ["plain"]
    assert "plain CG" in info.reason


@pytest.mark.slow
def test_where_plain_cg_would_take_long_a_factor_is_made(monkeypatch: pytest.MonkeyPatch):
    """Seconds are another machine's: here a compression costs nothing."""
    monkeypatch.setattr(linear_solve, "_COMPRESSION", 0)
    op, b = smooth(), np.sin(np.arange(600.0))
    plain = gh.cg(op, b, damping=1e-6, maxiter=3000)[1].iterations
    x, info = gh.solve(op, b, 1e-6)
    check(op, x, b, 1e-6)
    assert info.converged
    assert info.preconditioner is not None
    assert 3 * info.iterations < plain
    assert info.matrix.report.damping == 1e-6
    assert {"plain", "compress", "factorize", "preconditioned"} <= set(info.seconds)
    assert type(info.matrix).__name__ in info.reason


def test_where_a_compression_would_take_longer_plain_cg_goes_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_solve, "_COMPRESSION", 10**12)
    op, b = smooth(), np.sin(np.arange(600.0))
    x, info = gh.solve(op, b, 1e-4)
    check(op, x, b, 1e-4)
    assert info.converged
    assert info.preconditioner is None
    assert info.iterations > 25


def test_a_network_is_solved_by_its_eigenbasis(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch")
    from eigenbasis_cases import operator

    monkeypatch.setattr(linear_solve, "_COMPRESSION", 0)
    op = operator("autoencoder")
    b = np.random.default_rng(0).standard_normal(op.shape[0])
    damping = 1e-4 * float(op.diagonal().mean())
    x, info = gh.solve(op, b, damping, scheme="kfe")
    check(op, x, b, damping)
    assert isinstance(info.preconditioner, gh.KFEFactor)


def test_a_factor_that_cannot_be_had_leaves_plain_cg(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_solve, "_COMPRESSION", 0)
    op, b = smooth(200), np.ones(200)
    x, info = gh.solve(op, b, 1e-4, scheme="kfe")  # there is no network
    check(op, x, b, 1e-4)
    assert info.converged
    assert info.preconditioner is None
    assert "could not be had" in info.reason


def test_budgets(monkeypatch: pytest.MonkeyPatch):
    """What was reached is told; an exhausted budget begins nothing."""
    monkeypatch.setattr(linear_solve, "_COMPRESSION", 0)
    op, b = smooth(), np.sin(np.arange(600.0))
    _, info = gh.solve(op, b, 1e-8, maxiter=10)
    assert (info.converged, info.iterations) == (False, 10)
    assert info.residual > 1e-8
    _, info = gh.solve(op, b, 1e-8, time_budget=0.0)
    assert (info.converged, info.preconditioner) == (False, None)


def slow(exact: np.ndarray, seconds: float) -> gh.FunctionOperator:
    """Whose products take so long."""

    def multiply(v: np.ndarray) -> np.ndarray:
        time.sleep(seconds)
        return exact @ v

    return gh.FunctionOperator(len(exact), matmat=multiply)


def test_a_time_budget_ends_the_iterations():
    """Within the first run and after it; what was reached then is what is told."""
    exact, b = smooth(200).to_dense(), np.sin(np.arange(200.0))
    for budget in (0.05, 0.6):
        x, info = gh.solve(slow(exact, 0.01), b, 1e-6, time_budget=budget)
        assert not info.converged
        assert info.preconditioner is None
        assert 0 < info.iterations <= budget / 0.01 + 1
        assert "time" in info.reason
        residual = np.linalg.norm(b - exact @ x - 1e-6 * x) / np.linalg.norm(b)
        assert info.residual == pytest.approx(residual, rel=1e-3)


def test_a_compression_that_ends_too_late_is_no_factor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_solve, "_COMPRESSION", 0)
    exact, b = smooth(200).to_dense(), np.sin(np.arange(200.0))

    def multiply(v: np.ndarray) -> np.ndarray:
        time.sleep(1.0 if v.shape[1] > 8 else 0.01)  # a sketch ends too late
        return exact @ v

    op = gh.FunctionOperator(200, matmat=multiply)
    _, info = gh.solve(op, b, 1e-6, time_budget=0.8, scheme="lowrank")
    assert info.preconditioner is None
    assert info.iterations < 100


def test_indefinite_matrices():
    exact = np.diag(np.linspace(-1.0, 2.0, 50))
    with pytest.raises(NotPositiveDefiniteError):
        gh.solve(exact, np.ones(50), 0.1)
    op = gh.FunctionOperator(50, matmat=lambda v: exact @ v, definite=False)
    _, info = gh.solve(op, np.ones(50), 0.1)
    assert not info.converged
    assert "negative curvature" in info.reason


@pytest.mark.parametrize(
    ("name", "value"),
    [("damping", -1.0), ("rtol", np.nan), ("maxiter", 0), ("time_budget", -1.0)],
)
def test_bad_arguments_are_named(name: str, value: Any):
    arguments: dict[str, Any] = {"damping": 0.1, name: value}
    with pytest.raises(ArgumentError, match=name):
        gh.solve(toeplitz(30), np.ones(30), **arguments)


def test_ranks_agree_on_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_solve, "_COMPRESSION", 0)
    op, b = smooth(300), np.sin(np.arange(300.0))

    def job(comm: Any) -> Any:
        x, info = gh.solve(op, b, 1e-6, comm=comm, leaf_size=32)
        return x, info.converged, type(info.preconditioner).__name__, info.reason.partition(":")[0]

    alone = job(None)
    for result in on_threads(3, job):
        assert isinstance(result, tuple), result
        np.testing.assert_allclose(result[0], alone[0], rtol=1e-4, atol=1e-6 * abs(alone[0]).max())
        assert result[1:] == alone[1:]
