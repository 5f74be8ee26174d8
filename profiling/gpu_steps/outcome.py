"""What became of a step: its process, its rows, the first traceback of its output."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

_MOST_OUTPUT = 1 << 26  # bytes: a step that writes more is killed
_KEPT = 1 << 19  # bytes of a step's output, of its beginning and of its end
_LINES = 60  # of a traceback
_TAIL = 15  # lines shown of a failed step that has no traceback
_POLL = 0.05  # seconds
_BEGINNING = re.compile(
    r"^(Traceback \(most recent call last\):|Fatal Python error: |Timeout \(\d)", re.MULTILINE
)
_CHAINED = ("During handling of the above", "The above exception was the direct cause")
OUT_OF_TIME, TOO_MUCH = "out of time", "too much output"


@dataclass
class Outcome:
    """A step as the summary tells it.

    Attributes:
        status: "passed", "failed", "crashed", "out of time", "stopped" or "skipped".
        why: exit status, signal, or why it was skipped.
        problem: the first traceback, or the end of the output of a failed step without one.
    """

    name: str
    what: str
    status: str
    why: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    problem: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)


def run_process(
    command: Sequence[str], limit: float, log: BinaryIO, environment: Mapping[str, str], cwd: Path
) -> int | str:
    """Run a command in a process group of its own, none of which is left afterwards.

    Args:
        command: to run.
        limit: seconds.
        log: where its output goes.
        environment: of the process.
        cwd: its folder.

    Returns:
        Its exit status, negative for a signal; `OUT_OF_TIME` or `TOO_MUCH`.
    """
    start = time.monotonic()
    before = os.fstat(log.fileno()).st_size
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
        process_group=0, env=dict(environment), cwd=cwd,
    )  # fmt: skip
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(_POLL)
            if time.monotonic() - start > limit:
                return OUT_OF_TIME
            if os.fstat(log.fileno()).st_size - before > _MOST_OUTPUT:
                return TOO_MUCH
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def verdict(ended: int | str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Status and reason of a step that ended so, with these rows."""
    if ended == OUT_OF_TIME:
        return OUT_OF_TIME, "killed"
    if isinstance(ended, str):
        return "failed", ended
    if ended < 0:
        return "crashed", _signal_name(-ended)
    if ended > 0:
        return "failed", f"exit status {ended}"
    reasons = [str(row["skipped"]) for row in rows if "skipped" in row and "case" not in row]
    return ("skipped", reasons[0]) if reasons else ("passed", "")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def read_rows(path: Path, start: int) -> list[dict[str, Any]]:
    """The rows of a file from a place on; a process may have died in its last, which is ended."""
    with path.open("r+b") as file:
        file.seek(start)
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.write(b"\n")
    lines = content.decode("utf-8", "replace").splitlines()
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def tidy(log: BinaryIO, start: int) -> str:
    """A step's output from a place on as text; what is in the middle of very much is cut out."""
    log.seek(start)
    size = os.fstat(log.fileno()).st_size - start
    if size > 2 * _KEPT:
        head = log.read(_KEPT)
        log.seek(-_KEPT, os.SEEK_END)
        raw = head + f"\n... {size - 2 * _KEPT} bytes left out ...\n".encode() + log.read()
    else:
        raw = log.read()
    text = "".join(
        c if c.isprintable() or c in "\n\t" else "\ufffd"
        for c in raw.decode("utf-8", "replace").replace("\r\n", "\n")
    )
    log.truncate(start)
    log.seek(start)
    log.write(text.encode() + (b"" if text.endswith("\n") or not text else b"\n"))
    log.flush()
    return text


def first_traceback(text: str) -> str:
    """The first traceback in an output, with those it is chained to; "" where there is none."""
    found = _BEGINNING.search(text)
    if found is None:
        return ""
    lines = text[found.start() :].splitlines()
    if not lines[0].startswith("Traceback"):  # of faulthandler: to the second empty line
        blank = [i for i, line in enumerate(lines) if not line.strip()][:2]
        return "\n".join(lines[: blank[-1] if len(blank) == 2 else _LINES][:_LINES])
    return "\n".join(lines[: _end_of_traceback(lines)][:_LINES])


def _end_of_traceback(lines: Sequence[str]) -> int:
    """Number of lines up to the exception's own, over chained ones."""
    ended = False
    for i, line in enumerate(lines[1:], 1):
        if line.startswith(("Traceback (most", *_CHAINED)):
            ended = False
        elif line and not line[0].isspace():
            if ended and not lines[i - 1].strip():
                return i - 1
            ended = True
        elif ended and not line.strip():
            rest = next((other for other in lines[i:] if other.strip()), "")
            if not rest.startswith(_CHAINED):
                return i
    return len(lines)


def last_lines(text: str) -> str:
    """The end of an output."""
    return "\n".join(text.splitlines()[-_TAIL:])
