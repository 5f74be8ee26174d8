"""What a step finds out: rows, written as they come, and cases that may fail one by one."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np


class Skipped(Exception):  # noqa: N818  not an error
    """A step cannot be done here; the message says why."""


class Report:
    """Appends rows to a file, a JSON object a line: what was found is kept whatever comes after.

    Args:
        path: of the file.
        step: name of the step.
        size: "full", or "small" for a trial without a GPU.
        python: the command that starts an interpreter such as this one.

    Attributes:
        failures: cases that failed so far.
    """

    def __init__(self, path: Path, step: str, size: str, python: Sequence[str]) -> None:
        self.step, self.size, self.python = step, size, tuple(python)
        self.failures = 0
        self._path = path

    @property
    def small(self) -> bool:
        """Whether this is a trial with small matrices."""
        return self.size == "small"

    def row(self, **values: Any) -> None:
        """Write a row now."""
        line = json.dumps({"step": self.step, **plain(values)}, allow_nan=False)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)

    @contextmanager
    def case(self, name: str, /, **about: Any) -> Iterator[dict[str, Any]]:
        """One thing to try, a row; an exception in it fails the step and lets the next ones run.

        Args:
            name: what is tried.
            about: for the row.

        Yields:
            A dict; what the block puts there goes into the row.
        """
        found: dict[str, Any] = {}
        start = time.perf_counter()
        problem: dict[str, Any] = {}
        try:
            yield found
        except Skipped as reason:
            problem = {"skipped": str(reason)}
        except Exception as error:
            print(traceback.format_exc(), flush=True)
            self.failures += 1
            problem = {"problem": f"{type(error).__name__}: {error}"[:500]}
        seconds = round(time.perf_counter() - start, 4)
        verdict = "failed" if "problem" in problem else "skipped" if problem else "passed"
        head = {"case": name, **about, "verdict": verdict, "case_seconds": seconds}
        self.row(**(head | found | problem))


def plain(value: Any) -> Any:
    """The value as JSON knows it: NumPy's numbers as Python's, no NaN and no infinity."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
