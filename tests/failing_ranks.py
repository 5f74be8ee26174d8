"""What calls a user's functions on several ranks; see test_failing_ranks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr.distributed import communicator

N = 160
EXACT = toeplitz(N)
SAID = "OSError: the disk of a rank is gone"
Called = Callable[[], None]  # what a user's function does first


def function(called: Called, *kinds: str) -> gh.FunctionOperator:
    """A matrix whose functions call `called` first."""

    def matmat(v: Any) -> Any:
        called()
        return EXACT @ v

    def entries(rows: Any, cols: Any) -> Any:
        called()
        return EXACT[np.ix_(rows, cols)]

    def diagonal() -> Any:
        called()
        return EXACT.diagonal()

    functions = {"matmat": matmat, "entries": entries, "diagonal": diagonal}
    return gh.FunctionOperator(N, **{kind: functions[kind] for kind in kinds})


class Subclass(gh.Operator):
    """The same as a subclass, the optional hooks included."""

    def __init__(self, called: Called) -> None:
        super().__init__(N)
        self.called = called

    def _matmat(self, v: Any) -> Any:
        self.called()
        return EXACT @ v

    def _block(self, rows: Any, cols: Any) -> Any:
        self.called()
        return EXACT[np.ix_(rows, cols)]

    def _diagonal(self) -> Any:
        self.called()
        return EXACT.diagonal()

    def runs(self) -> Any:
        self.called()
        return super().runs()

    def gram_vectors(self, *arguments: Any) -> Any:
        self.called()
        return super().gram_vectors(*arguments)

    def summand(self, index: int, count: int) -> Any:
        self.called()
        part = Subclass(self.called)
        part._matmat = lambda v: self._matmat(v) / count
        return part


class Inverse:
    """A user's preconditioner."""

    def __init__(self, called: Called) -> None:
        self.called = called

    def __matmul__(self, r: Any) -> Any:
        self.called()
        return r / 2


def compressing(*kinds: str, **options: Any) -> Callable[[Any, Called], Any]:
    options = {"leaf_size": 20, "rtol": 1e-3, **options}
    return lambda comm, called: gh.compress(function(called, *kinds), comm=comm, **options)


class Foreign:
    """The same of another package: what it is asked for may fail, one property or another."""

    def __init__(self, called: Called) -> None:
        self.called = called

    def __matmul__(self, v: Any) -> Any:
        self.called()
        return EXACT @ v

    def __getattr__(self, name: str) -> Any:
        known = {"shape": (N, N), "dtype": np.dtype(np.float64), "device": "cpu", "T": self}
        if name not in known:
            raise AttributeError(name)
        self.called()
        return known[name]


def shared_cg(comm: Any, called: Called) -> Any:
    op = function(called, "matmat")
    return gh.cg(
        op, np.ones((N, 3)), damping=0.5, comm=comm, maxiter=6, callback=lambda x: called()
    )


def summed_cg(comm: Any, called: Called) -> Any:
    return gh.cg(Subclass(called), np.ones(N), damping=0.5, comm=comm, maxiter=3)


def started_cg(comm: Any, called: Called) -> Any:
    op, M = function(called, "entries"), function(called, "matmat")
    return gh.cg(op, np.ones(N), damping=0.5, M=M, x0=np.ones(N), comm=comm, maxiter=3)


def foreign_cg(comm: Any, called: Called) -> Any:
    return gh.cg(Foreign(called), np.ones(N), damping=0.5, comm=comm, maxiter=3)


def spread_cg(comm: Any, called: Called) -> Any:
    K = gh.compress(EXACT, rtol=1e-3, leaf_size=20, comm=comm)
    b, M = np.ones(len(K.rows)), Inverse(called)
    return gh.cg(K, b, damping=0.5, M=M, maxiter=3, callback=lambda x: called())


