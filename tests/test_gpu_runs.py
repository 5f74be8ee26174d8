"""How runs of the tests treat a missing GPU and foreign warnings: pytest in a child process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import gpu_runs
import pytest

TESTS = Path(gpu_runs.__file__).parent
HEAD = "import warnings\nimport pytest\nfrom gpu_hodlr import errors\n"
GPU = "@pytest.mark.gpu\n"
# Every run is a fork of a process that has imported what conftest.py does.
FORKS = """
import json, os, sys
import numpy, pytest
import gpu_hodlr
folder, required, runs = json.load(sys.stdin)
for name, (options, value) in runs.items():
    if os.fork() == 0:
        if value is not None:
            os.environ[required] = value
        with open(f"{folder}/{name}/output", "wb", buffering=0) as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        status = pytest.main([*options, f"--rootdir={folder}/{name}", f"{folder}/{name}"])
        sys.stdout.flush()
        os._exit(status)
    with open(f"{folder}/{name}/status", "w") as file:
        file.write(str(os.waitstatus_to_exitcode(os.wait()[1])))
"""
ALWAYS = ("-c", str(TESTS.parent / "pyproject.toml"), "-p", "conftest", "-p", "no:cacheprovider",
          "-o", "addopts=--strict-markers -rA")  # fmt: skip


@cache
def ended() -> dict[str, tuple[int, str]]:
    """Exit status and output of pytest with this conftest.py, of every run."""
    environment = {k: v for k, v in os.environ.items() if k != gpu_runs.REQUIRED}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    with tempfile.TemporaryDirectory() as folder:
        for name, (tests, _, _) in RUNS.items():
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "test_it.py").write_text(HEAD + tests)
        runs = {name: ((*ALWAYS, *options), value) for name, (_, options, value) in RUNS.items()}
        subprocess.run(
            [sys.executable, "-c", FORKS], input=json.dumps((folder, gpu_runs.REQUIRED, runs)),
            text=True, timeout=120, check=True, cwd=TESTS, env=environment,
        )  # fmt: skip
        found = {name: Path(folder) / name for name in RUNS}
        return {
            name: (int((at / "status").read_text()), (at / "output").read_text())
            for name, at in found.items()
        }


# --- the runs ----------------------------------------------------------------------------------

NEEDS_GPU = GPU + "def test_on_it(gpu):\n    pass\n"
SKIPPED = (
    NEEDS_GPU
    + GPU
    + "def test_more():\n    pytest.skip('this torch has no CUDA')\n"
    + GPU
    + "@pytest.mark.skipif(True, reason='by a mark')\ndef test_marked():\n    pass\n"
    + GPU
    + "@pytest.mark.xfail\ndef test_expected():\n    raise ValueError\n"
    + "def test_for_another_reason():\n    pytest.skip('no g++')\n"
)
ELSEWHERE = "def test_elsewhere():\n    pass\n"
NONE_PASSED = GPU + "@pytest.mark.xfail\ndef test_expected():\n    1 / 0\n"
PASSED = GPU + "def test_on_it():\n    pass\n" + "def test_elsewhere():\n    pytest.skip('x')\n"
FOREIGN = (
    "def warn(category, module):\n"
    "    warnings.warn_explicit('planted', category, module + '.py', 1, module=module)\n"
    "warn(DeprecationWarning, 'some_plugin')\n"  # while tests are collected
    + GPU
    + "@pytest.mark.parametrize('module', ['numpy.core', 'torch', 'gpu_hodlr.tree'])\n"
    "def test_deprecated(module):\n    warn(DeprecationWarning, module)\n"
)
OWN = (
    GPU
    + "def test_division():\n    warn(RuntimeWarning, 'gpu_hodlr.batched.tall')\n"
    + "".join(
        f"{GPU}def test_{name}():\n    warnings.warn('own', errors.{name})\n"
        for name in ("RankCapWarning", "AccuracyWarning", "GraphWarning")
    )
)
EXPECTED = (
    "@pytest.mark.filterwarnings('ignore::gpu_hodlr.errors.RankCapWarning')\n"
    + GPU
    + "def test_expected():\n    warnings.warn('own', errors.RankCapWarning)\n"
)
WARNING = FOREIGN + OWN + EXPECTED
# Tests, options, and GPU_HODLR_REQUIRE_GPU. Of the two processes of "passed, -n 2" one has none.
RUNS: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "skipped": (NEEDS_GPU, ("-m", "gpu"), None),
    "missing": (SKIPPED, (), "1"),
    "missing, -n 1": (SKIPPED, ("-n", "1"), "1"),
    "none at all": ("", (), "1"),
    "none of them for the GPU": (ELSEWHERE, (), "1"),
    "none that passed": (NONE_PASSED, (), "1"),
    "none that passed, -n 1": (NONE_PASSED, ("-n", "1"), "1"),
    "passed": (PASSED, (), "1"),
    "passed, -n 2": (PASSED, ("-n", "2"), "1"),
    "yes": (NEEDS_GPU, (), "yes"),
    "warnings, -m gpu and": (WARNING, ("-m", "gpu and not slow"), "0"),
    "warnings, -m gpu, -n 1": (WARNING, ("-m", "gpu", "-n", "1"), None),
    "warnings, required": (WARNING, (), "1"),
    "warnings": (FOREIGN, (), None),
    "warnings, -m not gpu": (FOREIGN, ("-m", "not gpu"), None),
}

# --- a GPU that is required ------------------------------------------------------------------


def test_without_a_gpu_tests_are_skipped():
    status, output = ended()["skipped"]
    assert status == 0
    assert "1 skipped" in output


@pytest.mark.parametrize("name", ["missing", "missing, -n 1"])
def test_a_required_gpu_that_is_missing(name: str):
    """By the fixture, by a skip in the test, by a mark: it fails, and says why."""
    status, output = ended()[name]
    assert status == 1, output
    for reason in ("CuPy cannot be used: device 'cuda'", "this torch has no CUDA", "by a mark"):
        assert re.search(f"GPU_HODLR_REQUIRE_GPU=1, and this test was not run: .*{reason}", output)
    assert re.search("1 failed, 1 skipped, 1 xfailed, 2 errors", output), output
    assert "no test marked gpu has passed" in output


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("none")])
def test_a_run_that_shows_nothing_fails(name: str):
    status, output = ended()[name]
    assert status == 1, output
    assert "GPU_HODLR_REQUIRE_GPU=1: no test marked gpu has passed" in output


@pytest.mark.parametrize("name", ["passed", "passed, -n 2"])
def test_a_run_on_a_gpu_passes(name: str):
    """One whose test passes, as it does where there is one."""
    status, output = ended()[name]
    assert status == 0, output
    assert "no test marked gpu" not in output


def test_the_variable_is_0_or_1():
    status, output = ended()["yes"]
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "GPU_HODLR_REQUIRE_GPU must be 0 or 1, got 'yes'" in output


# --- warnings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["warnings, -m gpu and", "warnings, -m gpu, -n 1", "warnings, required"]
)
def test_foreign_warnings_on_a_gpu(name: str):
    """They are shown; the package's own fail a test, unless it says otherwise."""
    status, output = ended()[name]
    assert status == 1, output
    assert "4 failed, 4 passed" in output
    assert "DeprecationWarning: planted" in output
    for failed in re.findall(r"FAILED \S+::(\w+)", output):
        assert re.fullmatch("test_division|test_[A-Z][A-Za-z]+Warning", failed)


@pytest.mark.parametrize("name", ["warnings", "warnings, -m not gpu"])
def test_foreign_warnings_elsewhere_are_errors(name: str):
    status, output = ended()[name]
    assert status == pytest.ExitCode.INTERRUPTED, output
    assert "DeprecationWarning: planted" in output
