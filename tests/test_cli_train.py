"""`train`: what it prints, writes and draws, and what it refuses."""

import json

import numpy as np
import pytest
from cli_runs import printed, refused

from gpu_hodlr.cli.train import Curve, Trial

for module in ("torch", "mlxtend", "matplotlib"):
    pytest.importorskip(module)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    files = f"--json={folder / 'out.json'}", f"--plot={folder / 'out.png'}"
    lines = printed("train", "--epochs=4", *files).splitlines()
    return lines, json.loads((folder / "out.json").read_text()), folder


def test_train(trained):
    lines, document, folder = trained
    assert lines[0] == ("mnist: network 784-20-20-10, N = 16,330, cross_entropy loss, 5000 samples")
    adam, own = document["results"]
    assert (adam["name"], own["name"]) == ("Adam", "Gauss-Newton")
    assert (adam["steps"], own["batch"]) == ([0, 50, 100, 150, 200], 2500)
    assert adam["losses"][0] == own["losses"][0] > 2  # from the same weights
    assert 0.8 < adam["right"][-1] <= 1
    last = adam["losses"][-1]
    assert own["losses"][-1] <= last or own["epochs"][-1] == 4
    assert f"Adam's loss of {last:.5f}" in lines[-1]
    assert document["n"] == 16330
    image = pytest.importorskip("matplotlib.image").imread(folder / "out.png")
    assert min(image.shape[:2]) > 300
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20


def test_the_same_seed_is_the_same_training(trained):
    one = Trial("mnist", 0, "cpu", "float32")
    made = one.by_gauss_newton()
    found = one.curve("Gauss-Newton", *made, 2500, 2, every=1)
    # Of what the threads of BLAS change the last bits.
    want = trained[1]["results"][1]["losses"][: len(found.losses)]
    np.testing.assert_allclose(found.losses, want, rtol=1e-4)


def test_seconds_to_a_loss():
    curve = Curve("", 1, losses=[4.0, 2.0, 3.0, 1.0], seconds=[0.0, 1.0, 2.0, 3.0])
    assert curve.reached(3.0) == 0.5
    assert curve.reached(2.0) == 1.0
    assert curve.reached(1.5) == 2.75
    assert curve.reached(0.5) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--net=enco",), "invalid choice"),
        (("--epochs=0",), "1 or more"),
        (("--rate=0",), "above 0"),
        (("--batch=x",), "integer"),
        (("--plot=x.gif",), "must end in"),
        (("--maxiter=3",), "unrecognized"),
    ],
)
def test_refusals(capsys, options, said):
    assert said in refused(capsys, "train", *options)
