"""The steps of profiling/gpu_check.py, end to end on the stand-in for CuPy: not a GPU run."""

import json
import os
import stat
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from host_cuda import runner
from host_cupy import HostCupy, kernels
from scripts import FOLDER, script

from gpu_hodlr import kernel_sources

PROGRAMS = ("ncu", "sanitizer")  # steps that need one
STAND_IN = Path(__file__).parent / "host_cupy"
# As ncu and compute-sanitizer are called and answer: they run the program that they are given.
NCU = r"""#!/usr/bin/env bash
set -eu
while [ $# -gt 0 ]; do
  case $1 in
    --log-file) log=$2; shift 2 ;;
    --clock-control | --kill | --launch-count | --set | --kernel-name) shift 2 ;;
    --csv) shift ;;
    *) break ;;
  esac
done
echo '==PROF== Connected to process 7' >"$log"
"$@"
cat >>"$log" <<'CSV'
"ID","Process ID","Kernel Name","Block Size","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","pivoted_qr_f64(double *, long long *)","(256, 1, 1)","(4, 1, 1)","Speed Of Light","Duration","us","1,234.50"
"0","7","pivoted_qr_f64(double *, long long *)","(256, 1, 1)","(4, 1, 1)","Speed Of Light","DRAM Throughput","%","61.5"
==WARNING== something else
"1","7","couple_f64_8(const double *)","(32, 8, 1)","(4, 1, 1)","Occupancy","Registers Per Thread","register/thread","40"
CSV
exit 3
"""  # noqa: E501
SANITIZER = r"""#!/usr/bin/env bash
set -eu
echo '========= COMPUTE-SANITIZER'
tool=$2
shift 6
"$@"
if [ "$tool" = racecheck ]; then
  echo '========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)'
  exit 9
fi
echo '========= ERROR SUMMARY: 0 errors'
"""


@pytest.fixture(autouse=True)
def _steps_can_be_imported() -> Iterator[None]:
    """gpu_steps is found, and imported anew: it may hold the stand-in."""
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))
    for name in [name for name in sys.modules if name.partition(".")[0] == "gpu_steps"]:
        del sys.modules[name]


@pytest.fixture
def gpu_check() -> ModuleType:
    return script("gpu_check")


def run(gpu_check: ModuleType, folder: Path, out: Path, *options: str) -> tuple[int, Any]:
    python = (sys.executable, str(STAND_IN), str(folder))
    status = gpu_check.main(["--size", "small", "--out", str(out), *options], python=python)
    return status, json.loads((out / "gpu_check.json").read_text())


def rows(summary: Any, name: str, **wanted: Any) -> list[dict[str, Any]]:
    step = next(step for step in summary["steps"] if step["name"] == name)
    return [row for row in step["rows"] if row.items() >= wanted.items()]


@pytest.mark.slow
def test_every_step_on_the_stand_in(
    gpu_check: ModuleType, host_library_folder: Path, tmp_path: Path, monkeypatch: Any
):
    """All pass but those for which there is no program, and each has told what it is for.

    Packages that a GPU machine need not have are hidden.
    """
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("mlxtend", "nvtx"):
        (hidden / f"{name}.py").write_text(f"raise ImportError('{name} is hidden')\n")
    monkeypatch.setenv("PYTHONPATH", f"{hidden}:{os.environ.get('PYTHONPATH', '')}")
    tmp_path = tmp_path / "out"
    there = import_module("gpu_steps.device").find_tool("ncu") is not None
    chosen = [step.name for step in gpu_check.STEPS if not (there and step.name in PROGRAMS)]
    status, summary = run(gpu_check, host_library_folder, tmp_path, "--steps", ",".join(chosen))
    for step in summary["steps"]:
        want = "skipped" if step["name"] in PROGRAMS else "passed"
        assert step["status"] == want, (step["name"], step["why"], step["problem"])
    assert status == (0 if there else 3)
    assert len(list(tmp_path.iterdir())) <= 8
    (chosen_device,) = rows(summary, "device", case="device of gpu_hodlr")
    assert chosen_device["gpu"] == "host stand-in, not a GPU"
    sources = {row["case"] for row in rows(summary, "compile")}
    assert sources == {"all sources", *kernel_sources.source_names(), "small matrix"}
    assert rows(summary, "tests")[-1]["passed"] > 0
    assert not rows(summary, "edges", verdict="skipped")
    for scheme in ("hss", "fmm", "hodlr", "lowrank"):
        for name in ("product", "solve"):
            replayed = rows(summary, "graphs", case=f"{name} replayed", scheme=scheme)
            assert [row["columns"] for row in replayed] == [1, 8, 64]
            assert all(row["microseconds"] > 0 for row in replayed)
    products = rows(summary, "tables", case="product")
    assert {(row["name"], row["accuracy"], row["scheme"]) for row in products} == {
        ("mnist", "low", "hss"), ("mnist", "low", "fmm"), ("mnist", "high", "hss"),
        ("mnist", "high", "fmm"), ("enco", "low", "hss"), ("enco", "high", "hss"),
    }  # fmt: skip
    assert all(row["error"] <= 3 * row["rtol"] for row in products)
    inverses = rows(summary, "tables", case="inverse")
    assert all(row["inverse_error"] < 1e-12 for row in inverses)
    assert len(inverses) == 4
    jobs = rows(summary, "rooflines", case="jobs")
    assert [row["matrix"] for row in jobs] == ["mnist", "kernel"]
    assert any(part["part_of"] == "compress" for part in jobs[0]["jobs"])
    qr = rows(summary, "rooflines", case="pivoted QR, a block a matrix")
    assert [row["dtype"] for row in qr] == ["float64", "float32"]
    text = (tmp_path / "gpu_check.txt").read_text()
    assert "host stand-in, not a GPU" in text


