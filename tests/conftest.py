"""One BLAS thread, settled before NumPy is loaded, and the array library that bodies run on."""

import os

# OMP_NUM_THREADS is left alone: the package's own pool obeys it and shall have its threads.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["BLIS_NUM_THREADS"] = "1"
os.environ["VECLIB_MAXIMUM_THREADS"] = "1"

import importlib
from types import ModuleType

import hypothesis
import numpy as np
import pytest

from gpu_hodlr import devices

hypothesis.settings.register_profile(
    "seeded", derandomize=True, deadline=None, database=None, max_examples=60
)
hypothesis.settings.load_profile("seeded")


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest) -> ModuleType:
    """The array library: one test body for NumPy and CuPy."""
    if request.param == "numpy":
        return np
    try:
        devices.resolve_device("cuda")
        cupy = importlib.import_module("cupy")
        cupy.cuda.runtime.getDeviceCount()
    except Exception as reason:  # CuPy raises many kinds where a library or device is missing
        pytest.skip(f"CuPy cannot be used: {reason}")
    return cupy
