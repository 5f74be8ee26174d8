"""The code and the commands on the pages run, with what a reader would bring to them."""

import re
import shlex
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_cupy.install import HostCupy
from scipy.sparse import diags_array
from test_documents import NAMES, blocks, text

import gpu_hodlr as gh
from gpu_hodlr.cli import build_parser

Given = dict[str, Any]
# laplace.md has two blocks: the second is laplace-torch's, which tests seldom have.
RUN_HERE = {
    "README.md", "docs/factors.md", "docs/gaussian_process.md", "docs/gpu.md", "docs/index.md",
    "docs/influence.md", "docs/laplace.md", "docs/operators.md", "docs/pruning.md",
    "docs/ranks.md", "docs/spectrum.md", "docs/training.md",
}  # fmt: skip


def points(n: int = 300) -> np.ndarray:
    return np.random.default_rng(0).random((n, 2))


def kernel(n: int = 300) -> gh.KernelOperator:
    return gh.KernelOperator(points(n), "matern32", 0.3, nugget=1e-2)


def network() -> Given:
    """A classifier and its data."""
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    inputs, targets = torch.randn(40, 6), torch.randint(3, (40,))
    return {"gh": gh, "torch": torch, "model": model, "inputs": inputs, "targets": targets}


def run(name: str, given: Given, which: slice = slice(None)) -> Given:
    """The code of a page, block after block as a reader would."""
    for code in blocks(name, "python")[which]:
        exec(compile(code, name, "exec"), given)
    return given


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the code saves what it saves."""
    monkeypatch.chdir(tmp_path)


def test_every_page_with_code_is_run():
    assert {name for name in NAMES if blocks(name, "python")} == RUN_HERE


def test_readme():
    given = network()
    torch, n = given["torch"], sum(p.numel() for p in given["model"].parameters())
    given = run("README.md", given | {"w": torch.randn(n), "gradient": torch.randn(n)})
    assert given["info"].converged
    assert type(given["u"]) is torch.Tensor
    assert given["K"].shape == (n, n)


def test_index():
    np.testing.assert_allclose(run("docs/index.md", {})["x"].mean(), 1.0, atol=0.1)


def test_factors():
    op = kernel()
    given = run("docs/factors.md", {"gh": gh, "op": op, "J": np.ones((4, 300))})
    inverse = np.linalg.inv(op.to_dense() + 0.1 * np.eye(300))
    np.testing.assert_allclose(given["variance"], np.diag(inverse), rtol=0.1)
    np.testing.assert_allclose(given["slope"], np.trace(inverse), rtol=0.1)
    assert given["covariance"].shape == (3, 3)
    assert given["leverage"].shape == (4,)


def test_gaussian_process():
    y = np.sin(6 * points()[:, 0])
    y += 0.1 * np.random.default_rng(1).standard_normal(300)
    given = run("docs/gaussian_process.md", {"gh": gh, "X": points(), "y": y, "new": points(5)})
    np.testing.assert_allclose(given["mean"], np.sin(6 * points(5)[:, 0]), atol=0.2)
    assert given["draws"].shape == (5, 10)


def test_gpu(stand_in: HostCupy):
    op = kernel(60)
    gh.compress(op).save("ggn.npz")
    given = run("docs/gpu.md", {"gh": gh, "op": op, "w": stand_in.cupy.ones(60)})
    assert given["K"].device == "cuda"


@pytest.mark.parametrize("name", ["influence", "pruning", "training"])
def test_pages_that_bring_all_they_need(name: str):
    pytest.importorskip("torch")
    run(f"docs/{name}.md", {})


def test_laplace():
    given = network()
    given = run("docs/laplace.md", given | {"new": given["inputs"][:7]}, slice(1))
    assert given["found"].probabilities.shape == (7, 3)
    assert given["weights"].shape == (10, given["posterior"].mean.size)


def test_laplace_torch():
    pytest.importorskip("laplace")
    given = network()
    dataset = given["torch"].utils.data.TensorDataset(given["inputs"], given["targets"])
    given |= {"loader": given["torch"].utils.data.DataLoader(dataset, batch_size=20)}
    given = run("docs/laplace.md", given | {"new": given["inputs"][:7]}, slice(1, 2))
    assert given["probabilities"].shape == (7, 3)


def test_operators():
    given = network()
    torch = given["torch"]
    layers = [torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4), torch.nn.Tanh()]
    named = OrderedDict((str(i), layer) for i, layer in enumerate(layers))
    A = diags_array([np.ones(59), np.full(60, 3.0), np.ones(59)], offsets=[-1, 0, 1], format="csr")
    op = kernel()
    K = gh.compress(op)
    given |= {
        "A": A, "X": points(), "noise": 0.1, "K": K, "b": np.ones(300),
        "model": torch.nn.Sequential(named | {"lora": torch.nn.Linear(4, 3)}),
        "dataset": torch.utils.data.TensorDataset(given["inputs"], given["targets"]),
    }  # fmt: skip
    run("docs/operators.md", given, slice(3))
    gh.testing.check_operator(given["Shifted"](A, 2.0), A.toarray() + 2 * np.eye(60))
    assert given["op"].shape == (300, 300)
    given["op"] = gh.DenseOperator(op.to_dense() + 0.1 * np.eye(300))
    run("docs/operators.md", given, slice(3, None))
    assert given["failed"] == 0
    t = given["t"].detach()
    np.testing.assert_allclose(given["t"].grad, 2 * (K @ t))
    assert given["op"].shape == (15, 15)  # of the layer "lora" alone
    x = torch.randn(4, 2, dtype=torch.float64)  # the loss is held to its own value here
    assert gh.GGNOperator(torch.nn.Linear(2, 2).double(), given["LogCosh"](), x, x).shape == (6, 6)


def test_spectrum():
    given = network()
    given |= {"x": given["inputs"], "y": given["targets"], "checkpoints": ["early", "late"]}
    given |= {"load": lambda path: given["model"]}
    pytest.importorskip("matplotlib")
    assert len(run("docs/spectrum.md", given)["spectra"]) == 2


def test_ranks(monkeypatch: pytest.MonkeyPatch):
    """On one rank, and of fewer points."""
    pytest.importorskip("mpi4py")
    [code] = blocks("docs/ranks.md", "python")
    assert code.count("20000") == 1
    given: Given = {}
    exec(code.replace("20000", "2000"), given)
    residual = given["K"] @ given["x"] + 0.1 * given["x"] - given["b"]
    assert np.linalg.norm(residual) < 1e-8 * np.linalg.norm(given["b"])


@pytest.mark.parametrize("name", NAMES)
def test_commands(name: str):
    """The parser takes every command line with options that a page shows."""
    prose = re.sub(r"^```.*?^```", "", text(name), flags=re.MULTILINE | re.DOTALL)
    for line in [*"".join(blocks(name, "sh")).splitlines(), *re.findall(r"`([^`]*)`", prose)]:
        found = re.search(r"python -m gpu_hodlr (.* --.*)", " ".join(line.split()))
        if found is not None:
            build_parser().parse_args(shlex.split(found[1]))
