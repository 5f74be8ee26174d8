"""profiling/scaling*.py: formulas against counted bytes, and the scripts themselves."""

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from scripts import FOLDER, script

import gpu_hodlr as gh
from gpu_hodlr.distributed import Deal

# exp(-r / 0.2) of 4,096 points in the unit square, rtol 1e-2, 64 columns: counted by scaling.py
POINTS: dict[str, Any] = {
    "n": 4096, "leaf": 256, "ranks": (33, 31, 23, 19), "samples": 160, "max_rank": 256,
    "product_flops": 0.0, "entry_flops": 26.0,
}  # fmt: skip
COUNTED = {
    2: {"compress": 2245600, "product": 19456, "factor": 5776, "solve": 19456},
    3: {"compress": 3307816, "product": 86528, "factor": 33848, "solve": 86528},
}
NETWORK: dict[str, Any] = {
    "n": 1 << 20, "leaf": 256, "ranks": (256,) * 12, "samples": 320, "max_rank": 256,
    "product_flops": 4000.0, "entry_flops": 2000.0,
}  # fmt: skip
BY_HAND = [
    "--n", "121597", "--leaf", "256", "--rank", "128", "--samples", "320", "--product-flops",
    "4000", "--entry-flops", "2000", "--share", "0.1",
]  # fmt: skip


@pytest.fixture
def formulas() -> ModuleType:
    script("scaling_model")  # leaves its formulas among the modules, as roofline.py's
    return sys.modules["scaling_formulas"]


@pytest.fixture
def model() -> ModuleType:
    return script("scaling_model")


@pytest.mark.parametrize("ranks", COUNTED)
def test_bytes_are_those_counted(formulas: ModuleType, ranks: int):
    sent = formulas.sent_bytes(formulas.Matrix(**POINTS), ranks, 64)
    for job in ("product", "factor", "solve"):
        assert sent[job] == COUNTED[ranks][job]
    # Orderings and neighbours are beyond the formula.
    assert sent["compress"] <= COUNTED[ranks]["compress"] <= 1.1 * sent["compress"]


def test_one_rank_sends_nothing(formulas: ModuleType):
    assert set(formulas.sent_bytes(formulas.Matrix(**POINTS), 1, 64).values()) == {0.0}


def test_work_of_one_rank_is_the_whole_matrixs(formulas: ModuleType):
    K = gh.compress(gh.DenseOperator(toeplitz(500)), leaf_size=40)
    t = K.structure
    roofline = formulas.roofline
    shape = replace(
        formulas.Matrix(**POINTS), n=500, leaf=t.D.shape[1], ranks=tuple(a.rank for a in t.levels)
    )
    costs = formulas.costs(shape, 1, 7)
    assert costs["product"] == roofline.product_cost(t, 7, K.dtype)
    assert costs["factor"] == roofline.factor_cost(t, K.dtype)
    assert costs["solve"] == roofline.solve_cost(t, 7, K.dtype)


