"""Bytes that the CUDA path holds at its peak, counted on the stand-in for CuPy (not a GPU run).

What is counted is what the pool has handed out; the matrix itself is not.
"""

import gc
from collections.abc import Callable
from typing import Any

import pytest
from host_cupy import HostCupy, memory
from marks import but_slow
from matrix_cases import toeplitz
from scripts import script
from test_memory import estimates

import gpu_hodlr as gh
from gpu_hodlr.compressed import damped
from gpu_hodlr.compression import memory as compress_memory
from gpu_hodlr.compression import probe

launches = script("launches")
MOST = 1.3  # times what is stored, and samples with their factorizations
N, LEAF = 512, 64


def peak(work: Callable[[], Any]) -> tuple[Any, int]:
    """A result, and the bytes at the peak of making it."""
    gc.collect()
    accounts = memory.accounts
    before = accounts.most_used = accounts.used
    result = work()
    return result, accounts.most_used - before


def operator(host: HostCupy, kind: str) -> gh.Operator:
    """One that keeps little for itself."""
    if kind != "dense":
        return launches.operators(host)[kind]
    xp, exact = host.cupy, host.cupy.asarray(toeplitz(N))
    return gh.FunctionOperator(
        N, matmat=lambda v: exact @ v, device="cuda",
        entries=lambda rows, cols: exact[xp.asarray(rows)[:, None], xp.asarray(cols)],
    )  # fmt: skip


@pytest.mark.parametrize("name", but_slow([
    "hss, products+entries, dense", "hss, entries, points", "hss, products",
    "fmm, products+entries", "fmm, entries", "hodlr, products+entries", "hodlr, entries",
    "hodlr, products", "lowrank",
], "hss, entries, points", "fmm, entries", "hodlr, entries"))  # fmt: skip
def test_a_compression_holds_what_is_stored_and_samples(
    stand_in: HostCupy, monkeypatch: pytest.MonkeyPatch, name: str
):
    """Within 1.3 of the estimate, which counts just those, as of a large matrix."""
    # Of a large matrix few columns are compared at a time; here it would be all of them.
    monkeypatch.setattr(probe, "_AT_ONCE", 1)
    monkeypatch.setattr(probe, "_LEAST_COLUMNS", 8)
    kind, scheme, options = launches.COMPRESSED[name]
    op = operator(stand_in, kind)
    options = {"rtol": 1e-2, "leaf_size": LEAF, "ordering": "natural", **options}
    needed, of_factor = estimates(monkeypatch, compress_memory), estimates(monkeypatch, damped)
    K, used = peak(lambda: gh.compress(op, scheme, **options))
    assert used <= MOST * sum(needed)
    if scheme in ("hss", "hodlr"):  # those of FMM and low rank are made of others
        _, used = peak(lambda: K.factorize(1.0))
        assert used <= MOST * of_factor[-1]


def test_a_replayed_product_holds_one_copy_of_its_vectors(stand_in: HostCupy):
    """What it needs is in the graph; a replay takes its result alone."""
    K = gh.compress(toeplitz(N), "hss", rtol=1e-2, leaf_size=LEAF, device="cuda")
    v = stand_in.cupy.ones((N, 2))
    for _ in range(2):
        K @ v
    _, used = peak(lambda: K @ v)
    assert used == v.nbytes
