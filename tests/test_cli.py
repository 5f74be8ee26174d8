"""`compress`: what it prints, writes and gives as a status."""

import io
import json
import sys

import numpy as np
import pytest
from cli_runs import compress, gaussian, program, run

import gpu_hodlr as gh
from gpu_hodlr.cli import measure, summary
from gpu_hodlr.errors import NotPositiveDefiniteError, RankCapWarning


@pytest.fixture
def matrix_file(tmp_path):
    path = tmp_path / "kernel.npy"
    np.save(path, gaussian())
    return path


def test_compress_prints_writes_json_and_saves(matrix_file, tmp_path, capsys):
    out, saved = tmp_path / "out.json", tmp_path / "kernel.hss"
    assert compress(matrix_file, "--json", out, "--save", saved) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "400 x 400 float64" in captured.out
    assert "Product u = K w" in captured.out
    assert "Inverse x = (K + damping I)^-1 b" in captured.out
    assert "founding" not in captured.out

    document = json.loads(out.read_text())
    assert document["options"]["leaf_size"] == 50
    (result,) = document["results"]
    dense = gaussian()
    K = gh.load(saved)
    error = np.linalg.norm(K.to_dense() - dense) / np.linalg.norm(dense)
    assert error <= 3e-6
    assert result["error"] == pytest.approx(error, rel=0.5)
    assert result["size"] == 400
    assert result["ranks"] == [max(level) for level in K.ranks]
    assert result["storage_fraction"] == pytest.approx(K.storage_fraction)
    assert result["damping"] == pytest.approx(error * np.linalg.norm(dense), rel=0.5)
    damped = K.to_dense() + result["damping"] * np.eye(400)
    assert result["logdet"] == pytest.approx(np.linalg.slogdet(damped)[1], rel=1e-8)
    assert result["inverse_error"] < 1e-8
    assert 0 < result["cg_with"] < (result["cg_without"] or 501)
    assert result["founding"] is None
    assert (result["device"], result["gpu"]) == ("cpu", None)
    assert min(result["compress_seconds"], result["multiply_seconds"], result["solve_seconds"]) > 0


def test_true_residual_is_against_the_exact_matrix(matrix_file, tmp_path):
    out = tmp_path / "out.json"
    assert compress(matrix_file, "--rtol", 1e-3, "--damping", 1.0, "--json", out) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["damping"] == 1.0
    assert result["inverse_error"] < 1e-12
    assert 1e-7 < result["true_residual"] < 1e-1


def test_same_seed_gives_the_same_numbers(matrix_file, tmp_path):
    first, second = tmp_path / "1.json", tmp_path / "2.json"
    assert compress(matrix_file, "--json", first) == compress(matrix_file, "--json", second) == 0
    a, b = (json.loads(path.read_text())["results"][0] for path in (first, second))
    for key in ("error", "logdet", "damping", "inverse_error", "cg_with", "ranks"):
        assert a[key] == b[key]


