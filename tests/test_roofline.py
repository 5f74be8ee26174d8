"""profiling/: floors against counts of what is stored, and the scripts themselves."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz
from scripts import FOLDER, script

import gpu_hodlr as gh
from gpu_hodlr import batched
from gpu_hodlr.profiling import PhaseTimer

SMALL: dict[str, Any] = {"repeats": 1, "copy_bytes": 1 << 16, "gemm_stack": 1}
JOBS = [
    "compress", "product, 1 column", "product, 16 columns", "product, 256 columns", "factor",
    "solve, 1 column", "solve, 64 columns",
]  # fmt: skip


@pytest.fixture
def roofline() -> ModuleType:
    return script("roofline")


def compressed(n: int = 500, leaf_size: int = 40, **options: Any) -> gh.HSSMatrix:
    return gh.compress(gh.DenseOperator(toeplitz(n)), leaf_size=leaf_size, **options)


def triangles(stack: np.ndarray) -> int:
    return int(np.tril(np.ones(stack.shape)).sum())


@pytest.mark.parametrize("leaf_size", [40, 500], ids=["levels", "one leaf"])
def test_floors_agree_with_what_is_stored(roofline: ModuleType, leaf_size: int):
    K = compressed(leaf_size=leaf_size)
    t, v = K.structure, K.dtype
    F = K.factorize(1.0)
    k = 3
    vectors = 2 * 500 * k * 8
    product = roofline.product_cost(t, k, v)
    assert product.bytes == K.nbytes + vectors
    T, B = (sum(getattr(level, name).size for level in t.levels) for name in "TB")
    assert product.flops == 2 * k * (t.D.size + 2 * T + 2 * B)
    assert product.again == 8 * T
    steps = F._steps
    L = sum(triangles(s.L) for s in steps)
    W = sum(s.W.size for s in steps)
    root = triangles(F._root)
    factor = roofline.factor_cost(t, v)
    assert factor.bytes == K.nbytes + 8 * (L + W + root)
    assert factor.bytes - K.nbytes <= F.nbytes
    solve = roofline.solve_cost(t, k, v)
    orders = sum(s.order.nbytes for s in steps if s.order is not None)
    assert solve.bytes == 8 * (T + L + W + root) + t.leaves.nbytes + orders + vectors
    assert solve.again == 8 * (T + L + W)
    triangular = sum(s.L.size for s in steps) + F._root.size
    assert solve.flops == k * 2 * (triangular + 2 * T + 2 * W)


def test_flops_of_the_factorization_are_those_of_its_calls(
    roofline: ModuleType, monkeypatch: pytest.MonkeyPatch
):
    """Counted call by call: GEMMs 2 p k c, Cholesky n^3 / 3, triangular solves n^2 c."""
    K = compressed()
    flops = 0.0

    def counting(name: str, cost: Any) -> None:
        call = getattr(batched, name)

        def counted(*args: Any, **options: Any) -> Any:
            nonlocal flops
            result = call(*args, **options)
            flops += cost(result, *args, **options)
            return result

        monkeypatch.setattr(batched, name, counted)

    counting("cholesky", lambda result, a, **_: len(a) * a.shape[1] ** 3 / 3)
    counting("solve_triangular", lambda result, lower, b, **_: lower.shape[1] * b.size)
    counting(
        "matmul", lambda *args, **options: roofline.CallCounter._matmul(*args, **options).flops
    )
    K.factorize(1.0)
    assert roofline.factor_cost(K.structure, K.dtype).flops == pytest.approx(flops)


def test_calls_of_a_compression_are_counted_and_left_as_they_were(roofline: ModuleType):
    op = gh.DenseOperator(toeplitz(400))
    before = batched.matmul, batched.pivoted_qr, PhaseTimer.phase
    counter = roofline.CallCounter()
    with counter.watching(op):
        K = gh.compress(op, leaf_size=50, ordering="natural", seed=1)
    assert K.report.passes == 1  # all passes are counted, the arrays are those of the last
    assert (batched.matmul, batched.pivoted_qr, PhaseTimer.phase) == before
    assert not {"_matmat", "_blocks"} & set(vars(op))
    t, costs = K.structure, counter.costs
    assert set(costs) <= set(K.report.seconds)
    assert costs["diagonal blocks"].bytes == t.D.nbytes
    assert costs["diagonal blocks"].flops == op.entry_cost * t.D.size
    assert costs["couplings"].bytes == sum(level.B.nbytes for level in t.levels)
    assert costs["measuring"].flops == roofline.product_cost(t, 10, K.dtype).flops
    assert costs["probe"].flops == 10 * op.product_cost
    assert costs["pivoted QR"].flops > 0
    assert costs["interpolation"].flops == sum(level.T.size * level.rank for level in t.levels)


def test_shares(roofline: ModuleType):
    cost = roofline.Cost(bytes=100.0, flops=50.0, again=20.0)
    row = roofline.row("product", 2.0, cost, bandwidth=200.0, rate=100.0)
    assert row["share_of_copy"] == 0.25
    assert row["share_of_copy_2_passes"] == 0.3
    assert row["share_of_gemm"] == 0.25
    unknown = roofline.row("  ordering", 2.0, roofline.Cost(), 200.0, 100.0)
    assert unknown["part_of"] == "compress"
    assert unknown["job"] == "ordering"
    assert unknown["share_of_copy"] is unknown["share_of_gemm"] is None


def check(result: dict[str, Any], text: str) -> None:
    """A whole measurement: every job is there, with seconds and plausible floors."""
    jobs = {job["job"]: job for job in result["jobs"]}
    whole = [name for name, job in jobs.items() if job["part_of"] is None]
    assert whole == JOBS
    rest = jobs["outside the phases"]["seconds"]
    assert all(job["seconds"] > 0 for name, job in jobs.items() if "outside" not in name)
    phases = [job["seconds"] for job in jobs.values() if job["part_of"] == "compress"]
    assert len(phases) >= 7
    assert 0 <= rest < jobs["compress"]["seconds"] <= sum(phases) * 1.001
    assert all(name in text for name in jobs)
    assert jobs["product, 16 columns"]["flops"] == 16 * jobs["product, 1 column"]["flops"]
    assert result["copy_bytes_per_s"] > 0
    assert result["gemm_flops_per_s"] > 0
    assert result["stored_bytes"] < jobs["product, 1 column"]["bytes"]


def test_a_measurement(roofline: ModuleType):
    op, options = roofline.matrix("kernel", 700, "float32", "cpu")
    assert (op.shape, op.dtype, op.points.shape) == ((700, 700), np.float32, (700, 3))
    result = roofline.measure(op, {**options, "leaf_size": 60}, **SMALL)
    check(result, roofline.describe(result, "here"))
    assert (result["device"], result["gpu"], result["N"]) == ("cpu", None, 700)
    assert result["error"] <= 3e-2


def test_a_measurement_through_the_stand_in_for_cupy(roofline: ModuleType, stand_in: Any):
    op, options = roofline.matrix("kernel", 150, "float64", "cuda")
    result = roofline.measure(op, {**options, "leaf_size": 40}, **SMALL)
    check(result, roofline.describe(result, "the stand-in"))
    assert result["device"] == "cuda"
    assert "not a GPU" in result["gpu"]
    gpu = script("environment").environment()["gpu"]
    assert gpu["name"] == result["gpu"]
    assert gpu["cupy"] == stand_in.cupy.__version__


def test_growth_and_benchmark_through_the_stand_in_for_cupy(
    monkeypatch: pytest.MonkeyPatch, stand_in: Any
):
    complexity = script("complexity")
    monkeypatch.setattr(complexity, "LEAF", 40)
    measured = complexity.measure(150, "cuda")
    assert all(measured[job] > 0 for job in complexity.JOBS)
    benchmark = script("benchmark")
    small = gh.KernelOperator(stand_in.cupy.asarray(np.linspace(0, 1, 120)), "laplace", 0.2)
    monkeypatch.setattr(benchmark, "operator", lambda *case: small)
    case = {"matrix": ("kernel", "float64"), "compress": {"leaf_size": 40}}
    measured = benchmark.run_case(case, "cuda")
    assert measured["backward_error"] <= 1e-13
    assert measured["peak_fraction"] > 0


def test_jobs_that_do_not_fit_are_left_out(roofline: ModuleType, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roofline, "free_bytes", lambda device: 8 * 8 * 100 * 20)
    result = roofline.measure(gh.DenseOperator(toeplitz(100)), {"leaf_size": 20}, **SMALL)
    assert result["skipped_for_memory"] == ["product, 256 columns", "solve, 64 columns"]
    assert "too little memory: product, 256 columns" in roofline.describe(result, "here")


def test_as_a_program(tmp_path: Path):
    out = tmp_path / "out.json"
    command = [sys.executable, FOLDER / "roofline.py", "--n", "1000", "--repeats", "1"]
    done = subprocess.run(
        [*map(str, command), "--json", str(out)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads(out.read_text())
    assert document["environment"]["threads"] >= 1
    check(document["result"], done.stdout)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--matrix", "mnist", "--n", "5"], "--n"),
        (["--n", "1"], "--n"),
        (["--repeats", "0"], "--repeats"),
        (["--device", "abacus"], "--device"),
        (["--matrix", "cifar"], "--matrix"),
    ],
)
def test_bad_options(roofline: ModuleType, capsys: Any, options: list[str], words: str):
    with pytest.raises(SystemExit) as stop:
        roofline.main(options)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
