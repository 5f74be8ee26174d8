"""How runs of the tests treat a missing GPU and foreign warnings: pytest in a child process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_runs
import pytest

TESTS = Path(gpu_runs.__file__).parent
HEAD = "import warnings\nimport pytest\nfrom gpu_hodlr import errors\n"
GPU = "@pytest.mark.gpu\n"


def run(folder: Path, tests: str, *options: str, required: str | None = None) -> tuple[int, str]:
    """Exit status and output of pytest with this conftest.py on a file of tests."""
    (folder / "test_it.py").write_text(HEAD + tests)
    environment = {k: v for k, v in os.environ.items() if k != gpu_runs.REQUIRED}
    environment |= {} if required is None else {gpu_runs.REQUIRED: required}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", str(TESTS.parent / "pyproject.toml"),
         "-p", "conftest", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers -rA",
         "--rootdir", str(folder), str(folder), *options],
        capture_output=True, text=True, timeout=120, check=False, cwd=TESTS, env=environment,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


# --- a GPU that is required ------------------------------------------------------------------

NEEDS_GPU = GPU + "def test_on_it(gpu):\n    pass\n"


def test_without_a_gpu_tests_are_skipped(tmp_path: Path):
    status, output = run(tmp_path, NEEDS_GPU, "-m", "gpu")
    assert status == 0
    assert "1 skipped" in output


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_required_gpu_that_is_missing(tmp_path: Path, workers: str):
    """By the fixture, by a skip in the test, by a mark: it fails, and says why."""
    tests = (
        NEEDS_GPU
        + GPU
        + "def test_more():\n    pytest.skip('this torch has no CUDA')\n"
        + GPU
        + "@pytest.mark.skipif(True, reason='by a mark')\ndef test_marked():\n    pass\n"
        + GPU
        + "@pytest.mark.xfail\ndef test_expected():\n    raise ValueError\n"
        + "def test_for_another_reason():\n    pytest.skip('no g++')\n"
    )
    status, output = run(tmp_path, tests, "-n", workers, required="1")
    assert status == 1, output
    for reason in ("CuPy cannot be used: device 'cuda'", "this torch has no CUDA", "by a mark"):
        assert re.search(f"GPU_HODLR_REQUIRE_GPU=1, and this test was not run: .*{reason}", output)
    assert re.search("1 failed, 1 skipped, 1 xfailed, 2 errors", output), output
    assert "no test marked gpu has passed" in output


NONE_PASSED = GPU + "@pytest.mark.xfail\ndef test_expected():\n    1 / 0\n"


@pytest.mark.parametrize(
    ("tests", "workers"),
    [("", "0"), ("def test_elsewhere():\n    pass\n", "0"), (NONE_PASSED, "0"), (NONE_PASSED, "2")],
    ids=["none at all", "none of them for the GPU", "none that passed", "in two processes"],
)
def test_a_run_that_shows_nothing_fails(tmp_path: Path, tests: str, workers: str):
    status, output = run(tmp_path, tests, "-n", workers, required="1")
    assert status == 1, output
    assert "GPU_HODLR_REQUIRE_GPU=1: no test marked gpu has passed" in output


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_on_a_gpu_passes(tmp_path: Path, workers: str):
    """One whose test passes, as it does where there is one."""
    tests = GPU + "def test_on_it():\n    pass\n" + "def test_elsewhere():\n    pytest.skip('x')\n"
    status, output = run(tmp_path, tests, "-n", workers, required="1")
    assert status == 0, output
    assert "no test marked gpu" not in output


def test_the_variable_is_0_or_1(tmp_path: Path):
    status, output = run(tmp_path, NEEDS_GPU, required="yes")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "GPU_HODLR_REQUIRE_GPU must be 0 or 1, got 'yes'" in output


# --- warnings --------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("options", "required"),
    [(("-m", "gpu and not slow"), "0"), (("-m", "gpu", "-n", "2"), None), ((), "1")],
)
def test_foreign_warnings_on_a_gpu(tmp_path: Path, options: tuple[str, ...], required: str | None):
    """They are shown; the package's own fail a test, unless it says otherwise."""
    status, output = run(tmp_path, FOREIGN + OWN + EXPECTED, *options, required=required)
    assert status == 1, output
    assert "4 failed, 4 passed" in output
    assert "DeprecationWarning: planted" in output
    for failed in re.findall(r"FAILED \S+::(\w+)", output):
        assert re.fullmatch("test_division|test_[A-Z][A-Za-z]+Warning", failed)


@pytest.mark.parametrize("options", [(), ("-m", "not gpu")])
def test_foreign_warnings_elsewhere_are_errors(tmp_path: Path, options: tuple[str, ...]):
    status, output = run(tmp_path, FOREIGN, *options)
    assert status == pytest.ExitCode.INTERRUPTED, output
    assert "DeprecationWarning: planted" in output
