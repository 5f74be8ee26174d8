"""profiling/gpu_model.py: the files it reads and writes, its options, what it prints."""

import json
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from scripts import FOLDER, script

from gpu_hodlr.cli.measure import Result


@pytest.fixture(scope="module")
def model() -> ModuleType:
    """The script; with it come the modules of gpu_costs."""
    return script("gpu_model")


def part(name: str) -> ModuleType:
    """A module of gpu_costs."""
    script("gpu_model")
    return import_module(f"gpu_costs.{name}")


def predictions() -> dict[str, Any]:
    """A made-up prediction."""
    seconds = {"H100": 2.0, "H200": 1.0}
    jobs = {
        "compress": {"seconds": seconds, "phases": {"sampling": {"seconds": seconds}}},
        "factor": {"seconds": {"H100": 0.4, "H200": 0.2}},
    }
    about = {"matrix": "mnist", "accuracy": "low", "dtype": "float64", "N": 16_330}
    qr = {"call": "pivoted QR", "dtype": "float64", "nodes": 4, "m": 9, "s": 8, "r": 3}
    return {
        "prediction": True,
        "cases": [{**about, "scheme": scheme, "jobs": jobs} for scheme in ("hss", "fmm")],
        "kernels": [{**qr, "seconds": seconds}],
    }


def measurements() -> dict[str, Any]:
    """A made-up gpu_check.json, of rows as its steps write them."""
    roofline = script("roofline")
    cost = roofline.Cost(1.0, 1.0)
    jobs = [
        roofline.row(job, seconds, cost, 1.0, 1.0)
        for job, seconds in (
            ("compress", 3.0),
            ("  sampling", 0.5),
            ("factor", 0.1),
            ("solve", 1.0),
        )
    ]
    passed = {"verdict": "passed", "dtype": "float64"}
    qr = {"nodes": 4, "m": 9, "s": 8, "r": 3, "microseconds": 4e6}
    rooflines = [
        {"case": "rates", **passed, "copy_GB_per_s": 4300.0, "gemm_GF_per_s": 1.0},
        {"case": "jobs", "matrix": "mnist", **passed, "gpu": "NVIDIA H200", "N": 16_330,
         "jobs": jobs},
        {"case": "jobs", "matrix": "kernel", **passed, "N": 131_072, "jobs": jobs},
        {"case": "jobs", "matrix": "enco", "dtype": "float64", "verdict": "failed"},
        {"case": "pivoted QR", **passed, **qr},
        {"case": "pivoted QR", **passed, **qr, "m": 10},
    ]  # fmt: skip
    about = {"name": "mnist", "accuracy": "low", "verdict": "passed"}
    tables = [
        {"case": "product", **about, "scheme": "fmm", "compress_seconds": 4.0,
         "multiply_seconds": 0.1, "phase_seconds": {"sampling": 2.0}},
        {"case": "inverse", **about, "factor_seconds": 0.4, "solve_seconds": None},
    ]  # fmt: skip
    steps = [{"name": "rooflines", "rows": rooflines}, {"name": "tables", "rows": tables}]
    return {"size": "full", "steps": steps}


def test_predicted_and_measured_stand_side_by_side(model: ModuleType, tmp_path: Path, capsys: Any):
    gpu, rows = part("measured").compared(predictions(), measurements())
    assert gpu == "H200"
    found = {row["what"]: (row["predicted"], row["measured"], row["ratio"]) for row in rows}
    assert found["copy, float64, GB/s"] == (4300.0, 4300.0, 1.0)
    assert found.pop("batched GEMM, float64, GF/s")[2] < 1e-3
    shape = "4 x 9 x 8, r = 3, float64"
    assert found == {
        "copy, float64, GB/s": (4300.0, 4300.0, 1.0),
        "mnist, N = 16,330: compress": (1.0, 3.0, 3.0),
        "mnist, N = 16,330: compress: sampling": (1.0, 0.5, 0.5),
        "mnist, N = 16,330: factor": (0.2, 0.1, 0.5),
        "table: mnist low fmm: compress": (1.0, 4.0, 4.0),
        "table: mnist low fmm: compress: sampling": (1.0, 2.0, 2.0),
        "table: mnist low hss: factor": (0.2, 0.4, 2.0),
        f"pivoted QR, {shape}": (1.0, 4.0, 4.0),
    }
    files = tmp_path / "predicted.json", tmp_path / "measured.json"
    for path, content in zip(files, (predictions(), measurements()), strict=True):
        path.write_text(json.dumps(content))
    assert model.main(["--predicted", str(files[0]), "--measured", str(files[1])]) == 0
    text = capsys.readouterr().out
    assert "| what | H200 predicted | measured | measured / predicted |" in text
    assert "| table: mnist low hss: factor | 0.2 | 0.4 | 2.00 |" in text


