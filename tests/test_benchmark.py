"""The script that measures the cases with limits."""

import json
import sys
from pathlib import Path

import pytest
from scripts import script

pytest.importorskip("torch")
benchmark = script("benchmark")


def test_patterns_choose_cases():
    assert benchmark.chosen([]) == list(benchmark.CASES)
    assert benchmark.chosen(["K02", "kfe_mnist_*"]) == ["K02", "kfe_mnist_1e-2", "kfe_mnist_1e-3"]
    with pytest.raises(ValueError, match="unknown case kfe_nothing; choose from mnist_low"):
        benchmark.chosen(["K02", "kfe_nothing"])


def test_rows_of_a_file_are_kept_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A later call replaces its own rows, and no others."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"results": {"other": 1, "kfe_mnist_1e-2": 2}}))
    command = ["benchmark.py", "kfe_mnist_1e-2", "--small", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    assert benchmark.main() == 0
    rows = json.loads(path.read_text())["results"]
    assert rows["other"] == 1
    row = rows["kfe_mnist_1e-2"]
    assert 0 < row["measured"]["error"] <= row["limits"]["error"] == 1e-2
    assert row["environment"]["threads"] >= 1


def test_a_case_that_fails_is_told_and_the_others_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Failed:
        returncode = 1

    monkeypatch.setattr(benchmark.subprocess, "run", lambda *_, **__: Failed)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "K02", "K04"])
    assert benchmark.main() == 1
    assert capsys.readouterr().out == "K02: FAILED\nK04: FAILED\n"


@pytest.mark.slow
def test_a_preconditioner_is_compared_with_none():
    # The share of N^2 that is enough for the large network is a diagonal of a small one.
    case = benchmark.CASES["kfe_enco_inverse"] | {"factorize": {"shift": "auto"}}
    measured = benchmark.run_case(case, "cpu", small=True)
    assert measured["residual"] <= 2e-8
    assert 0 < measured["cg_iterations"] < measured["cg_plain"]
    assert measured["cg_share"] == measured["cg_iterations"] / measured["cg_plain"]
    assert 0 < measured["factor_percent"] < 100
    assert measured["factor_damping"] >= measured["damping"]