def test_dtype_and_no_cg(matrix_file, tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ("--rtol", 1e-3, "--dtype", "float32", "--maxiter", 0, "--json", out)
    assert compress(matrix_file, *args) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["dtype"] == "float32"
    assert result["cg_with"] is None
    assert "CG" not in capsys.readouterr().out


def test_cg_that_does_not_converge_says_more_than(matrix_file, capsys):
    assert compress(matrix_file, "--damping", 1e-3, "--maxiter", 2) == 0
    assert ">2" in capsys.readouterr().out


@pytest.mark.parametrize("array", [np.zeros((60, 60)), np.eye(2), np.eye(60, dtype=np.float32)])
def test_trivial_matrices(tmp_path, array):
    np.save(tmp_path / "trivial.npy", array)
    out = tmp_path / "out.json"
    assert run("compress", tmp_path / "trivial.npy", "--leaf-size", 20, "--json", out) == 0
    (result,) = json.loads(out.read_text())["results"]
    assert result["error"] == 0
    assert result["damping"] > 0
    assert result["inverse_error"] < 1e-5


def test_on_a_device_everything_stays_there(tmp_path, capsys, stand_in):
    """Through the stand-in for CuPy, which refuses arrays of the host among the device's."""
    path, out, saved = tmp_path / "kernel.npy", tmp_path / "out.json", tmp_path / "kernel.hss"
    np.save(path, gaussian(120))
    options = ("--device", "cuda", "--leaf-size", 30, "--json", out, "--save", saved)
    assert run("compress", path, *options) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "not a GPU" in captured.out
    document = json.loads(out.read_text())
    assert document["options"]["device"] == "cuda"
    (result,) = document["results"]
    assert result["device"] == "cuda"
    assert "not a GPU" in result["gpu"]
    assert result["inverse_error"] < 1e-8
    assert result["cg_with"] > 0
    damped = gh.load(saved).to_dense() + result["damping"] * np.eye(120)
    assert result["logdet"] == pytest.approx(np.linalg.slogdet(damped)[1], rel=1e-8)


def test_progress_bar_on_a_terminal(matrix_file, monkeypatch):
    pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert compress(matrix_file) == 0
    assert "kernel 1e-6 factor" in terminal.getvalue()


def test_warnings_become_notes(matrix_file, capsys):
    """The tolerance is missed: what was reached is printed, and the status says so."""
    assert compress(matrix_file, "--rtol", 1e-10, "--max-rank", 3) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("gpu-hodlr: error: rtol 1e-10 was not reached: the error is ")
    assert captured.err.count("\n") == 1
    notes = [line for line in captured.out.splitlines() if line.startswith("note: ")]
    assert notes
    assert "RankCapWarning" not in captured.out
    with pytest.warns(RankCapWarning) as caught:
        gh.compress(gh.DenseOperator(gaussian()), rtol=1e-10, max_rank=3, leaf_size=50, seed=3)
    assert any(str(caught[0].message) in note for note in notes)


@pytest.fixture
def indefinite(tmp_path):
    path = tmp_path / "indefinite.npy"
    np.save(path, gaussian(100) - 0.5 * np.eye(100))
    return path


def test_a_damping_that_was_asked_for_is_never_replaced(indefinite, tmp_path, capsys):
    out, saved = tmp_path / "out.json", tmp_path / "saved"
    assert compress(indefinite, "--damping", 0.1, "--json", out, "--save", saved) == 1
    captured = capsys.readouterr()
    assert "not solved" in captured.err
    assert "not positive definite" in captured.err
    assert captured.err.count("\n") == 1
    assert "note: indefinite HSS 1e-6: not solved" in captured.out
    (result,) = json.loads(out.read_text())["results"]  # what was done is written
    assert (result["damping"], result["factor_seconds"]) == (None, None)
    assert "not positive definite" in result["failure"]
    assert gh.load(saved).shape == (100, 100)


def test_a_default_damping_that_does_not_do_is_raised_and_said(indefinite, tmp_path, capsys):
    out = tmp_path / "out.json"
    assert compress(indefinite, "--json", out) == 0
    assert "not positive definite with damping" in capsys.readouterr().out
    (result,) = json.loads(out.read_text())["results"]
    assert 0.3 < result["damping"] < 0.6
    assert result["failure"] is None


def test_a_second_failure_of_the_factor_is_one_of_the_command(monkeypatch, matrix_file, capsys):
    def never(self, damping=0.0):
        raise NotPositiveDefiniteError("not positive definite", damping=1.0, rtol=None)

    K = gh.compress(gh.DenseOperator(gaussian()), rtol=1e-6, leaf_size=50)
    monkeypatch.setattr(type(K), "factorize", never)
    assert compress(matrix_file) == 1
    assert "not solved: not positive definite" in capsys.readouterr().err


def test_as_a_program_in_a_pipe_there_is_no_progress_bar(matrix_file):
    done = program("compress", matrix_file, "--leaf-size", "50")
    assert done.returncode == 0
    assert done.stderr == ""
    assert "Product u = K w" in done.stdout


# --- parts ---


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.027, "2.7e-2"), (0.02, "2e-2"), (4e3, "4e3"), (0.0, "0"), (None, "-"), (np.inf, "inf")],
)
def test_scientific(value, text):
    assert summary.scientific(value) == text


def test_median_seconds_counts_calls():
    calls = []
    assert measure.median_seconds(lambda: calls.append(0), 3) >= 0
    assert len(calls) == 4
