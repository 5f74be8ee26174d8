"""`laplace` and `spectrum`: what they print, write and draw, and what they refuse."""

import json

import numpy as np
import pytest
from cli_runs import printed, refused, run

import gpu_hodlr as gh
from gpu_hodlr.cli import networks

for module in ("torch", "mlxtend", "matplotlib"):
    pytest.importorskip(module)

SPECTRUM = "--samples=20", "--epochs=0,1", "--probes=3", "--steps=30"
LAPLACE = "--samples=10", "--test=20", "--steps=30", "--prior=2"


def written(folder, command, *options):
    """Text, JSON and picture of a command."""
    files = [f"--json={folder / 'out.json'}", f"--plot={folder / 'out.png'}"]
    lines = printed(command, *options, *files).splitlines()
    return lines, json.loads((folder / "out.json").read_text()), folder


@pytest.fixture(scope="module")
def spectrum(tmp_path_factory):
    return written(tmp_path_factory.mktemp("spectrum"), "spectrum", *SPECTRUM)


@pytest.fixture(scope="module")
def laplace(tmp_path_factory):
    return written(tmp_path_factory.mktemp("laplace"), "laplace", *LAPLACE)


def picture(path):
    image = pytest.importorskip("matplotlib.image").imread(path)
    assert min(image.shape[:2]) > 300
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20


def test_spectrum(spectrum):
    lines, document, folder = spectrum
    assert lines[0] == "mnist: network 784-20-20-10, N = 16,330, 20 samples"
    rows = document["results"]
    assert [(row["operator"], row["epochs"]) for row in rows] == [
        ("ggn", 0), ("hessian", 0), ("ggn", 1), ("hessian", 1)
    ]  # fmt: skip
    assert [line.split()[:2] for line in lines[2:6]] == [
        ["Gauss-Newton", "0"], ["Hessian", "0"], ["Gauss-Newton", "1"], ["Hessian", "1"]
    ]  # fmt: skip
    assert rows[0]["loss"] > rows[2]["loss"]
    assert rows[1]["smallest"] < 0 < rows[1]["largest"]
    assert rows[1]["effective_dimension"][0]["value"] is None
    assert " -  " in lines[3]
    assert (document["n"], document["samples"]) == (16330, 20)
    picture(folder / "out.png")


def test_spectrum_is_that_of_the_network(spectrum):
    """Against the eigenvalues of A A^T."""
    net = networks.train("mnist", 20, 0, 1)
    op = gh.GGNOperator(net.model, net.loss, net.inputs, net.targets)
    values = np.linalg.eigvalsh(op.dual().gram())
    row = spectrum[1]["results"][2]
    np.testing.assert_allclose(row["largest"], values[-1], rtol=1e-5)
    np.testing.assert_allclose(row["trace"], values.sum(), rtol=1e-10)
    np.testing.assert_allclose(row["eigenvalues"], values[-10:], rtol=1e-4)
    frobenius = np.linalg.norm(values)
    assert abs(row["frobenius"] - frobenius) <= 4 * row["frobenius_error"] + 1e-6 * frobenius
    for one in row["effective_dimension"]:
        wanted = (values / (values + one["damping"])).sum()
        assert abs(one["value"] - wanted) <= 4 * one["error"]


def test_laplace(laplace):
    lines, document, folder = laplace
    assert lines[0].startswith("mnist: network 784-20-20-10, N = 16,330, 10 digits")
    assert lines[1].startswith("lowrank: ")
    given, best = document["results"]
    assert (given["prior_precision"], document["n"], document["scheme"]) == (2.0, 16330, "lowrank")
    assert best["log_marginal_likelihood"] > given["log_marginal_likelihood"]
    assert best["log_marginal_likelihood"] >= max(value for _, value in document["curve"])
    digits, noise = document["inputs"]
    assert 0 <= digits["right"] <= 1
    assert noise["right"] is None
    for one in (digits, noise):
        assert one["confidence_laplace"] < one["confidence"]
    assert any(line.startswith("other digits") for line in lines)
    assert any(line.startswith("their pixels mixed") for line in lines)
    picture(folder / "out.png")


def test_laplace_is_that_of_the_network(laplace):
    """Evidence of the curve by the eigenvalues of A A^T: but for the prior the same at each."""
    import torch

    from gpu_hodlr.cli import build_parser
    from gpu_hodlr.cli import laplace as command

    args = build_parser().parse_args(["laplace", *LAPLACE])
    x, y = command._data(args.samples, args.test, args.seed)["trained"]
    model = command._trained(x, y, args)
    theta = torch.nn.utils.parameters_to_vector(model.parameters()).detach().numpy()
    op = gh.GGNOperator(model, "cross_entropy", x, y, reduction="sum")
    values = np.linalg.eigvalsh(op.dual().gram())
    fit = -torch.nn.functional.cross_entropy(model(x), y, reduction="sum").item()
    for p, found in laplace[1]["curve"]:
        wanted = fit - 0.5 * p * theta @ theta - 0.5 * np.log1p(values.clip(0) / p).sum()
        np.testing.assert_allclose(found, wanted, atol=1e-2)


@pytest.mark.parametrize("command", ["laplace", "spectrum"])
def test_on_a_device(stand_in, tmp_path, capsys, command):
    """Through the stand-in for CuPy."""
    out = tmp_path / "out.json"
    options = {"laplace": LAPLACE, "spectrum": ("--operator=ggn", *SPECTRUM)}[command]
    assert run(command, *options, "--device=cuda", f"--json={out}") == 0
    assert capsys.readouterr().err == ""
    assert json.loads(out.read_text())["options"]["device"] == "cuda"


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("spectrum", ["--net", "cifar"], "mnist"),
        ("spectrum", ["--operator", "fisher"], "'fisher' is not one of ggn, hessian"),
        ("spectrum", ["--epochs", "1,x"], "--epochs"),
        ("spectrum", ["--samples", "5001"], "5000"),
        ("spectrum", ["--steps", "0"], "--steps"),
        ("spectrum", ["--maxiter", "3"], "unrecognized arguments: --maxiter"),
        ("laplace", ["--samples", "4900", "--test", "101"], "at most 5000 together"),
        ("laplace", ["--prior", "0"], "--prior"),
        ("laplace", ["--scheme", "hsss"], "--scheme"),
        ("laplace", ["--plot", "picture.bmp"], ".png"),
        ("laplace", ["--device", "abacus"], "device"),
    ],
)
def test_refusals(capsys, command, options, words):
    assert words in refused(capsys, command, *options)


@pytest.mark.parametrize("command", ["laplace", "spectrum"])
def test_one_file_is_not_written_twice(tmp_path, capsys, command):
    out = tmp_path / "out.png"
    assert "is also the file of" in refused(capsys, command, "--json", out, "--plot", out)


@pytest.mark.parametrize("command", ["laplace", "spectrum"])
def test_what_is_missing_is_named(monkeypatch, capsys, command):
    from gpu_hodlr import cli

    def missing(*modules):
        raise ModuleNotFoundError("No module named 'mlxtend'", name="mlxtend")

    monkeypatch.setattr(f"gpu_hodlr.cli.{command}.require", missing)
    assert cli.main([command]) == 2
    assert 'pip install "gpu_hodlr[demo]"' in capsys.readouterr().err
