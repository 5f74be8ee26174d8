"""The first thing to run on a machine with a GPU: everything that no stand-in can show.

    python profiling/gpu_check.py                            all steps, in 330 s at most
    python profiling/gpu_check.py --deadline 540 --out DIR
    python profiling/gpu_check.py --steps device,compile,edges
    python profiling/gpu_check.py --list

It runs from a checkout, nothing of which needs to be installed. Every step is a process of its own
with a time limit; the next one runs whatever became of it. After each the summary is written anew:

    gpu_check.json        every step: status, seconds, first traceback, rows of results
    gpu_check.txt         the same for people
    gpu_check_rows.jsonl  the rows, each written as soon as it is known
    gpu_check_log.txt     what the steps printed

into the folder --out, or else the one that the environment variable GPU_HODLR_RESULTS names, or
else profiling/results. The exit status is 0 if all steps passed, 3 if none failed and some were
skipped, 1 if some failed, 143 if the whole run was stopped from outside.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
sys.path.insert(0, str(FOLDER))

from gpu_steps import outcome as outcomes  # noqa: E402  from a checkout, wherever it lies
from gpu_steps.outcome import Outcome  # noqa: E402

DEADLINE = 330.0
_RESERVE = 1.0  # seconds before the deadline in which no step runs: the summary is written
_STOPPED = 143


@dataclass(frozen=True)
class Step:
    """A step and the seconds it may take.

    Attributes:
        module: with `run(report)`, see gpu_steps/report.py.
        seconds: what it should take on an H200 (from bytes and launches, not measured).
        limit: when it is killed.
        least: it is not begun with fewer seconds left.
    """

    name: str
    what: str
    module: str
    seconds: float
    limit: float
    least: float = 5.0


STEPS = (
    Step("device", "card, driver, versions, libraries, choosing the device",
         "gpu_steps.device", 10, 40),
    Step("compile", "all kernel sources: registers and local bytes",
         "gpu_steps.compile_sources", 20, 45),
    Step("tests", "the GPU tests, primitives first", "gpu_steps.gpu_tests", 75, 110),
    Step("edges", "limits of shapes and numbers", "gpu_steps.edges", 25, 45),
    Step("graphs", "products and solves as CUDA graphs", "gpu_steps.graphs", 25, 45),
    Step("tables", "the founding tables, a row each", "gpu_steps.tables", 60, 80),
    Step("rooflines", "rates of copy, GEMM, every kernel and every job",
         "gpu_steps.rooflines", 60, 80),
    Step("ncu", "Nsight Compute on the kernels", "gpu_steps.ncu", 25, 40, 10.0),
    Step("sanitizer", "compute-sanitizer: memcheck, racecheck",
         "gpu_steps.sanitizer", 30, 60, 10.0),
)  # fmt: skip


class _StopRequest(BaseException):
    """SIGTERM: end the step and write the summary."""


def _stop(*_: Any) -> None:
    raise _StopRequest


class Check:
    """A run of steps, whose summary is on disk at any time.

    Args:
        steps: to run.
        folder: of the results.
        deadline: seconds for all of them.
        size: "full" or "small".
        python: the command that starts an interpreter.
    """

    def __init__(
        self, steps: Sequence[Step], folder: Path, deadline: float, size: str, python: Sequence[str]
    ) -> None:
        self._steps, self._folder, self._deadline = steps, folder, deadline
        self._size, self._python = size, tuple(python)
        self._start = time.monotonic()
        self._date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._rows = folder / "gpu_check_rows.jsonl"
        self._rows.write_bytes(b"")
        self._outcomes: list[Outcome] = []

    def run(self) -> int:
        """Run the steps; the exit status."""
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            with (self._folder / "gpu_check_log.txt").open("w+b") as log:
                for step in self._steps:
                    self._outcomes.append(Outcome(step.name, step.what, "stopped", "from outside"))
                    try:
                        self._outcomes[-1] = self._one(step, log)
                    finally:
                        self._write_summary()
                    self._tell(self._outcomes[-1])
        except (_StopRequest, KeyboardInterrupt):
            return _STOPPED
        finally:
            signal.signal(signal.SIGTERM, before)
        statuses = {outcome.status for outcome in self._outcomes}
        if statuses <= {"passed"}:
            return 0
        return 3 if statuses <= {"passed", "skipped"} else 1

    def _one(self, step: Step, log: Any) -> Outcome:
        """Run a step, if there is time."""
        left = self._deadline - _RESERVE - (time.monotonic() - self._start)
        if left < step.least:
            return Outcome(step.name, step.what, "skipped", "no time")
        limit = min(step.limit, left)
        print(f"=== {step.name}: {step.what} ({limit:.0f} s at most)", flush=True)
        log.seek(0, os.SEEK_END)
        log.write(f"=== {step.name}\n".encode())
        log.flush()
        start, logged, written = time.monotonic(), log.tell(), self._rows.stat().st_size
        command = [
            *self._python, "-m", "gpu_steps", step.module, "--step", step.name,
            "--rows", str(self._rows), "--size", self._size, "--until", f"{start + limit:.3f}",
        ]  # fmt: skip
        ended = outcomes.run_process(command, limit, log, self._environment(), ROOT)
        seconds = time.monotonic() - start
        text = outcomes.tidy(log, logged)
        rows = outcomes.read_rows(self._rows, written)
        status, why = outcomes.verdict(ended, rows)
        problem = ""
        if status not in ("passed", "skipped"):
            problem = outcomes.first_traceback(text) or outcomes.last_lines(text)
        return Outcome(
            step.name, step.what, status, why, round(seconds, 2), round(limit, 2), problem, rows
        )

    @staticmethod
    def _environment() -> dict[str, str]:
        """A step's: the checkout before everything else, output at once, no GPU test skipped."""
        path = os.pathsep.join(
            filter(None, [str(ROOT), str(FOLDER), os.environ.get("PYTHONPATH", "")])
        )
        return os.environ | {
            "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "GPU_HODLR_REQUIRE_GPU": "1",
        }  # fmt: skip

    @staticmethod
    def _tell(outcome: Outcome) -> None:
        print(_line(outcome), flush=True)
        if outcome.problem:
            print(outcome.problem, flush=True)

    def _write_summary(self) -> None:
        seconds = time.monotonic() - self._start
        document = {
            "date": self._date, "size": self._size, "deadline": self._deadline,
            "seconds": round(seconds, 2),
            "passed": len(self._outcomes) == len(self._steps)
            and all(outcome.status == "passed" for outcome in self._outcomes),
            "not_reached": [step.name for step in self._steps[len(self._outcomes) :]],
            "steps": [asdict(outcome) for outcome in self._outcomes],
        }  # fmt: skip
        self._replace("gpu_check.json", json.dumps(document, indent=1) + "\n")
        head = (
            f"gpu_check, size {self._size}, {self._date}: {seconds:.0f} s of {self._deadline:.0f}"
        )
        self._replace("gpu_check.txt", summary_text(head, self._outcomes))

    def _replace(self, name: str, text: str) -> None:
        """Write a file beside and rename it: a reader never finds half of one."""
        partial = self._folder / f"{name}.part"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self._folder / name)


