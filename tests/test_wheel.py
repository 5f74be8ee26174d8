"""The wheel: what is in it, and that a user's type checker takes the package from it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]

SNIPPET = """
import numpy as np
import gpu_hodlr as gh

K = gh.compress(gh.KernelOperator(np.zeros((8, 2)), "gaussian", 0.5), rtol=1e-6)
error: float = K.report.error
F = K.factorize(damping=0.1)
x: np.ndarray = F.solve(np.ones(8))
y, info = gh.cg(K, x, damping=0.1, M=F)
iterations: int = info.iterations
K.save(b"K.npz")
wrong: str = K.report.error
gh.compress(K, rtoll=1e-6)
gh.no_such_name
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as pip builds it, with the backend that is installed."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True, timeout=120)
    (built,) = folder.iterdir()
    return built


def test_everything_is_in_it(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, pattern in (("gpu_hodlr", "*.py"), ("kernels", "*.cu*")):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}
        assert len(files) > 10
        assert files <= {name.removeprefix("gpu_hodlr/") for name in names} | names
    assert {"gpu_hodlr/py.typed", "gpu_hodlr/kernels/common.cuh"} <= names
    roots = {name.partition("/")[0] for name in names}
    assert roots == {"gpu_hodlr", wheel.name.partition("-py3")[0] + ".dist-info"}


@pytest.mark.slow
def test_a_users_type_checker_reads_it(wheel: Path, tmp_path: Path):
    """Right lines pass, and wrong ones are found: types are not `Any`."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "venv", "--without-pip", "venv"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "others.pth").write_text(str(Path(np.__file__).parents[1]))
    (tmp_path / "user.py").write_text(SNIPPET)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", "venv/bin/python", "user.py"],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if "PATH" not in name[1:]},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = [line.split(": ")[0] for line in done.stdout.splitlines() if ": error: " in line]
    assert found == [f"user.py:{line}" for line in (12, 13, 14)], done.stdout  # the last three
