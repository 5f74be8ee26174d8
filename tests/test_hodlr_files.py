"""HODLR matrices on disk: the same bits, and what is inconsistent is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix_cases import Clustered, toeplitz
from saved_files import round_trip
from test_hodlr import kernel

import gpu_hodlr as gh
from gpu_hodlr.errors import FileFormatError

CASES: dict[str, Any] = {
    "points": lambda: gh.compress(kernel(300), "hodlr", rtol=1e-4, leaf_size=20),
    "float32": lambda: gh.compress(kernel(300, np.float32), "hodlr", rtol=1e-3, leaf_size=20),
    "uneven": lambda: gh.compress(
        Clustered(toeplitz(257), 1), "hodlr", leaf_size=20, ordering="natural"
    ),
    "rank 0": lambda: gh.compress(np.eye(64), "hodlr", leaf_size=8),
    "one leaf": lambda: gh.compress(toeplitz(60), "hodlr"),
}


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_round_trip(make: Any, tmp_path: Path):
    K = make()
    again = round_trip(K, tmp_path)
    assert isinstance(again, gh.HODLRMatrix)
    assert again.structure.widths == K.structure.widths


CHANGES: dict[str, Any] = {
    **{f"no {name}": lambda a, name=name: a.pop(name) for name in ("leaves", "D", "U", "widths")},
    "a column lost": lambda a: a.update(U=a["U"][:, 1:]),
    "a row lost": lambda a: a.update(U=a["U"][1:]),
    "a level lost": lambda a: a.update(widths=a["widths"][1:]),
    "another width": lambda a: a.update(widths=a["widths"] + 1),
    "a negative width": lambda a: a.update(widths=a["widths"] + np.array([99, -99, 0, 0])),
    "widths of real numbers": lambda a: a.update(widths=a["widths"] + 0.0),
    "another precision": lambda a: a.update(U=a["U"].astype(np.float32)),
    "integers": lambda a: a.update(U=a["U"].astype(int)),
    "bases on the padding": lambda a: a.update(U=a["U"] + 1),
    "an index twice": lambda a: a.update(leaves=np.where(a["leaves"] == 3, 4, a["leaves"])),
    "a block lost": lambda a: a.update(D=a["D"][1:]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_inconsistent_files(change: Any, tmp_path: Path):
    path = tmp_path / "m.npz"
    CASES["uneven"]().save(path)
    with np.load(path) as f:
        arrays = dict(f)
    assert len(arrays["widths"]) == 4
    change(arrays)
    np.savez(path, **arrays)
    with pytest.raises(FileFormatError, match=r"m\.npz"):
        gh.load(path)


def test_truncated_files(tmp_path: Path):
    path = tmp_path / "m.npz"
    CASES["points"]().save(path)
    content = path.read_bytes()
    for part in (0.1, 0.5, 0.99):
        path.write_bytes(content[: int(part * len(content))])
        with pytest.raises(FileFormatError):
            gh.load(path)
