"""BLAS threads, settled before NumPy is loaded, and the array library that bodies run on."""

import os

# One, whatever the machine's environment says: several processes test at once. Another number is
# asked for by this variable alone. OMP_NUM_THREADS is left alone: the package's own pool obeys it
# and shall have its threads.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ.get("GPU_HODLR_TEST_BLAS_THREADS", "1")
os.environ["MKL_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"]
os.environ["BLIS_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"]
os.environ["VECLIB_MAXIMUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"]

import gc
import importlib
import sys
from types import ModuleType
from typing import Any

import hypothesis
import numpy as np
import pytest
from gpu_runs import pytest_configure  # noqa: F401  a hook
from host_cupy.fixtures import host_library_folder, stand_in  # noqa: F401  for every test

from gpu_hodlr import devices
from gpu_hodlr.errors import DeviceError

# Bytecode is kept, whatever the environment says: test modules are rewritten by pytest in every one
# of its processes, and tests start hundreds of others, each of which would compile the package.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

hypothesis.settings.register_profile(
    "seeded", derandomize=True, deadline=None, database=None, max_examples=60
)
hypothesis.settings.load_profile("seeded")


def pytest_collection_finish() -> None:
    """What is there before the first test stays: collections of garbage pass over it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def torch_draws_alike() -> None:
    """What a test draws of torch's own generator is the same whatever ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def gpu() -> ModuleType:
    """CuPy with a GPU."""
    try:
        devices.resolve_device("cuda")
    except DeviceError as reason:
        pytest.skip(f"CuPy cannot be used: {reason}")
    return importlib.import_module("cupy")


ON_GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=["stand_in", ON_GPU])
def cupy(request: pytest.FixtureRequest) -> ModuleType:
    """The stand-in for CuPy, and CuPy."""
    found = request.getfixturevalue(request.param)
    return found.cupy if request.param == "stand_in" else found


@pytest.fixture(params=["numpy", "stand_in", ON_GPU])
def xp(request: pytest.FixtureRequest) -> ModuleType:
    """The array library: one test body for NumPy, the stand-in for CuPy, and CuPy."""
    if request.param == "numpy":
        return np
    found = request.getfixturevalue(request.param)
    return found.cupy if request.param == "stand_in" else found


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Any:
    """Both types that arrays may have."""
    return request.param
