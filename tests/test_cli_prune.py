"""`prune`: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
from cli_runs import refused, run

pytest.importorskip("torch")
pytest.importorskip("mlxtend")

SMALL = ("--samples", 100, "--test", 500, "--epochs", 3, "--rounds", 1)


def test_prunes_in_three_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    files = ("--json", tmp_path / "p.json", "--plot", tmp_path / "p.png")
    assert run("prune", *SMALL, "--fraction", "0.9,0.9", *files) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert lines[0].startswith("mnist: network 784-20-20-10, cross_entropy loss")
    assert lines[1].startswith("of 500 other digits ")
    assert lines[3].split()[0] == "90"
    document = json.loads((tmp_path / "p.json").read_text())
    (row,) = document["results"]
    assert row["fraction"] == 0.9
    assert 1 > document["accuracy"] > 0.7
    assert row["surgeon"] > row["magnitude"]
    assert 0.05 < row["diagonal"] <= 1
    assert row["predicted_increase"] > 0
    assert row["cpu_seconds"] > 0
    assert f"{row['surgeon']:.1%}" in lines[3]
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fraction", "0"], "above 0"),
        (["--fraction", "1"], "above 0 and below 1, got '1'"),
        (["--fraction", "0.5,nan"], "got 'nan'"),
        (["--fraction", ""], "got ''"),
        (["--rounds", "0"], "--rounds"),
        (["--samples", "4500"], "--samples and --test must be at most 5000 together"),
        (["--test", "0"], "--test"),
        (["--epochs", "-1"], "--epochs"),
        (["--damping", "1"], "unrecognized arguments: --damping"),
        (["--plot", "p.txt"], "must end in one of .png, .pdf, .svg"),
        (["--json", "nowhere/p.json"], "there is no folder"),
        (["--json", "same.png", "--plot", "same.png"], "is also the file of --json"),
    ],
)
def test_refusals(options, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in refused(capsys, "prune", *options)
