"""One step in a process of its own: `python -m gpu_steps MODULE ...`, as gpu_check.py calls it."""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import sys
from pathlib import Path

from gpu_steps.report import Report, Skipped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("--step", required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--size", choices=("full", "small"), required=True)
    parser.add_argument("--limit", type=float, required=True)
    options = parser.parse_args()
    # Where a step that hangs was, before it is killed.
    faulthandler.enable(sys.stderr)
    faulthandler.dump_traceback_later(0.9 * options.limit, file=sys.stderr)
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
