"""The tests marked `gpu`, primitives first; GPU_HODLR_REQUIRE_GPU makes them fail, not skip."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gpu_steps.report import Report

TESTS = Path(__file__).resolve().parents[2] / "tests"
# What everything else is made of: a fault here explains those that follow.
FIRST = ("test_batched", "test_block_sparse", "test_merge_smallest", "test_tall",
         "test_level_products", "test_cuda")  # fmt: skip
SMALL = ("test_tall",)  # files of a trial
PROCESSES = 8
_SHOWN, _TOLD = 10, 100  # failures with their tracebacks, as they come; with a row
_EVERY = 50  # tests between two rows
_HANGS = "40"  # seconds in one test after which pytest says where it is


def run(report: Report) -> None:
    os.chdir(TESTS.parent)
    rows = Rows(report)
    ended = int(pytest.main(arguments(report), plugins=[rows]))
    rows.write(ended=ended, skipped_because=dict(rows.reasons.most_common(5)))
    counts = rows.counts
    if ended or counts["failed"] or not counts["passed"]:
        raise AssertionError(
            f"pytest ended with {ended}: {counts['passed']} tests passed, {counts['failed']}"
            f" failed, {counts['skipped']} were skipped"
        )


def arguments(report: Report) -> list[str]:
    """Of pytest; its output has tracebacks as Python's own, the first ones at once (see `Rows`)."""
    rest = sorted(path.stem for path in TESTS.glob("test_*.py") if path.stem not in FIRST)
    files = SMALL if report.small else (*FIRST, *rest)
    spread = ["-n", "0"] if report.small else [
        "-n", str(PROCESSES), "--maxprocesses", str(PROCESSES), "--dist", "load",
        "--maxschedchunk", "4",
    ]  # fmt: skip
    return [
        "-o", "addopts=", "-q", "--strict-markers", "-m", "gpu and not slow", "--tb=native",
        "-p", "no:cacheprovider", "-p", "no:benchmark", "--continue-on-collection-errors",
        "-o", f"faulthandler_timeout={_HANGS}", *spread,
        *(str(TESTS / f"{name}.py") for name in files),
    ]  # fmt: skip


class Rows:
    """A plugin of pytest: tells failures as they come and counts on, should the time run out."""

    def __init__(self, report: Report) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self._report = report
        self._terminal: Any = None
        self._not_collected: set[str] = set()

    def write(self, **more: Any) -> None:
        """A row of what has been counted."""
        self._report.row(**dict(self.counts), **more)

    # Hooks of pytest.

    def pytest_sessionstart(self, session: Any) -> None:  # noqa: D102
        self._terminal = session.config.pluginmanager.get_plugin("terminalreporter")

    def pytest_collectreport(self, report: Any) -> None:  # noqa: D102
        if report.failed and report.nodeid not in self._not_collected:  # each process tells it
            self._not_collected.add(report.nodeid)
            self._failed(report)

    def pytest_runtest_logreport(self, report: Any) -> None:  # noqa: D102
        if report.failed:
            self._failed(report)
        elif report.skipped:
            self.counts["skipped"] += 1
            self.reasons[_reason(report)] += 1
        elif report.when == "call":
            self.counts["passed"] += 1
            if self.counts["passed"] % _EVERY == 0:
                self.write()

    def _failed(self, report: Any) -> None:
        self.counts["failed"] += 1
        text = str(report.longrepr)
        lines = [line for line in text.splitlines() if line.strip()]
        if self.counts["failed"] <= _TOLD:
            self._report.row(test=report.nodeid, failed=(lines or [""])[-1][:300])
        if self.counts["failed"] <= _SHOWN and self._terminal is not None:
            self._terminal.write_line(f"\n{report.nodeid}\n{text}\n")


def _reason(report: Any) -> str:
    found = report.longrepr
    return str(found[2] if isinstance(found, tuple) and len(found) == 3 else found)
