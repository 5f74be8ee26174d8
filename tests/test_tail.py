"""Low rank and the diagonal of what it leaves out."""

import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import dense_oracles
import numpy as np
import pytest
from matrix_cases import products_only
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.devices import to_host
from gpu_hodlr.errors import ArgumentError


def nearly(n: int = 300, decay: float = 0.8, noise: float = 1e-2, seed: int = 0) -> np.ndarray:
    """A decaying part, and a tail that is mostly diagonal."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    exact = (Q * decay ** np.arange(n)) @ Q.T + np.diag(noise * rng.uniform(0.9, 1.1, n))
    return (exact + exact.T) / 2


def error(K: Any, exact: np.ndarray) -> float:
    return dense_oracles.frobenius_error(to_host(K.to_dense()), exact)


@pytest.mark.parametrize("rtol", [1e-1, 1e-2])
def test_promise(rtol: float, xp: ModuleType, dtype: Any):
    """Measured truly, and with fewer eigenvectors: the noise alone needs hundreds at 1e-2."""
    exact = nearly()
    op = gh.DenseOperator(xp.asarray(exact.astype(dtype)))
    K = gh.compress(op, "lowrank", rtol=rtol, tail="diagonal", max_rank=100)
    assert error(K, exact) <= 1.5 * rtol
    assert 0.5 * error(K, exact) <= K.report.error <= 2 * error(K, exact)
    assert K.structure.D is not None
    assert K.num_stored == 301 * K.ranks[0][0] + 300
    diagonal = to_host(K.diagonal())
    np.testing.assert_allclose(diagonal, np.diagonal(exact), rtol=0, atol=1e-5)
    assert K.trace() == pytest.approx(np.trace(exact), rel=1e-5)
    if rtol == 1e-2:
        assert K.ranks[0][0] < 50
        with pytest.warns(gh.errors.RankCapWarning):
            plain = gh.compress(op, "lowrank", rtol=rtol, max_rank=100)
        assert error(plain, exact) > 3 * error(K, exact)


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("definite", [True, False])
def test_it_makes_no_error_worse(decay: float, definite: bool):
    """Of a tail with no diagonal to speak of as well."""
    rng = np.random.default_rng(3)
    Q = np.linalg.qr(rng.standard_normal((400, 400)))[0]
    values = decay ** np.arange(400)
    exact = (Q * (values if definite else values * rng.choice([-1, 1], 400))) @ Q.T
    op = gh.DenseOperator((exact + exact.T) / 2, definite=definite)
    for rtol in (1e-1, 1e-3):
        plain, kept = (
            gh.compress(op, "lowrank", rtol=rtol, tail=tail) for tail in ("none", "diagonal")
        )
        assert kept.ranks == plain.ranks
        assert error(kept, exact) <= 1.001 * error(plain, exact)
        if kept.structure.D is not None:
            assert kept.structure.D.min() >= 0


def test_log_determinants_and_the_diagonal_of_the_inverse():
    """What a tail without a diagonal misses altogether."""
    exact, damping = nearly(400, 0.8), 1e-3
    damped = exact + damping * np.eye(400)
    want, inverse = np.linalg.slogdet(damped)[1], np.diagonal(np.linalg.inv(damped))
    missed = {}
    for tail in ("none", "diagonal"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is shown here
            K = gh.compress(exact, "lowrank", rtol=1e-2, max_rank=60, tail=tail)
            F = K.factorize(damping)
        own = np.diagonal(F.solve(np.eye(400)))
        missed[tail] = abs(F.logdet() - want), np.abs(own / inverse - 1).max()
    assert missed["diagonal"][0] < 0.02 * missed["none"][0]
    assert missed["diagonal"][1] < 0.2 < 1 < missed["none"][1]


def factorized(K: Any) -> Any:
    """At damping 0, which warns of the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return K.factorize()


