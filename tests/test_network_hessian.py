"""The exact Hessian of a network, compressed: every form against the dense matrix."""

from pathlib import Path
from typing import Any

import dense_oracles
import numpy as np
import pytest
from marks import but_slow
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.errors import NotPositiveDefiniteError

torch = pytest.importorskip("torch")

from network_models import made  # noqa: E402
from network_zoo import dense_hessian  # noqa: E402

FORMS = ("hss", "hodlr", "lowrank", "auto")


def hessian(name: str, entries: str = "auto") -> tuple[gh.HessianOperator, np.ndarray]:
    """The operator, and the matrix by reverse mode twice."""
    model, loss, inputs, targets, options = made(name, n=12)
    op = gh.HessianOperator(model, loss, inputs, targets, entries=entries, **options)
    exact = dense_hessian(model, loss, inputs, targets, options)
    w = np.linalg.eigvalsh(exact)
    assert w[0] < -1e-3 * w[-1]  # as curved downwards as a test needs
    return op, exact


@pytest.mark.parametrize("scheme", FORMS)
@pytest.mark.parametrize("entries", ["dense", "none"])
@pytest.mark.parametrize("name", ["lenet", "language model"])
def test_storage_products_and_factors(name: str, entries: str, scheme: str, tmp_path: Path):
    """Factors are there above -lambda_min alone, and the error names it."""
    op, exact = hessian(name, entries)
    n = len(exact)
    K = gh.compress(op, scheme, rtol=1e-6, leaf_size=16, max_rank=n)
    assert K.report.error <= 3e-6
    assert dense_oracles.frobenius_error(K.to_dense(), exact) <= 3e-6
    v = np.random.default_rng(0).standard_normal((n, 3))
    close = 1e-5 * np.linalg.norm(exact) * np.linalg.norm(v)
    np.testing.assert_allclose(K @ v, exact @ v, rtol=0, atol=close)
    np.testing.assert_allclose(K.diagonal(), exact.diagonal(), rtol=0, atol=close)
    K.save(tmp_path / "hessian.npz")
    np.testing.assert_array_equal(gh.load(tmp_path / "hessian.npz") @ v, K @ v)
    w = np.linalg.eigvalsh(exact)
    for below in (0.0, -0.9 * w[0]):
        with pytest.raises(NotPositiveDefiniteError, match="smallest eigenvalue about -") as caught:
            K.factorize(below)
        assert -0.999 * w[0] <= caught.value.damping <= -1.09 * w[0]
        K.factorize(caught.value.damping)
    damping = -1.2 * w[0]
    F, damped = K.factorize(damping), exact + damping * np.eye(n)
    want = np.linalg.solve(damped, v)
    lost = 1e-5 * np.linalg.norm(exact) / (damping + w[0])
    np.testing.assert_allclose(F.solve(v), want, rtol=0, atol=lost * np.linalg.norm(want))
    assert F.logdet() == pytest.approx(np.linalg.slogdet(damped)[1], abs=n * lost)


@pytest.mark.parametrize("scheme", but_slow(["hss", "hodlr", "lowrank"], "hodlr"))
def test_iterations_by_a_factor(scheme: str):
    """Both ends of the spectrum, MINRES, and the way down that CG finds."""
    op, exact = hessian("resnet")
    n = len(exact)
    w, _ = gh.eigsh(op, 2, "BE")
    np.testing.assert_allclose(np.sort(w), np.linalg.eigvalsh(exact)[[0, -1]], rtol=1e-6)
    K = gh.compress(op, scheme, rtol=1e-4, leaf_size=16, max_rank=n)
    b = exact @ np.random.default_rng(0).standard_normal(n)
    x, info = gh.minres(op, b, M=K.factorize(0.0, shift="auto"), rtol=1e-6, maxiter=2000)
    assert info.converged
    assert np.linalg.norm(exact @ x - b) <= 1.01e-6 * np.linalg.norm(b)
    _, info = gh.cg(op, b)
    assert not info.converged
    p = info.direction
    assert p @ exact @ p < 0


@pytest.mark.parametrize("scheme", FORMS)
def test_ranks(scheme: str):
    """Spread over ranks: the same form."""
    op, _ = hessian("lenet", "dense")
    v = np.random.default_rng(0).standard_normal((op.shape[0], 2))

    def spread(comm: Any) -> Any:
        options: dict[str, Any] = {"rtol": 1e-6, "leaf_size": 16, "max_rank": op.shape[0]}
        K = gh.compress(op, scheme, comm=comm, **options)
        return K.report.scheme, K @ v

    ((form, want),) = on_threads(1, spread)
    for other, got in on_threads(2, spread):
        assert other == form
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * np.abs(want).max())
