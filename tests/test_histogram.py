"""Histograms of weighted rows on every library, against NumPy's sums."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from gpu_hodlr.batched.histogram import weighted_histogram
from gpu_hodlr.devices import to_host


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (16, 50)])
def test_weighted_histogram(xp: ModuleType, shape: tuple[int, int]):
    """Bins of many, of one and of none, of numbers of any size; the same bits again."""
    rng, count = np.random.default_rng(shape[1]), 20
    bins, edges = np.minimum(rng.geometric(0.3, shape), count) - 1, 10.0 ** -np.arange(0, 60, 3)
    values = rng.uniform(-1, 1, shape) * edges[bins]
    weights = rng.random(shape[0])
    given = [xp.asarray(a) for a in (bins, values, edges, weights)]
    found = weighted_histogram(*given)
    want = np.zeros((2, count))
    for row, weight in enumerate(weights):
        np.add.at(want[0], bins[row], weight)
        np.add.at(want[1], bins[row], weight * values[row] ** 2)
    assert found.dtype == np.float64
    np.testing.assert_allclose(to_host(found)[0], want[0], rtol=1e-13)
    rounding = 1e-14 if xp is np else 1e-9
    assert (abs(to_host(found)[1] - want[1]) <= rounding * want[0] * edges**2).all()
    np.testing.assert_array_equal(to_host(weighted_histogram(*given)), to_host(found))


def test_nothing_is_waited_for(stand_in: Any):
    xp = stand_in.cupy
    given = xp.zeros((3, 4), np.int64), xp.ones((3, 4)), xp.ones(5), xp.ones(3)
    stand_in.counters.reset()
    weighted_histogram(*given)
    assert stand_in.counters.synchronizations == 0
