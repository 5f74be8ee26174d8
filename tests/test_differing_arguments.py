"""Arguments that one rank alone gives, or that cannot be used on one alone: all ranks are told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.compressed import damped, hss_matrix, matrix
from gpu_hodlr.errors import ArgumentError, DtypeError, MemoryEstimateError, ShapeError
from gpu_hodlr.factor import inverse, solver

N = 160
EXACT = toeplitz(N)
Door = Callable[[Any, Any, int], Any]  # of a matrix, its factor and the rank


def diagonal(K: Any, rank: int) -> gh.Diagonal:
    """Of all rows, or of the rank's own."""
    d = np.ones(N)
    return gh.Diagonal(d[K.rows] if rank else d)


ANY_FORM: dict[str, Door] = {
    "times": lambda K, F, rank: K * (2.0 + rank),
    "by": lambda K, F, rank: K / (2.0 * rank),
    "plus": lambda K, F, rank: K + diagonal(K, rank),
    "damping": lambda K, F, rank: K.factorize(0.1 + rank),
    "a damping that cannot be": lambda K, F, rank: K.factorize([0.1, -1.0][rank]),
    "a damping of every row": lambda K, F, rank: K.factorize([0.1, np.ones(N)][rank]),
    "dampings": lambda K, F, rank: K.factorize_many([0.1] * (1 + rank)),
    "no list of dampings": lambda K, F, rank: K.factorize_many([[0.1], 0.1][rank]),
    "one of several dampings": lambda K, F, rank: K.factorize_many([0.1, 0.2 + rank]),
    "index": lambda K, F, rank: F.inverse_block([3, 4 + rank]),
    "an index that cannot be": lambda K, F, rank: F.inverse_block([3, 4 - 5 * rank]),
    "shift": lambda K, F, rank: K.factorize(0.1, shift=["auto", "more"][rank]),
    "one shifts": lambda K, F, rank: K.factorize(0.1, shift=["auto", None][rank]),
    "path": lambda K, F, rank: K.save(["one.npz", ""][rank]),
    "path of a factor": lambda K, F, rank: F.save([3, "one.npz"][rank]),
    "device": lambda K, F, rank: gh.load("there.npz", ["cpu", "tpu"][rank], K.owners.comm),
    "cg": lambda K, F, rank: gh.cg(K, np.ones(N), damping=0.1 - rank),
    "cg, x0": lambda K, F, rank: gh.cg(K, np.ones(N), damping=0.1, x0=[None, np.ones(N)][rank]),
    "cg, M": lambda K, F, rank: gh.cg(K, np.ones(N), damping=0.1, M=[F, "F"][rank]),
    "cg, M of one": lambda K, F, rank: gh.cg(K, np.ones(N), damping=0.1, M=[F, None][rank]),
    "cg, callback": lambda K, F, rank: gh.cg(
        K, np.ones(N), damping=0.1, callback=[None, lambda x: None][rank]
    ),
}
FACTOR: dict[str, Door] = {
    "samples": lambda K, F, rank: F.sample(2 + rank),
    "of the inverse": lambda K, F, rank: F.sample(2, inverse=bool(rank)),
    "no samples": lambda K, F, rank: F.sample([2, -1][rank]),
    "transpose": lambda K, F, rank: F.sqrt_matmat(np.ones(N), transpose=bool(rank)),
    "transpose of the inverse": lambda K, F, rank: F.sqrt_solve(np.ones(N), transpose=bool(rank)),
}
SOLVER: dict[str, Door] = {
    "rtol": lambda K, F, rank: F.solve(np.ones(N), rtol=10.0 ** (-6 - rank)),
    "probes": lambda K, F, rank: F.inverse_diagonal(4 + rank),
    "seed of probes": lambda K, F, rank: F.logdet_gradient(4, rank),
    "an rtol that cannot be": lambda K, F, rank: F.solve(np.ones(N), rtol=[1e-6, np.nan][rank]),
    "maxiter": lambda K, F, rank: F.solve(np.ones(N), maxiter=rank),
}
CASES = [(scheme, name) for scheme in ("hss", "hodlr", "lowrank") for name in ANY_FORM | FACTOR]
CASES += [("fmm", name) for name in ANY_FORM | SOLVER]
REFUSED = ArgumentError, DtypeError, ShapeError


LITTLE: dict[str, Callable[[Any, Any], Any]] = {
    "dense": lambda K, F: K.to_dense(),
    "factor": lambda K, F: K.factorize(0.1),
    "samples": lambda K, F: F.sample(3),
    "block": lambda K, F: F.inverse_block([0, 1]),
    "diagonal": lambda K, F: F.inverse_diagonal(),
    "factors": lambda K, F: K.factorize_many([0.1, 0.2]),
}


def ends(comm: Any, scheme: str, door: Door) -> str:
    """Refused is right; then all ranks go on together."""
    options = {"budget": 0.3} if scheme == "fmm" else {}
    K = gh.compress(EXACT, scheme, rtol=1e-3, max_rank=N, leaf_size=20, comm=comm, **options)
    F = K.factorize(0.5)
    K.save("there.npz")
    try:
        door(K, F, comm.rank)
        said = "accepted"
    except REFUSED:
        said = "refused"
    np.testing.assert_allclose(K @ np.ones(N), EXACT @ np.ones(N), rtol=0, atol=0.1)
    return said


@pytest.mark.parametrize(("scheme", "name"), CASES)
def test_all_are_told(scheme: str, name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    door = (ANY_FORM | FACTOR | SOLVER)[name]
    assert on_threads(2, lambda comm: ends(comm, scheme, door), 10) == ["refused"] * 2


@pytest.mark.parametrize("name", LITTLE)
def test_memory_that_one_rank_has_not(name: str, monkeypatch: pytest.MonkeyPatch):
    """What is estimated beforehand is refused by all."""
    little: set[int] = set()  # threads

    def check(needed: int, what: str, lower: str, device: str) -> None:
        if threading.get_ident() in little:
            raise MemoryEstimateError(f"{what} does not fit")

    for module in (damped, matrix, solver, inverse, hss_matrix):
        monkeypatch.setattr(module, "check_memory", check)

    def run(comm: Any) -> str:
        K = gh.compress(EXACT, rtol=1e-3, leaf_size=20, comm=comm)
        F = K.factorize(0.5)
        if comm.rank:
            little.add(threading.get_ident())
        with pytest.raises(MemoryEstimateError):
            LITTLE[name](K, F)
        K @ np.ones(N)
        return "refused"

    assert on_threads(2, run, 10) == ["refused"] * 2
