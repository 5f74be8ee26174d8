"""Nsight Compute's basic figures of the kernels, one launch of each."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gpu_steps.device import find_tool
from gpu_steps.report import Report, Skipped

# What most time goes to comes first: so many launches are looked at.
KERNELS = (
    "pivoted_qr", "interpolation", "khatri_rao_entries", "householder_qr", "householder_q",
    "block_diagonal", "restrict_rows", "couple", "prolong_rows", "solve_lower",
    "solve_lower_transposed", "eliminate", "substitute", "hodlr_step", "block_sparse_wide",
    "interpolation_order", "point_entries", "merge_smallest", "pivoted_cholesky_panel",
)  # fmt: skip
# A pivoted QR runs twice: one is what interpolation starts from. Four panels are launched, and a
# HODLR level three times: sums, one way, the other.
_LAUNCHES = len(KERNELS) + 6
_LIMIT = 35  # seconds


def run(report: Report) -> None:
    tool = find_tool("ncu")
    if tool is None:
        raise Skipped("ncu is not there")
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        command = [
            tool, "--clock-control", "none", "--kill", "yes", "--launch-count", str(_LAUNCHES),
            "--set", "basic", "--csv", "--log-file", str(log),
            "--kernel-name", f"regex:^({'|'.join(KERNELS)})",
            *report.python, "-m", "gpu_steps.one_of_each", *(["--tiny"] if report.small else []),
        ]  # fmt: skip
        try:
            ended = subprocess.run(command, timeout=_LIMIT, check=False).returncode
        except subprocess.TimeoutExpired:
            ended = None
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    rows = list(kernels(text))
    for row in rows:
        report.row(**row)
    sys.stdout.write(text[:20_000])
    report.row(kernels=len(rows), ended=ended)  # --kill ends the program: its status says little
    if not rows:
        raise AssertionError(f"ncu measured no kernel, exit status {ended}: {_said(text)}")


def kernels(text: str) -> Iterator[dict[str, Any]]:
    """The rows of ncu's CSV, one for each launch: its name, shape and metrics."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if first is None:
        return
    launches: dict[str, dict[str, Any]] = {}
    for line in csv.DictReader(io.StringIO("\n".join(lines[first:]))):
        if not line.get("Metric Name"):
            continue
        launch = launches.setdefault(
            line["ID"],
            {"kernel": line["Kernel Name"].partition("(")[0], "grid": line.get("Grid Size"),
             "block": line.get("Block Size"), "metrics": {}},
        )  # fmt: skip
        unit = f" [{line['Metric Unit']}]" if line.get("Metric Unit") else ""
        launch["metrics"][line["Metric Name"] + unit] = _number(line.get("Metric Value") or "")
    yield from launches.values()


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def _said(text: str) -> str:
    """Ncu's own lines, such as ERR_NVGPUCTRPERM."""
    said: Sequence[str] = [line for line in text.splitlines() if line.startswith("==")]
    return " ".join(said[-3:]) or "it said nothing"
