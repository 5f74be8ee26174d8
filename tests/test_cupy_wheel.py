"""The package's use of CuPy against the real one, imported without a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cupy_names
import pytest
from host_cupy import kernels

from gpu_hodlr import devices

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cupy") is None, reason="the real CuPy is not installed"
)

ROOT = Path(cupy_names.__file__).parents[1]
# Their CUDA libraries are no part of a test environment: of these bindings the files are there,
# and the names are looked for in them.
NOT_LOADED = {"cusolver", "nccl"}


def looked_up(folder: Path) -> dict[str, list[str]]:
    """What tests/cupy_names.py says of a folder, in a process of its own."""
    done = subprocess.run(
        [sys.executable, cupy_names.__file__, str(folder)],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT / "tests",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_every_name_of_cupy_that_the_package_uses_exists() -> None:
    found = looked_up(Path(devices.__file__).parent)
    assert found["missing"] == []
    assert found["bypasses"] == []
    assert set(found["unloadable"]) <= NOT_LOADED
    for name in ("cupy.RawModule", "cupy.cuda.Stream", "cupyx.empty_pinned", "cupy.linalg.eigh",
                 "cupy.put_along_axis", "cupy.cuda.runtime.memGetInfo",
                 f"{cupy_names.LIBRARIES}.cusolver.dpotrfBatched",
                 f"{cupy_names.LIBRARIES}.nccl.groupStart"):  # fmt: skip
        assert name in found["names"]
    assert len(found["names"]) > 80


def test_names_that_do_not_exist_are_found(tmp_path: Path) -> None:
    """Each way to name something, once right and once wrong; libraries past their package."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "uses.py").write_text(
        "import importlib\n"
        "import cupy\n"
        "import cupy as cp\n"
        "from cupy.cuda import Stream, Strom\n"
        "import cupy_backends.cuda.libs.cusolver\n"
        "def f(x, xp):\n"
        "    runtime, n = cp.cuda.runtime, 3\n"
        "    space = np if n else importlib.import_module('cupy')\n"
        "    solver = cuda_library('cusolver')\n"
        "    return (namespace(x).zeros, namespace(x).zeroes, xp.ones(3).sum, xp.onse,\n"
        "            runtime.memGetInfo, runtime.memoGetInfo, space.eye, space.ear,\n"
        "            cupy.cuda.Device().id, cupy.cuda.Device(n).idea, cupy.cuda.nccl.groupStart,\n"
        "            self._xp.fmin, self._xp.fmine,\n"
        "            solver.spotrfBatched, solver.spotrfBatch, cuda_library('curdle'), n.nothing)\n"
    )
    found = looked_up(package)
    missing = {one.split(" ")[0] for one in found["missing"]}
    libraries = cupy_names.LIBRARIES
    assert missing == {
        "cupy.cuda.Strom", "cupy.zeroes", "cupy.onse", "cupy.fmine", "cupy.ear",
        "cupy.cuda.runtime.memoGetInfo", "cupy.cuda.Device().idea", "cupy.cuda.nccl",
        "cupy.cuda.nccl.groupStart",
        f"{libraries}.cusolver.spotrfBatch", f"{libraries}.curdle",
    }  # fmt: skip
    assert [one.split(" ")[0] for one in found["bypasses"]] == [f"{libraries}.cusolver"]
    assert all("package/uses.py:" in one for one in found["missing"])


@pytest.mark.parametrize("library", ["cusolver", "nccl"])
def test_libraries_of_pip_packages_are_looked_for(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CuPy asks NVIDIA's pathfinder for the library before its binding is imported."""
    importlib.import_module("cupy")
    package = importlib.import_module(cupy_names.LIBRARIES)
    if library in vars(package):
        pytest.skip(f"{library} is loaded already")
    asked = []

    class Pathfinder:
        class DynamicLibNotFoundError(Exception):
            pass

        @staticmethod
        def load_nvidia_dynamic_lib(name: str) -> Any:
            asked.append(name)
            raise Pathfinder.DynamicLibNotFoundError("as on this machine")

    monkeypatch.setattr(package, "_pathfinder", Pathfinder)
    with pytest.raises(ImportError, match="as on this machine"):
        devices.cuda_library(library)
    assert asked == [library]


def test_what_the_stand_in_offers_beyond_its_modules_exists() -> None:
    """A loaded kernel's attributes, and NCCL's calls with as many arguments as the tests' own."""
    cupy = importlib.import_module("cupy")
    for name in vars(kernels.RawKernel):
        assert name.startswith("_") or hasattr(cupy.RawKernel, name)
    pretended = pytest.importorskip("test_distributed_devices").PretendedNccl
    found = importlib.util.find_spec(f"{cupy_names.LIBRARIES}.nccl")
    assert found is not None
    binary = Path(str(found.origin)).read_bytes()
    for name in ("allGather", "reduce", "bcast", "send", "recv", "check_async_error"):
        stated = re.search(rb"NcclCommunicator\.%s\(([^)]*)\)" % name.encode(), binary)
        assert stated is not None
        wanted = len(stated[1].split(b","))  # with self
        assert len(inspect.signature(getattr(pretended, name)).parameters) == wanted, name


def test_the_version_wanted_is_the_one_looked_at() -> None:
    """Names are looked up in the oldest major version that pyproject.toml allows, or a newer."""
    wanted = re.findall(r"cupy-cuda\d+x(?:\[ctk\])?>=(\d+)", (ROOT / "pyproject.toml").read_text())
    assert len(wanted) == 3
    assert set(wanted) == {"14"}
    assert int(importlib.import_module("cupy").__version__.split(".")[0]) >= 14
