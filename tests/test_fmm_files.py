"""FMM matrices on disk: the same bits, and what is inconsistent is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from saved_files import round_trip
from test_fmm import kernel

import gpu_hodlr as gh
from gpu_hodlr.errors import FileFormatError

CASES = {
    "near field": lambda: gh.compress(kernel(400), "fmm", rtol=1e-4, leaf_size=20, budget=0.1),
    "no near field": lambda: gh.compress(kernel(400), "fmm", rtol=1e-4, leaf_size=20),
    "all near": lambda: gh.compress(toeplitz(60), "fmm", leaf_size=10, budget=1.0),
    "one leaf": lambda: gh.compress(toeplitz(60), "fmm", budget=0.1),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_round_trip(make: Any, tmp_path: Path):
    K = make()
    again = round_trip(K, tmp_path)
    assert isinstance(again, gh.FMMMatrix)


CHANGES: dict[str, Any] = {
    "no near blocks": lambda a: a.pop("near"),
    "no near pairs": lambda a: a.pop("near_pairs"),
    "a near block lost": lambda a: a.update(near=a["near"][1:]),
    "a near pair lost": lambda a: a.update(near=a["near"][1:], near_pairs=a["near_pairs"][1:]),
    "near pairs out of order": lambda a: a.update(near_pairs=a["near_pairs"][::-1]),
    "a near pair of no leaves": lambda a: a.update(near_pairs=a["near_pairs"] + 999),
    "pairs of real numbers": lambda a: a.update(near_pairs=a["near_pairs"] + 0.0),
    "another precision": lambda a: a.update(near=a["near"].astype(np.float32)),
    "a coupling lost": lambda a: a.update(B0=a["B0"][1:]),
    "an unknown form": lambda a: a.update(header=with_form(a["header"], "Butterfly")),
}


def with_form(header: np.ndarray, form: str) -> np.ndarray:
    content = json.loads(header.tobytes()) | {"structure": form}
    return np.frombuffer(json.dumps(content).encode(), np.uint8)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_inconsistent_files(change: Any, tmp_path: Path):
    path = tmp_path / "m.npz"
    CASES["near field"]().save(path)
    with np.load(path) as f:
        arrays = dict(f)
    change(arrays)
    np.savez(path, **arrays)
    with pytest.raises(FileFormatError, match=r"m\.npz"):
        gh.load(path)
