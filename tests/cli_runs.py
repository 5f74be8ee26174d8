"""The command line run in this process, and what it says when it refuses."""

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpu_hodlr import cli


def gaussian(n: int = 400) -> np.ndarray:
    """A Gaussian kernel matrix on a line: low-rank blocks, positive semi-definite."""
    x = np.linspace(0, 10, n)
    return np.exp(-0.5 * (x[:, None] - x) ** 2)


def run(*args: object) -> int:
    """The exit status; an option that cannot be used raises SystemExit."""
    return cli.main([str(arg) for arg in args])


def compress(path: Path, *args: object) -> int:
    return run("compress", path, "--leaf-size", 50, "--rtol", 1e-6, "--seed", 3, *args)


def printed(*args: object) -> str:
    """What a command that is done, and says nothing on stderr, writes on stdout."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = run(*args)
    assert (status, err.getvalue()) == (0, "")
    return out.getvalue()


def program(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """The command line as a program, its output in a pipe."""
    command = [sys.executable, "-m", "gpu_hodlr", *map(str, args)]
    options = {"capture_output": True, "text": True, "timeout": 240, **options}
    return subprocess.run(command, check=False, **options)


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """All that a command writes which must end with status 2: one line on stderr."""
    try:
        status = run(*args)
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "error: " in captured.err
    return captured.err