@pytest.mark.parametrize("ranks", [2, 3, 4, 16])
def test_busiest_rank_has_its_nodes_and_all_above(formulas: ModuleType, ranks: int):
    matrix = formulas.Matrix(**POINTS)
    part, whole = matrix.part(ranks), matrix.part(1)
    cut = Deal(matrix.depth, ranks).cut
    share = -(-(1 << cut) // ranks) / (1 << cut)
    assert len(part.D) == len(whole.D) * share
    for index, (a, b) in enumerate(zip(part.levels, whole.levels, strict=True)):
        level = matrix.depth - index
        if level >= cut:
            assert len(a.T) == len(b.T) * share
        assert 1 <= len(a.T) <= max(2, len(b.T) * share)
        assert len(a.T) <= 2 * len(a.B) <= len(a.T) + (2 if level <= cut else 0)


def test_seconds_fall_until_messages_bound_them(formulas: ModuleType):
    matrix = formulas.Matrix(**NETWORK)
    machine = formulas.Machine(60e12, 3.35e12, 25e9, 5e-6)
    gpus = [1 << i for i in range(11)]
    for job in formulas.JOBS:
        seconds = np.array([formulas.predicted(matrix, machine, p, 512)[job] for p in gpus])
        lowest = int(seconds.argmin())
        assert lowest >= 3
        assert (np.diff(seconds[1 : lowest + 1]) < 0).all()  # with the second comes the network
        assert seconds[lowest] < seconds[0] / 4
        assert (np.diff(seconds[lowest:]) > 0).all()
    slow = replace(machine, latency=1.0)
    assert formulas.predicted(matrix, slow, 4, 512)["product"] > 2.0
    assert formulas.predicted(matrix, slow, 1, 512)["product"] < 1.0


@pytest.mark.parametrize("ranks", [2, 3, 6, 64, 1000])
def test_bytes_and_memory_keep_to_the_bounds(formulas: ModuleType, ranks: int):
    matrix = formulas.Matrix(**NETWORK).grown(1 << 24)
    sent = formulas.sent_bytes(matrix, ranks, 512)
    assert 0 < sent["product"] <= formulas.product_bound(matrix, ranks, 512)
    alone, spread = (formulas.bytes_of_rank(matrix, p) for p in (1, ranks))
    assert spread <= 1.26 * alone / ranks + 20 * matrix.leaf**2 * formulas.V


def test_another_size_keeps_the_leaves(formulas: ModuleType):
    matrix = formulas.Matrix(**POINTS)
    larger = matrix.grown(1 << 15)
    assert larger.ranks == (*POINTS["ranks"], 33, 33, 33)
    assert matrix.grown(2048).ranks == POINTS["ranks"][:3]
    assert matrix.grown(4096) == matrix
    assert replace(matrix, product_flops=2.0, dense=True).grown(8192).product_flops == 4.0


def test_model_prints_predictions_and_assumptions(
    model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "model.json"
    assert model.main([*BY_HAND, "--gpus", "8", "--sizes", "1048576", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    for word in ("predicted", "assumed", "weakest", "N = 1,048,576", "MPI-GOFMM"):
        assert word in text
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [row["gpus"] for row in rows] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "without a file of scaling.py give --share"),
        (["no-such-file.json"], "No such file"),
        ([*BY_HAND, "--share", "2"], "--share must be at most 1"),
        ([*BY_HAND, "--rank", "512"], "--rank must be at most --leaf"),
        ([*BY_HAND, "--latency", "-1"], "must be a positive number"),
        ([*BY_HAND, "--gpus", "1.5"], "must be a whole number"),
        ([*BY_HAND, "--product-flops", "-1"], "--product-flops must be 0 or more"),
    ],
)
def test_bad_options(
    model: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        model.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_differences_are_named():
    scaling = script("scaling")
    one = {"ranks": 1, "block_ranks": [[2, 2]], "error": 0.01, "product_norm": 1.0}
    assert scaling.differences([one, one | {"ranks": 2, "error": 0.01 * (1 + 1e-9)}]) == []
    other = one | {"ranks": 4, "block_ranks": [[2, 3]], "product_norm": 1.1}
    assert len(scaling.differences([one, other])) == 2
    assert scaling.sizes(6) == [1, 2, 4, 6]


@pytest.mark.parametrize("weak", [False, True], ids=["strong", "weak"])
def test_scaling_on_two_ranks(weak: bool, tmp_path: Path, model: ModuleType):
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed")
    mpirun = shutil.which("mpirun", path=Path(sys.executable).parent) or shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("there is no mpirun")
    file = tmp_path / "scaling.json"
    command = [
        mpirun, "-n", "2", sys.executable, str(FOLDER / "scaling.py"), "--n", "1024",
        "--leaf-size", "128", "--nrhs", "4", "--repeat", "1", "--json", str(file),
        *["--weak"] * weak,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text(encoding="utf-8"))
    one, two = content["runs"]
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["n"] == (2048 if weak else 1024)
    assert content["same"]
    assert two["sent"]["product"] == two["sent_formula"]["product"] > 0
    assert two["sent"]["factor"] == two["sent_formula"]["factor"]
    assert two["sent"]["solve"] == two["sent_formula"]["solve"]
    assert two["sent"]["product"] <= two["product_bound"]
    assert one["predicted"] == pytest.approx(one["seconds"])
    assert content["environment"]["threads"] >= 1
    assert model.main([str(file), "--gpus", "2"]) == 0
