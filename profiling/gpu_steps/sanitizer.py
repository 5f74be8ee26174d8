"""compute-sanitizer on a tiny run of all kernels: memory errors, then races in shared memory."""

from __future__ import annotations

import re
import subprocess
from typing import Any

from gpu_steps.device import find_tool
from gpu_steps.report import Report, Skipped

TOOLS = ("memcheck", "racecheck")
_FOUND = 9  # exit status that means: errors were found
_SUMMARY = re.compile(r"^=+ (?:ERROR|RACECHECK) SUMMARY: .*$", re.MULTILINE)


def run(report: Report) -> None:
    program = find_tool("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not there")
    for tool in TOOLS:
        with report.case(tool) as found:
            _check(program, tool, report, found)


def _check(program: str, tool: str, report: Report, found: dict[str, Any]) -> None:
    command = [
        program, "--tool", tool, "--error-exitcode", str(_FOUND), "--print-limit", "5",
        *report.python, "-m", "gpu_steps.kernel_calls", "--no-pool",
        *([] if report.small else ["--tall"]),
    ]  # fmt: skip
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:  # at once: the step may be killed
            print(line, end="", flush=True)
            lines.append(line)
    text = "".join(lines)
    found["summary"] = " ".join(_SUMMARY.findall(text))
    if "Device not supported" in text:
        raise Skipped("compute-sanitizer does not support this device")
    if process.returncode or "all kernels ran" not in text:
        raise AssertionError(f"{tool} ended with {process.returncode}: {found['summary']}")