def test_names_are_those_of_the_tables_rows():
    assert set(part("measured")._TABLE_JOBS.values()) <= {f.name for f in fields(Result)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p, m: p.pop("prediction"), "no prediction of gpu_model.py"),
        (lambda p, m: p.update(cases=None), "has no cases"),
        (lambda p, m: m.pop("steps"), "it has no steps"),
        (lambda p, m: m.update(size="small"), "ran with size 'small'"),
        (lambda p, m: m.update(steps=[]), "do not name their GPU"),
        (lambda p, m: m["steps"][0]["rows"][1].update(gpu="Tesla V100"), "model knows H100, H200"),
        (lambda p, m: (p.update(cases=[], kernels=[]), m["steps"][0]["rows"].pop(0)),
         "nothing is both"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_compared(change: Any, message: str):
    measured = part("measured")
    one, two = predictions(), measurements()
    change(one, two)
    with pytest.raises(measured.ComparisonError, match=message):
        measured.compared(one, two)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cases", "mnist low"], "no such case: mnist low; there are mnist low hss"),
        (["--predicted", "x.json"], "--predicted goes with --measured"),
        (["--measured", "no-such-file.json"], "No such file"),
        (["--gpu", "V100"], "invalid choice: 'V100'"),
        (["--n", "1"], "--n must be 2 or more"),
    ],
)
def test_bad_options(
    model: ModuleType, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        model.main(options)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_trial_run_prints_assumptions_and_predictions(
    model: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    file = tmp_path / "prediction.json"
    options = ["--size", "small", "--cases", "kernel hss", "--n", "2400", "--primitives",
               "--json", str(file)]  # fmt: skip
    assert model.main(options) == 0
    text = capsys.readouterr().out
    gpus = part("gpus")
    for gpu in gpus.GPUS.values():
        for name, value, why in gpu.assumptions():
            assert why, f"nothing says why {name} is {value}"
            assert f"{name} = " in text
    assert all(line in text for line in ("PREDICTED, NOT MEASURED", *gpus.MODELLED))
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["prediction"] is True
    assert set(document["assumptions"]["gpus"]) == {"H100", "H200"}
    recorded, grown = document["cases"]
    assert (recorded["N"], grown["N"]) == (300, 2400)
    assert recorded["how"] == "recorded at this N"
    assert grown["how"].startswith("grown from steps recorded at N = 300 and 150")
    jobs = {"compress", "product, 1 column", "product, 256 columns", "factor", "solve, 1 column"}
    for case in document["cases"]:
        assert jobs <= set(case["jobs"])
        assert "sampling" in case["jobs"]["compress"]["phases"]
        for row in case["jobs"].values():
            assert 0 < row["seconds"]["H200"] <= 1.001 * row["seconds"]["H100"]
    assert document["founding"] == []  # of true matrices alone
    assert {row["call"] for row in document["kernels"]} >= {"full QR", "Cholesky"}


def test_cases_are_predicted_anew_in_a_file(model: ModuleType):
    """The others stay, the founding rows follow; not with other assumptions."""
    gpus = part("prediction").chosen(["H200"])
    base = {
        "prediction": True, "size": "full", "assumptions": part("prediction").assumptions(gpus),
        "executed_on_the_stand_in": [], "kernels": [],
    }  # fmt: skip

    def case(scheme: str, seconds: float) -> dict[str, Any]:
        about = {"matrix": "mnist", "accuracy": "low", "dtype": "float64", "N": 9}
        jobs = {"compress": {"seconds": {"H200": seconds}}}
        return {"case": f"mnist low {scheme}", "scheme": scheme, **about, "jobs": jobs}

    old = {**base, "cases": [case("hss", 1.0), case("fmm", 2.0)], "kernels": [{"call": "QR"}]}
    new = {**base, "cases": [case("fmm", 3.0)], "executed_on_the_stand_in": ["f"]}
    found = model.updated(old, new)
    assert [row["jobs"]["compress"]["seconds"]["H200"] for row in found["cases"]] == [1.0, 3.0]
    assert found["kernels"] == [{"call": "QR"}]
    assert found["executed_on_the_stand_in"] == ["f"]
    row = found["founding"][0]
    assert (row["job"], row["founding"], row["goal"]) == ("compress", 0.5, 0.025)
    assert (row["scheme"], row["predicted"]) == ("fmm", {"H200": 3.0})
    for change in ({"size": "small"}, {"assumptions": {}}, {"prediction": False}):
        with pytest.raises(ValueError, match=r"are others|is missing"):
            model.updated({**old, **change}, new)


def test_the_document_shows_what_the_file_predicts(model: ModuleType):
    """The committed predictions say that they are such; the table is made of them."""
    document = json.loads((FOLDER / "results" / "gpu_prediction.json").read_text(encoding="utf-8"))
    part("measured").check_prediction(document)
    assert document["size"] == "full"
    assert all(case["date"] for case in document["cases"])
    assert document["assumptions"]["gpus"]["H100"]["copy"]["why"]
    text = (FOLDER.parent / "docs" / "gpu.md").read_text(encoding="utf-8")
    _, heading, rest = text.partition("## Predicted, not measured\n")
    assert heading
    assert model.founding_table(document) in rest
    wanted = {("mnist", "low"), ("mnist", "high"), ("enco", "low"), ("enco", "high")}
    assert {(row["matrix"], row["accuracy"]) for row in document["founding"]} == wanted