@pytest.mark.parametrize("every_row", [False, True])
def test_factor(every_row: bool, xp: ModuleType, dtype: Any):
    exact = nearly(150)
    K = gh.compress(
        gh.DenseOperator(xp.asarray(exact.astype(dtype))), "lowrank", rtol=1e-2, tail="diagonal"
    )
    d = 0.01 + np.random.default_rng(4).random(150) * every_row
    for F, damping in (
        (K.factorize(xp.asarray(d.astype(dtype)) if every_row else 0.01), d),
        (factorized(K), np.zeros(150)),
    ):
        damped = to_host(K.to_dense()).astype(np.float64) + np.diag(damping)
        b = np.random.default_rng(2).standard_normal((150, 4)).astype(dtype)
        want = np.linalg.solve(damped, b)
        tolerance = 1e3 * float(np.finfo(dtype).eps) * np.linalg.cond(damped)
        got = to_host(F.solve(xp.asarray(b)))
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())
        assert F.logdet() == pytest.approx(np.linalg.slogdet(damped)[1], rel=1e-4)


def test_an_indefinite_matrix():
    """Its factor needs no more damping than -lambda_min: no entry of the diagonal is negative."""
    rng = np.random.default_rng(5)
    Q = np.linalg.qr(rng.standard_normal((200, 200)))[0]
    exact = (Q * np.r_[-2.0, -1.0, 3.0 * 0.7 ** np.arange(198)]) @ Q.T
    exact += np.diag(rng.uniform(-0.02, 0.04, 200))
    op = gh.DenseOperator((exact + exact.T) / 2, definite=False)
    K = gh.compress(op, "lowrank", rtol=5e-2, tail="diagonal")
    assert K.structure.signed
    assert K.structure.D.min() >= 0
    smallest = np.linalg.eigvalsh(K.to_dense())[0]
    F = K.factorize(0.5 - smallest)
    damped = K.to_dense() + (0.5 - smallest) * np.eye(200)
    np.testing.assert_allclose(F.solve(np.eye(200)), np.linalg.inv(damped), rtol=0, atol=1e-10)
    with pytest.raises(gh.errors.NotPositiveDefiniteError):
        K.factorize(-0.9 * smallest)


def test_the_zero_matrix_and_a_diagonal_one():
    assert gh.compress(np.zeros((30, 30)), "lowrank", tail="diagonal").structure.D is None
    d = np.linspace(1, 2, 500)
    K = gh.compress(gh.Diagonal(d), "lowrank", rtol=1e-6, tail="diagonal", max_rank=20)
    assert K.ranks == ((0,),)
    assert error(K, np.diag(d)) <= 1e-14
    assert K.factorize().logdet() == pytest.approx(np.log(d).sum())


@pytest.mark.parametrize("power", [-400, 400])
def test_extreme_scales(power: int):
    exact = nearly(200)
    K = gh.compress(np.ldexp(exact, power), "lowrank", rtol=1e-2, tail="diagonal")
    assert K.structure.D is not None
    assert dense_oracles.frobenius_error(np.ldexp(K.to_dense(), -power), exact) <= 1.5e-2


def test_arithmetic_files_and_types(tmp_path: Path):
    exact = nearly(120)
    K = gh.compress(exact, "lowrank", rtol=1e-2, tail="diagonal", storage_dtype=np.float32)
    d = np.linspace(0, 1, 120)
    for got, want in ((2 * K, 2 * exact), (K + gh.Diagonal(d), exact + np.diag(d)), (-K, -exact)):
        assert error(got, want) <= 1.5e-2
        got.save(tmp_path / "K.npz")
        np.testing.assert_array_equal(gh.load(tmp_path / "K.npz").to_dense(), got.to_dense())
    F = factorized(K)
    F.save(tmp_path / "F.npz")
    np.testing.assert_array_equal(gh.load(tmp_path / "F.npz").solve(d), F.solve(d))