@pytest.mark.slow
def test_ncu_and_compute_sanitizer(
    gpu_check: ModuleType, host_library_folder: Path, tmp_path: Path, monkeypatch: Any
):
    """Programs in their place: what they are given runs, what they find is told."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("ncu", NCU), ("compute-sanitizer", SANITIZER)):
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    status, summary = run(
        gpu_check, host_library_folder, tmp_path / "out", "--steps", "ncu,sanitizer"
    )
    assert status == 1
    found = {step["name"]: step for step in summary["steps"]}
    assert found["ncu"]["status"] == "passed", found["ncu"]["problem"]
    first, second, last = found["ncu"]["rows"]
    assert (first["kernel"], first["block"]) == ("pivoted_qr_f64", "(256, 1, 1)")
    assert first["metrics"] == {"Duration [us]": 1234.5, "DRAM Throughput [%]": 61.5}
    assert second["kernel"] == "couple_f64_8"
    assert last["ended"] == 3  # the last line of the program: all kernels ran, or it had ended 1
    log = (tmp_path / "out" / "gpu_check_log.txt").read_text()
    assert "not launched: none" in log
    assert found["sanitizer"]["status"] == "failed"
    memory, races = found["sanitizer"]["rows"]
    assert memory["verdict"] == "passed"
    assert memory["summary"] == "========= ERROR SUMMARY: 0 errors"
    assert "1 hazard" in races["problem"]
    assert log.count("all kernels ran") == 2


def noted_launches(monkeypatch: Any) -> list[str]:
    """Names of the kernels launched from now on."""
    launched: list[str] = []
    launch = kernels.RawKernel.__call__

    def noted(kernel: Any, *args: Any, **options: Any) -> None:
        launched.append(kernel.name)
        launch(kernel, *args, **options)

    monkeypatch.setattr(kernels.RawKernel, "__call__", noted)
    return launched


def test_every_source_and_every_kernel_named_is_launched(stand_in: HostCupy, monkeypatch: Any):
    """A new source must be added to kernel_calls.py: no roofline or sanitizer would see it."""
    entry_points, calls = (import_module(f"gpu_steps.{name}") for name in
                           ("entry_points", "kernel_calls"))  # fmt: skip
    launched = noted_launches(monkeypatch)
    seen = set()
    for dtype in (np.float64, np.float32):
        for call in calls.calls(calls.TINY, dtype):
            launched.clear()
            call.work()
            assert set(call.kernels) <= set(map(entry_points.stem, launched)), call.name
            seen |= set(launched)
    names = entry_points.all_entry_points()
    assert {source for source, mine in names.items() if not seen & set(mine)} == set()
    far = {name for mine in names.values() for name in mine if "bf16" in name}
    assert {name[:-2] for name in far} == {name[:-2] for name in far & seen}  # of any width


def test_variants_for_little_shared_memory_are_launched(
    stand_in: HostCupy, monkeypatch: Any, dtype: Any
):
    """On a GPU with less of it, as the executor takes long for the rows of a real one."""
    entry_points, calls = (import_module(f"gpu_steps.{name}") for name in
                           ("entry_points", "kernel_calls"))  # fmt: skip
    monkeypatch.setattr(
        stand_in.cupy.cuda.Device, "attributes",
        stand_in.cupy.cuda.Device.attributes | {"MaxSharedMemoryPerBlockOptin": 49_152},
    )  # fmt: skip
    import_module("gpu_hodlr.batched.cuda").most_shared.cache_clear()
    launched = noted_launches(monkeypatch)
    for stem, work in calls.tall_calls(dtype):
        launched.clear()
        work()
        assert stem in set(map(entry_points.stem, launched))
    tall = {stem for stem, _ in calls.tall_calls(dtype)}
    named = {
        entry_points.stem(k) for mine in entry_points.all_entry_points().values() for k in mine
    }
    assert tall == {stem for stem in named if stem.endswith(("_tall", "_long"))}


def test_kernels_of_a_source():
    """Their names without a compiler are those that one finds."""
    entry_points = import_module("gpu_steps.entry_points")
    assert entry_points.stem("restrict_rows_f64_4") == "restrict_rows"
    assert entry_points.stem("householder_q_f32") == "householder_q"
    if not runner.has_compiler():
        pytest.skip("no g++")
    for name, found in entry_points.all_entry_points().items():
        text = runner._run(
            [runner.COMPILER, "-E", "-P", "-x", "c++", "-"], kernel_sources.read_source(name)
        )
        want = [kernel for kernel, _ in runner._ENTRY_POINT.findall(" ".join(text.split()))]
        assert sorted(found) == sorted(want)


def test_an_error_beyond_what_is_allowed_fails(stand_in: HostCupy, tmp_path: Path, capsys: Any):
    """Also one that is not a number; the next case runs, too little memory skips."""
    edges, report = (import_module(f"gpu_steps.{name}") for name in ("edges", "report"))
    mine = report.Report(tmp_path / "rows", "edges", "small", ())
    for error in (1.0, float("nan"), 1e-3):
        with mine.case("it") as found:
            edges.within(found, "off", error, 1e-2)
    with mine.case("huge"):
        edges.need(1e15, 8)
    assert mine.failures == 2
    written = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["verdict"] for row in written] == ["failed", "failed", "passed", "skipped"]
    assert [row["off"] for row in written[:3]] == [1.0, "nan", 1e-3]
    assert "AssertionError: off: 1, allowed 0.01" in capsys.readouterr().out


def test_wrong_numbers_fail_the_edges(stand_in: HostCupy, monkeypatch: Any):
    """A faulty primitive is noticed: one entry of a result is off."""
    edges = import_module("gpu_steps.edges")

    def broken(name: str) -> None:
        call = getattr(edges.batched, name)

        def wrong(*args: Any, **options: Any) -> Any:
            result = call(*args, **options)
            first = result[0] if isinstance(result, tuple) else result
            first[(0,) * first.ndim] += 1
            return result

        monkeypatch.setattr(edges.batched, name, wrong)

    for name, edge in (
        ("cholesky", lambda found: edges._cholesky(2, 9, np.float64, found)),
        ("full_qr", lambda found: edges._full_qr(20, 4, np.float64, found)),
        ("solve_triangular", lambda found: edges._triangular(2, 9, 3, np.float64, found)),
        ("gather_rows", lambda found: edges._huge_rows(4160, found)),
    ):
        edge({})
        broken(name)
        with pytest.raises(AssertionError):
            edge({})
        monkeypatch.undo()


def test_the_tests_of_a_step_that_fail_or_are_skipped(tmp_path: Path, capsys: Any):
    """Failures come as rows with their tracebacks; that nothing has passed is one too."""
    import subprocess

    bodies = {
        "passes": "def test_it():\n    pass\n",
        "fails": "def test_it():\n    assert {}.get('a') == 1\n\ndef test_two():\n    pass\n",
        "skips": "import pytest\n\ndef test_it():\n    pytest.skip('no GPU is here')\n",
        "broken": "import there_is_no_such_module\n",
    }
    program = (
        "import sys; from pathlib import Path; from gpu_steps import gpu_tests; "
        "from gpu_steps.report import Report; gpu_tests.TESTS = Path(sys.argv[1]); "
        "gpu_tests.SMALL = sys.argv[3:]; "
        "gpu_tests.run(Report(Path(sys.argv[2]), 'tests', 'small', ()))"
    )

    def run_tests(*names: str) -> tuple[int, str, list[Any]]:
        found = tmp_path / "rows"
        found.write_text("")
        for name in names:
            text = "import pytest\npytestmark = pytest.mark.gpu\n" + bodies[name]
            (tmp_path / f"test_{name}.py").write_text(text)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n    slow\n")
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path), str(found),
             *(f"test_{name}" for name in names)],
            env=os.environ | {"PYTHONPATH": f"{FOLDER}:{Path(FOLDER).parent}"},
            capture_output=True, text=True, check=False, timeout=100,
        )  # fmt: skip
        lines = map(json.loads, found.read_text().splitlines())
        return done.returncode, done.stdout + done.stderr, list(lines)

    status, _, told = run_tests("passes")
    assert (status, told[-1]["passed"], told[-1]["ended"]) == (0, 1, 0)
    status, output, told = run_tests("passes", "fails", "broken")
    assert status == 1
    assert told[-1]["passed"] == 2
    assert told[-1]["failed"] == 2
    failed = {row["test"]: row["failed"] for row in told if "test" in row}
    assert any("test_broken.py" in test for test in failed)
    assert output.count("Traceback") >= 3
    assert "there_is_no_such_module" in output
    status, output, told = run_tests("skips")
    assert status == 1
    assert "0 tests passed, 0 failed, 1 were skipped" in output
    assert told[-1]["skipped_because"] == {"Skipped: no GPU is here": 1}