def solving(make: Callable[[Called], Any], **options: Any) -> Callable[[Any, Called], Any]:
    """What plain CG takes long for; `linear_solve._COMPRESSION` says whether a factor is made."""
    b = np.random.default_rng(0).standard_normal(N)

    def run(comm: Any, called: Called) -> Any:
        found = gh.solve(make(called), b, 1e-3, comm=comm, rtol=1e-13, maxiter=60, **options)
        assert found[1].iterations > 25
        return found

    return run


def evidence(comm: Any, called: Called) -> Any:
    op = function(called, "matmat", "entries")
    return gh.log_marginal_likelihood(op, np.ones(N), 0.5, num_probes=2, comm=comm, leaf_size=20)


CASES: dict[str, Callable[[Any, Called], Any]] = {
    "entries": compressing("entries"),
    "entries, angle": compressing("entries", ordering="angle"),
    "entries, hodlr": compressing("entries", scheme="hodlr"),
    "entries, fmm": compressing("entries", scheme="fmm", budget=0.3),
    "entries, auto": compressing("entries", scheme="auto", budget=0.3),
    "products": compressing("matmat"),
    "products, hodlr": compressing("matmat", scheme="hodlr"),
    "products, lowrank": compressing("matmat", scheme="lowrank", rtol=0.3),
    "both": compressing("matmat", "entries", "diagonal"),
    "both, fmm": compressing("matmat", "entries", scheme="fmm", budget=0.3),
    "subclass": lambda comm, called: gh.compress(Subclass(called), leaf_size=20, comm=comm),
    "foreign": lambda comm, called: gh.compress(Foreign(called), leaf_size=20, comm=comm),
    "cg, operator": shared_cg,
    "cg, summands": summed_cg,
    "cg, from x0": started_cg,
    "cg, foreign": foreign_cg,
    "cg, matrix": spread_cg,
    "solve": solving(lambda called: function(called, "matmat", "entries"), leaf_size=20),
    "solve, summands": solving(Subclass, leaf_size=20),
    "solve, foreign": solving(Foreign, leaf_size=20),
    "evidence": evidence,
}
LEAST = {"entries": 12, "both": 14, "subclass": 16}  # places that call a user's function
BY_MPI = [("entries", 0), ("entries", 5), ("both", 3), ("products", 2), ("cg, operator", 4)]


def failing(name: str, comm: Any, rank: int, call: int) -> str:
    """How a case ends on this rank where call number `call` of a rank fails; all go on after it."""
    ranks = communicator(comm)
    calls = iter(range(call))

    def called() -> None:
        if ranks.rank == rank and next(calls, None) is None:
            raise OSError(SAID.partition(": ")[2])

    try:
        CASES[name](comm, called)
        said = "no failure"
    except Exception as e:
        said = f"{type(e).__name__}: {e}"
    assert ranks.share(ranks.rank) == list(range(ranks.size))
    return said


def by_mpi(comm: Any) -> list[str]:
    return [failing(name, comm, 1, call) for name, call in BY_MPI]


def devices(comm: Any) -> list[str]:
    """Devices that differ, and a GPU that one rank alone has not, are refused on all ranks."""

    def count() -> int:
        if comm.rank:
            raise OSError(SAID.partition(": ")[2])
        return 1

    runtime = SimpleNamespace(getDeviceCount=count)
    device = SimpleNamespace(use=lambda: None)
    cuda = SimpleNamespace(runtime=runtime, Device=lambda number: device)
    sys.modules["cupy"] = SimpleNamespace(cuda=cuda)  # type: ignore[assignment]
    os.environ["GPU_HODLR_NCCL"] = "0"
    said = []
    for device_of_rank in (["cpu", "cuda"], ["cuda", "cuda"]):
        try:
            gh.compress(EXACT, device=device_of_rank[comm.rank], comm=comm)
        except Exception as e:
            said.append(f"{type(e).__name__}: {e}")
    assert communicator(comm).share(comm.rank) == [0, 1]
    return said