def test_auto_takes_it():
    rng = np.random.default_rng(0)
    V = rng.standard_normal((600, 4))
    exact = V @ V.T + np.diag(rng.uniform(0.01, 0.1, 600))
    K = gh.compress(exact, "auto", rtol=3e-3, tail="diagonal")
    assert K.report.scheme == "lowrank"
    assert K.structure.D is not None
    assert error(K, exact) <= 9e-3


def test_ranks():
    exact = nearly()
    alone = gh.compress(exact, "lowrank", rtol=1e-2, tail="diagonal")
    b = np.random.default_rng(0).standard_normal((300, 2))
    want, solved, logdet = alone @ b, factorized(alone).solve(b), factorized(alone).logdet()

    def spread(comm: Any) -> Any:
        K = gh.compress(exact, "lowrank", rtol=1e-2, tail="diagonal", comm=comm)
        F = factorized(K)
        return K @ b, F.solve(b), F.logdet(), K.ranks, K.num_stored

    for size in (2, 3):
        results = on_threads(size, spread)
        for got in results:
            np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-10)
            np.testing.assert_allclose(got[1], solved, rtol=0, atol=1e-6)
            assert got[2] == pytest.approx(logdet)
            assert got[3:] == (alone.ranks, alone.num_stored)
            np.testing.assert_array_equal(got[0], results[0][0])

    def differing(comm: Any) -> Any:
        return gh.compress(exact, "lowrank", tail="diagonal" if comm.rank else "none", comm=comm)

    for failure in on_threads(2, differing):
        assert "tail differs between ranks" in str(failure)


@pytest.mark.parametrize(
    ("scheme", "tail", "said"),
    [
        ("lowrank", "trace", "tail must be one of none, diagonal, got 'trace'"),
        ("lowrank", True, "tail must be one of none, diagonal, got True"),
        ("hss", "diagonal", "tail is for scheme 'lowrank', got 'diagonal' with scheme 'hss'"),
        ("hodlr", "diagonal", "tail is for scheme 'lowrank'"),
    ],
)
def test_bad_input(scheme: str, tail: Any, said: str):
    with pytest.raises(ArgumentError, match=said):
        gh.compress(np.eye(20), scheme, tail=tail)


def test_a_diagonal_that_only_products_tell():
    """Of a small matrix it is formed so; of a large one that would be a compression of its own."""
    exact = nearly(150)
    K = gh.compress(products_only(exact), "lowrank", rtol=1e-2, tail="diagonal")
    np.testing.assert_allclose(K.diagonal(), np.diagonal(exact), rtol=0, atol=1e-10)
    d = np.linspace(1, 2, 3000)
    op = gh.FunctionOperator(3000, matmat=lambda v: d[:, None] * v)
    assert not op.has_diagonal
    with pytest.raises(ArgumentError, match="3000 products alone: write _diagonal or _block"):
        gh.compress(op, "lowrank", tail="diagonal")
    known = gh.FunctionOperator(3000, matmat=lambda v: d[:, None] * v, diagonal=lambda: d)
    assert known.has_diagonal
    assert gh.compress(known, "lowrank", tail="diagonal", rtol=1e-3).ranks == ((0,),)


def test_a_network():
    """The log-determinant that is asked for, of a Gauss-Newton matrix."""
    pytest.importorskip("torch")
    from network_cases import data, image_network, images

    targets = data((64,), 10, "cross_entropy", n=25)[1]
    op = gh.GGNOperator(
        image_network(64, 6, 10), "cross_entropy", images(8, n=25, border=1), targets
    )
    dense, damping = op.to_dense(), 1e-3
    want = np.linalg.slogdet(dense + damping * np.eye(len(dense)))[1]
    missed = {}
    for tail in ("none", "diagonal"):
        K = gh.compress(op, "lowrank", rtol=5e-3, tail=tail)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the damping is below the spectral error
            missed[tail] = abs(K.factorize(damping).logdet() - want)
    assert missed["diagonal"] < 0.3 * missed["none"]
