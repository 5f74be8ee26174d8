"""The command line with what cannot be used: one line that says so, and a status."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from cli_runs import compress, gaussian, refused, run

import gpu_hodlr as gh
from gpu_hodlr import devices

TABLE_OPTIONS = ("--net", "--accuracy", "--full", "--samples", "--epochs")
COMPRESS_OPTIONS = ("--rtol", "--max-rank", "--leaf-size", "--ordering", "--scheme", "--save")
COMMON_OPTIONS = ("--device", "--dtype", "--seed", "--damping", "--maxiter", "--json", "--plot")


@pytest.fixture
def matrix_file(tmp_path):
    path = tmp_path / "kernel.npy"
    np.save(path, gaussian())
    return path


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
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 cut off")
    np.save(tmp_path / "cut.npy", gaussian(60))
    os.truncate(tmp_path / "cut.npy", 1000)
    for name, words in {
        "objects.npy": "not a .npy file",
        "many.npz": "archive",
        "text.npy": "not a .npy file",
        "empty.npy": "not a .npy file",
        "zip.npy": "archive",
        "cut.npy": "not a .npy file",
    }.items():
        assert words in refused(capsys, "compress", tmp_path / name)
    assert "Is a directory" in refused(capsys, "compress", tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rtol", "-1"], "rtol"),
        (["--rtol", "nan"], "rtol"),
        (["--rtol", "x"], "--rtol: wanted a number above 0 and below 1, got 'x'"),
        (["--rtol", "0"], "--rtol"),
        (["--rtol", "1"], "above 0 and below 1"),
        (["--rtol", "1e10"], "above 0 and below 1, got '1e10'"),
        (["--budget", "-1"], "--budget"),
        (["--budget", "2"], "budget must be <= 1"),
        (["--max-rank", "-3"], "--max-rank: wanted an integer, 1 or more, got '-3'"),
        (["--leaf-size", "0"], "--leaf-size"),
        (["--ordering", "sideways"], "ordering"),
        (["--scheme", "hsss"], "scheme"),
        (["--damping", "-1"], "--damping: wanted a finite number, 0 or more, got '-1'"),
        (["--damping", "inf"], "--damping"),
        (["--seed", "-1"], "--seed"),
        (["--maxiter", "1.5"], "--maxiter"),
        (["--dtype", "int8"], "--dtype"),
        (["--device", "abacus"], "--device"),
        (["--plot", "picture.bmp"], ".png"),
        (["--plot", "no/such/folder/a.png"], "no folder"),
        (["--json", "no/such/folder/a.json"], "no folder"),
        (["--save", "."], "cannot write to '.': Is a directory"),
        (["--save", "a" * 300], "File name too long"),
        (["--frobnicate"], "--frobnicate"),
        (["--rtl", "1e-3"], "unrecognized arguments: --rtl 1e-3; did you mean --rtol?"),
        (["--max-rnk=3"], "did you mean --max-rank?"),
    ],
)
def test_bad_option(matrix_file, capsys, options, words):
    assert words in refused(capsys, "compress", matrix_file, *options)


def test_one_file_is_not_written_twice_or_over_the_matrix(matrix_file, tmp_path, capsys):
    link, out = tmp_path / "link", tmp_path / "out.png"
    link.symlink_to(matrix_file)
    before = matrix_file.read_bytes()
    for path in (matrix_file, link):
        line = refused(capsys, "compress", matrix_file, "--save", path)
        assert f"--save {path} is also the file of the matrix" in line
    line = refused(capsys, "compress", matrix_file, "--json", out, "--plot", out)
    assert "is also the file of --json" in line
    assert matrix_file.read_bytes() == before
    assert not out.exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_file_without_rights(matrix_file, tmp_path, capsys):
    closed = tmp_path / "closed"
    closed.touch(0o400)
    assert "Permission denied" in refused(capsys, "compress", matrix_file, "--json", closed)
    matrix_file.chmod(0)
    assert "kernel.npy: Permission denied" in refused(capsys, "compress", matrix_file)


@pytest.mark.parametrize("command", ["compress", "pareto"])
def test_what_is_wrong_with_a_matrix_is_said_of_the_file(tmp_path, capsys, command):
    np.save(tmp_path / "int.npy", np.eye(70, dtype=int))
    line = refused(capsys, command, tmp_path / "int.npy")
    assert "int.npy: the type must be float32 or float64, got int64" in line
    assert "array" not in line


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


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "COMMAND"),
        ("tabel", "invalid choice: 'tabel' (choose from"),
        ("bench", "BENCHMARK"),
        ("bench sc18", "invalid choice: 'sc18'"),
    ],
)
def test_unknown_command(capsys, command, words):
    """One line without the usage, which names the help that there is."""
    line = refused(capsys, *command.split())
    assert words in line
    assert "usage:" not in line
    assert f"{' '.join(['gpu_hodlr', *command.split()[: command.count(' ')]])} --help" in line or (
        command == "bench" and "bench --help" in line
    )


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"gpu-hodlr {gh.__version__}\n"


def test_an_interrupt_ends_with_130_and_no_traceback():
    command = [sys.executable, "-m", "gpu_hodlr", "bench", "sc17", "--matrix=K04", "--n=100000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == "\n"  # the first matrix has begun
        time.sleep(0.5)
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "gpu-hodlr: interrupted\n")


@pytest.mark.parametrize(
    ("redirect", "status", "said"),
    [
        ("| true", 141, ""),  # as if SIGPIPE had ended it
        ("> /dev/full", 1, "gpu-hodlr: error: output: No space left on device\n"),
        (">&-", 0, ""),
        ("2>&- >/dev/null", 0, ""),
    ],
)
def test_output_that_goes_nowhere(matrix_file, redirect, status, said):
    line = f"{sys.executable} -m gpu_hodlr compress {matrix_file} --maxiter 0 {redirect}"
    script = f"{line}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (status, said)


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


def test_no_tqdm_is_no_bar_and_no_error(monkeypatch, matrix_file, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert compress(matrix_file, "--maxiter", 0) == 0
    assert capsys.readouterr().err == ""


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
