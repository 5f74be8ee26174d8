"""Objects come back from a pickle and a deep copy, used before or not, and multiply alike."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.errors import DistributedError, NotPositiveDefiniteError

N = 150
A = toeplitz(N) + np.eye(N)


def compressed(scheme: str) -> gh.CompressedMatrix:
    options = {"budget": 0.2} if scheme == "fmm" else {}
    return gh.compress(A, scheme, rtol=1e-6, max_rank=N, leaf_size=20, **options)


def network() -> gh.GGNOperator:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return gh.GGNOperator(model, "cross_entropy", torch.randn(9, 4), torch.arange(9) % 3)


MAKERS: dict[str, Callable[[], Any]] = {
    "dense": lambda: gh.DenseOperator(A),
    "kernel": lambda: gh.KernelOperator(np.random.default_rng(0).random((40, 2))),
    "network": network,
}
for scheme in ("hss", "hodlr", "fmm", "lowrank"):
    MAKERS[scheme] = lambda scheme=scheme: compressed(scheme)
    MAKERS[f"{scheme} factor"] = lambda scheme=scheme: compressed(scheme).factorize(0.1)


def eigenbasis() -> gh.KFEMatrix:
    pytest.importorskip("torch")
    from eigenbasis_cases import operator

    K = gh.compress(operator("autoencoder"), "kfe", rtol=1e-4)
    assert isinstance(K, gh.KFEMatrix)
    return K


MAKERS |= {
    "diagonal": lambda: gh.Diagonal(np.arange(1.0, 11.0)),
    "scaled": lambda: -2 * compressed("hss"),
    "sum": lambda: compressed("hodlr") + gh.Diagonal(np.linspace(1, 2, N)),
    "bfloat16": lambda: gh.compress(A, rtol=1e-2, leaf_size=20, storage_dtype="bfloat16"),
    "refined factor": lambda: compressed("hss").factorize(0.1, dtype="float32"),
    "factor of every row": lambda: compressed("fmm").factorize(np.linspace(1, 2, N)),
    "eigenbasis": eigenbasis,
    "eigenbasis, scaled": lambda: 3 * eigenbasis(),
    "eigenbasis factor": lambda: eigenbasis().factorize(0.1),
}


def again(x: Any) -> list[Any]:
    """Copies of an object."""
    copies = [pickle.loads(pickle.dumps(x, protocol)) for protocol in (2, pickle.HIGHEST_PROTOCOL)]
    return [*copies, copy.copy(x), copy.deepcopy(x)]


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_copies_multiply_alike(make: Callable[[], Any], used: bool):
    x = make()
    v = np.random.default_rng(1).standard_normal((x.shape[0], 2)).astype(x.dtype)
    if used:
        x @ v
    for other in again(x):
        assert other is not x
        assert repr(other) == repr(x)
        np.testing.assert_array_equal(other @ v, x @ v)


@pytest.mark.parametrize("make", [lambda: compressed("hss"), eigenbasis], ids=["hss", "kfe"])
def test_a_copied_factor_has_all_its_verbs(make: Callable[[], Any]):
    F = make().factorize(0.1)
    z = np.random.default_rng(1).standard_normal(F.shape[0])
    for other in again(F):
        assert other.logdet() == F.logdet()
        np.testing.assert_array_equal(other.sqrt_matmat(z), F.sqrt_matmat(z))
        np.testing.assert_array_equal(other.sample(2, seed=3), F.sample(2, seed=3))


def test_a_copied_fmm_solver_still_says_what_would_do():
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((N, N)))[0]
    B = A - 3 * np.outer(Q[:, 0], Q[:, 0])
    K = gh.compress(B, "fmm", rtol=1e-6, max_rank=N, leaf_size=20, budget=0.2)
    for other in again(K):
        with pytest.raises(NotPositiveDefiniteError) as caught:
            other.factorize(0.01).solve(np.ones(N))
        assert caught.value.damping is not None


def test_torch_saves_and_loads_it():
    torch = pytest.importorskip("torch")
    K, file = compressed("hss"), io.BytesIO()
    torch.save(K, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    np.testing.assert_array_equal(other @ np.ones(N), K @ np.ones(N))


def test_errors_come_back():
    error = NotPositiveDefiniteError("no", 0.5, 1e-3, np.ones(2), -1.0)
    for other in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert (str(other), other.damping, other.rtol, other.curvature) == ("no", 0.5, 1e-3, -1.0)
        np.testing.assert_array_equal(other.direction, np.ones(2))


def test_what_is_spread_over_ranks_says_how_it_is_kept():
    def run(comm: Any) -> str:
        K = gh.compress(A, rtol=1e-6, max_rank=N, leaf_size=20, comm=comm)
        with pytest.raises(DistributedError, match="cannot be pickled or copied: save it"):
            pickle.dumps(K)
        return "refused"

    assert on_threads(2, run) == ["refused", "refused"]
