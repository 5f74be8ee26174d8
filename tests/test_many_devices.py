"""The device path on many ranks: threads, with the stand-in for CuPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from host_cupy import HostCupy
from thread_ranks import on_threads

import gpu_hodlr as gh
from gpu_hodlr.compressed import CompressedMatrix
from gpu_hodlr.distributed import Communicator

N, COLUMNS = 300, 3
FORMS: dict[str, dict[str, Any]] = {
    "hss": {"scheme": "hss"},
    "hss products": {"scheme": "hss", "sampler": "products+entries"},
    "fmm": {"scheme": "fmm", "budget": 0.15},
    "hodlr": {"scheme": "hodlr"},
    "lowrank": {"scheme": "lowrank", "rtol": 1e-2},
}


@pytest.mark.filterwarnings("ignore::gpu_hodlr.errors.AccuracyWarning")  # of low rank at 1e-2
@pytest.mark.parametrize(("form", "size"), [*((form, 3) for form in FORMS), ("hss", 4)])
def test_every_form_on_devices(form: str, size: int, stand_in: HostCupy):
    """Compress, multiply, factorize and solve with device arrays, against one device."""
    xp = stand_in.cupy
    points = np.random.default_rng(0).random((N, 2))
    options = {"rtol": 1e-6, "leaf_size": 25, "max_rank": 80, "seed": 1, **FORMS[form]}
    op = gh.KernelOperator(xp.asarray(points), "gaussian", 0.7, nugget=1e-2)
    v = np.random.default_rng(1).standard_normal((N, COLUMNS))

    def job(comm: Communicator | None) -> tuple[Any, ...]:
        K = gh.compress(op, comm=comm, **options)
        assert isinstance(K, CompressedMatrix)
        own = xp.asarray(v[K.rows])
        product = K @ own
        assert isinstance(product, xp.ndarray)
        F = K.factorize(0.1)
        x = F.solve(own)
        assert isinstance(x, xp.ndarray)
        whole = F.solve(xp.asarray(v))
        return K.rows, K.ranks, product.get(), x.get(), whole.get()

    _, ranks, product, x, _ = job(None)
    for result in on_threads(size, job):
        assert isinstance(result, tuple), result
        rows, here, own, solved, whole = result
        assert here == ranks
        np.testing.assert_allclose(own, product[rows], rtol=0, atol=1e-11 * abs(product).max())
        np.testing.assert_allclose(solved, x[rows], rtol=0, atol=1e-8 * abs(x).max())
        np.testing.assert_allclose(whole, x, rtol=0, atol=1e-8 * abs(x).max())