def _line(outcome: Outcome) -> str:
    status = outcome.status + (f": {outcome.why}" if outcome.why else "")
    return f"{outcome.name:<10} {outcome.seconds:7.1f} s of {outcome.limit:5.0f}  {status}"


def summary_text(head: str, found: Sequence[Outcome]) -> str:
    """All steps, then the first traceback of each that failed, then the rows."""
    parts = [head, *map(_line, found)]
    for outcome in found:
        if outcome.problem:
            parts += ["", f"--- {outcome.name}: {outcome.status}", outcome.problem]
    for outcome in found:
        rows = [{k: v for k, v in row.items() if k != "step"} for row in outcome.rows]
        if rows:
            parts += ["", f"--- {outcome.name}: {outcome.what}", *map(_row_text, rows)]
    return "\n".join(parts) + "\n"


def _row_text(row: dict[str, Any]) -> str:
    return "  ".join(f"{key}={_short(value)}" for key, value in row.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def main(
    argv: Sequence[str] | None = None,
    *,
    steps: Sequence[Step] = STEPS,
    python: Sequence[str] = (sys.executable,),
) -> int:
    """The program; `steps` and `python`, the command of an interpreter, are for its tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deadline", type=float, default=DEADLINE, metavar="S",
                        help=f"seconds for everything (default {DEADLINE:.0f})")  # fmt: skip
    parser.add_argument("--steps", metavar="A,B", help="only these, in the order of the list")
    parser.add_argument("--list", action="store_true", help="list the steps and end")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    parser.add_argument("--size", choices=("full", "small"), default="full",
                        help="small: matrices that a host stand-in for a GPU can do")  # fmt: skip
    options = parser.parse_args(argv)
    if options.list:
        for step in steps:
            print(f"{step.name:<10} {step.seconds:4.0f} s, at most {step.limit:4.0f}  {step.what}")
        return 0
    if options.steps is not None:
        wanted = options.steps.split(",")
        unknown = set(wanted) - {step.name for step in steps}
        if unknown:
            parser.error(f"no such step: {', '.join(sorted(unknown))}; see --list")
        steps = [step for step in steps if step.name in wanted]
    folder = options.out or Path(os.environ.get("GPU_HODLR_RESULTS") or FOLDER / "results")
    folder = folder.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check = Check(steps, folder, options.deadline, options.size, python)
    except OSError as error:
        parser.error(f"cannot write to {folder}: {error.strerror}")
    return check.run()


if __name__ == "__main__":
    sys.exit(main())
