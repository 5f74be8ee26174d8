"""What a run of the tests on a GPU does otherwise: pytest hooks, for conftest.py.

A GPU run is one whose `-m` begins with "gpu", or any with GPU_HODLR_REQUIRE_GPU=1. Other people's
warnings are no errors in it: plugins and newer versions of NumPy, torch and CuPy must not keep a
GPU's few minutes from being used. The package's own still are.

GPU_HODLR_REQUIRE_GPU=1 is for machines that have a GPU: a test marked `gpu` that is skipped fails,
for whatever reason it was skipped, and so does a run in which no such test has passed.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from gpu_hodlr import errors

REQUIRED = "GPU_HODLR_REQUIRE_GPU"


def _is_required() -> bool:
    value = os.environ.get(REQUIRED, "")
    if value not in ("", "0", "1"):
        raise pytest.UsageError(f"{REQUIRED} must be 0 or 1, got {value!r}")
    return value == "1"


def _filters() -> Iterator[str]:
    """Of warnings; a later line goes before an earlier one, a test's own mark before both."""
    yield "default"
    yield "error::RuntimeWarning:gpu_hodlr"  # a division by 0 and the like in the package's lines
    for name, value in vars(errors).items():
        if isinstance(value, type) and issubclass(value, Warning):
            yield f"error::{errors.__name__}.{name}"


def pytest_configure(config: pytest.Config) -> None:
    """Settle how this run treats warnings and skips; also in each process of pytest-xdist."""
    required = _is_required()
    if required:
        config.pluginmanager.register(_Required(), "gpu_required")
    if required or config.option.markexpr.startswith("gpu"):
        for line in _filters():
            config.addinivalue_line("filterwarnings", line)


class _Required:
    """Fails tests that are skipped, and runs without a passed test, of those marked `gpu`."""

    def __init__(self) -> None:
        self._passed = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if report.skipped and item.get_closest_marker("gpu") and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            report.outcome = "failed"
            report.longrepr = f"{REQUIRED}=1, and this test was not run: {reason}"
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._passed += report.when == "call" and report.passed and "gpu" in report.keywords

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        good = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        is_worker = hasattr(session.config, "workerinput")  # it sees a part of the run
        if not self._passed and not is_worker and session.exitstatus in good:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self._passed:
            terminalreporter.write_line(f"{REQUIRED}=1: no test marked gpu has passed", red=True)
