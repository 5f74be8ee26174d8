"""One step in a process of its own: `python -m gpu_steps MODULE ...`, as gpu_check.py calls it."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import sys
import time
from pathlib import Path

from gpu_steps.report import Report, Skipped

_BEFORE = 1.0  # seconds before the end


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--step", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--size", choices=("full", "small"), required=True)
    parser.add_argument("--until", type=float, required=True, help="time.monotonic() of its end")
    options = parser.parse_args()
    faulthandler.enable(sys.stderr)
    # Where a step that hangs was, before it is killed.
    left = options.until - _BEFORE - time.monotonic()
    faulthandler.dump_traceback_later(max(left, 0.1), file=sys.stderr)
    python = sys.orig_argv[: sys.orig_argv.index("-m")]
    report = Report(options.rows, options.step, options.size, python)
    try:
        importlib.import_module(options.module).run(report)
    except Skipped as reason:
        report.row(skipped=str(reason))
    finally:
        faulthandler.cancel_dump_traceback_later()
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
