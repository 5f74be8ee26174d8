"""The package as a whole: imports, names, files, docstrings, layers."""

import ast
import dataclasses
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gpu_hodlr as gh
from gpu_hodlr.compression.options import CAP

PACKAGE = Path(gh.__file__).parent
ROOT = Path(__file__).parents[1]
MODULES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(p.relative_to(PACKAGE)) for p in MODULES]

IMPORT = """
import sys, threading
import gpu_hodlr
heavy = {"torch", "cupy", "mpi4py", "matplotlib", "tqdm", "nvtx", "mlxtend", "pandas", "sklearn"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
print([t.name for t in threading.enumerate() if t.name.startswith("gpu_hodlr")])
print(threading.active_count())
"""


def python(code: str, **environment: str) -> list[str]:
    """The lines that a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.splitlines()


def test_import_is_light_and_silent():
    assert python(IMPORT) == ["[]", "[]", "1"]


def test_a_kernel_matrix_needs_neither_torch_nor_cupy():
    code = """
import sys
for name in ("torch", "cupy", "mpi4py", "matplotlib", "tqdm", "nvtx", "sklearn"):
    sys.modules[name] = None
import numpy as np
import gpu_hodlr as gh
K = gh.compress(gh.KernelOperator(np.linspace(0, 1, 200), nugget=1.0), leaf_size=20)
print(K.factorize().solve(K @ np.ones(200)).round(8).sum())
"""
    assert python(code) == ["200.0"]


def test_all_names_can_be_imported_without_torch():
    code = """
import sys
sys.modules["torch"] = None
from gpu_hodlr import *
try:
    GaussNewton(None, "mse")
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert python(code) == ["torch"]


@pytest.mark.parametrize(("threads", "pool"), [("1", 1), ("2", 2), ("999", 0), ("", 0), ("x", 0)])
def test_omp_num_threads_limits_the_pool(threads: str, pool: int):
    """0 stands for all processors of this process."""
    available = len(os.sched_getaffinity(0))
    code = "from gpu_hodlr.batched.threads import num_threads; print(num_threads())"
    assert python(code, OMP_NUM_THREADS=threads) == [str(min(pool, available) or available)]


def test_the_number_of_threads_does_not_change_the_bits():
    code = """
import numpy as np, hashlib
import gpu_hodlr as gh
d = np.abs(np.subtract.outer(np.arange(300.0), np.arange(300.0)))
K = gh.compress(1 / (1 + d), leaf_size=20, rtol=1e-6)
x = K.factorize(0.1).solve(K @ np.linspace(0, 1, 300))
print(hashlib.sha256(b"".join(a.tobytes() for a in (*K.structure.arrays(), x))).hexdigest())
"""
    assert python(code, OMP_NUM_THREADS="1") == python(code, OMP_NUM_THREADS="2")


def test_a_forked_child_has_its_own_pool():
    code = """
import os
import numpy as np
import gpu_hodlr as gh
op = gh.KernelOperator(np.linspace(0, 1, 300), nugget=1.0)
first = gh.compress(op, leaf_size=20)
child = os.fork()
if child == 0:
    again = gh.compress(op, leaf_size=20)
    os._exit(0 if np.array_equal(again.structure.D, first.structure.D) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert python(code, PYTHONWARNINGS="ignore") == ["0"]


# --- names -----------------------------------------------------------------------------------


def test_public_names():
    for name in (
        "GGNOperator",
        "KernelOperator",
        "DenseOperator",
        "FunctionOperator",
        "compress",
        "cg",
        "load",
    ):
        assert name in gh.__all__
        assert callable(getattr(gh, name))
    assert all(hasattr(gh, name) for name in gh.__all__)


def test_a_shell_lists_the_public_names_alone():
    assert sorted(dir(gh)) == sorted(gh.__all__)
    assert python("import gpu_hodlr.batched.numpy_dots; print(gpu_hodlr.batched.__name__)") == [
        "gpu_hodlr.batched"  # which can be had all the same
    ]


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (gh.GGNOperator, "model loss inputs targets dtype device"),
        (gh.KernelOperator, "points kernel lengthscale nugget"),
        (gh.DenseOperator, "array"),
        (gh.FunctionOperator, "n matmat entries diagonal dtype"),
        (gh.compress, "op scheme rtol max_rank leaf_size ordering seed dtype device progress"),
        (gh.cg, "A b damping M rtol maxiter"),
        (gh.HSSMatrix.factorize, "self damping"),
        (gh.HSSMatrix.save, "self path"),
        (gh.ULVCholesky.sample, "self num seed"),
        (gh.ULVCholesky.save, "self path"),
        (gh.load, "path"),
    ],
)
def test_arguments_keep_their_names_and_order(function: object, names: str):
    wanted = names.split()
    assert [p for p in inspect.signature(function).parameters if p in wanted] == wanted


def test_defaults():
    options = inspect.signature(gh.compress).parameters
    assert options["scheme"].default == "hss"
    assert options["rtol"].default is options["atol"].default is options["damping"].default is None
    assert gh.compress(np.eye(8)).report.rtol == 1e-4
    assert CAP == options["leaf_size"].default == 256
    assert options["max_rank"].default is None  # the cap, which "auto" may raise
    assert options["ordering"].default == "auto"
    assert options["seed"].default == 0
    assert not options["progress"].default
    assert inspect.signature(gh.cg).parameters["rtol"].default == 1e-8
    assert inspect.signature(gh.cg).parameters["maxiter"].default == 200


def test_members():
    K = gh.compress(np.eye(8) + 1.0)
    members = "matmat diagonal trace to_dense shape dtype device nbytes ranks storage_fraction"
    members += " report factorize save __matmul__"
    assert [name for name in members.split() if not hasattr(K, name)] == []
    F = K.factorize(damping=0.5)
    members = "solve logdet sqrt_matmat sqrt_solve sample damping save"
    assert [name for name in members.split() if not hasattr(F, name)] == []
    assert {"error", "rank_cap_hit", "seconds"} <= {f.name for f in dataclasses.fields(K.report)}
    info = gh.cg(K, np.ones(8))[1]
    assert {f.name for f in dataclasses.fields(info)} == {
        "converged",
        "iterations",
        "residuals",
        "direction",
        "curvature",
    }


# --- source ----------------------------------------------------------------------------------


def tree_of(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_no_file_over_500_lines(module: Path):
    assert len(module.read_text(encoding="utf-8").splitlines()) <= 500


def is_stub(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """A member of a protocol, without a body."""
    return ast.unparse(node.body) == "..."


def public_definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    for node in body:
        if (
            isinstance(node, ast.ClassDef | ast.FunctionDef)
            and not node.name.startswith("_")
            and not is_stub(node)
        ):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body)


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_docstrings(module: Path):
    """Every module and every public class and function says what it is."""
    tree = tree_of(module)
    assert ast.get_docstring(tree)
    bare = [d.name for d in public_definitions(tree.body) if not ast.get_docstring(d)]
    assert bare == []


def annotations(tree: ast.AST) -> Iterator[str]:
    """Those of arguments, results and variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield ast.unparse(node.annotation)
        elif isinstance(node, ast.FunctionDef) and node.returns is not None:
            yield ast.unparse(node.returns)


def test_few_annotations_are_any():
    """The protocol `Array` does not count: NumPy's own operands are Any."""
    found = []
    for module in MODULES:
        tree = tree_of(module)
        if module == PACKAGE / "devices.py":
            tree.body = [n for n in tree.body if getattr(n, "name", "") != "Array"]
        found += annotations(tree)
    assert len(found) > 3000
    assert found.count("Any") / len(found) < 0.05


FLOORS = {
    0: (
        "arrays",
        "autograd",
        "checks",
        "devices",
        "errors",
        "kernel_sources",
        "linear_map",
        "once",
        "profiling",
        "progress",
        "streams",
        "torch_memory",
    ),
    1: ("batched", "distributed"),
    2: (
        "eigenbasis",
        "operators",
        "testing",
    ),
    3: ("networks", "matrices", "tree", "ordering", "interactions"),
    4: ("structures", "files", "bases", "factor", "krylov", "matrix_functions"),
    5: ("compressed",),
    6: ("schemes",),
    7: ("compression",),
    8: ("applications",),
    9: ("cli", "__main__", "laplace_torch"),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}


class _WithoutTypes(ast.NodeTransformer):
    """Leaves out what is imported for annotations alone, which never happens."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        return None if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)


def imported(module: Path) -> Iterator[str]:
    """Modules imported anywhere in a file."""
    for node in ast.walk(_WithoutTypes().visit(tree_of(module))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_optional_libraries_are_imported_where_they_belong(module: Path):
    """torch for networks, tqdm, matplotlib for people, cupy, mpi4py on floor 1 and in `devices`."""
    of_networks = (
        ("networks",),
        *(("applications", room) for room in ("laplace", "linearized", "pruning", "training")),
    )
    room = module.relative_to(PACKAGE).with_suffix("").parts
    found = {name.partition(".")[0] for name in imported(module)}
    allowed = {
        ("autograd",): {"torch"},
        ("progress",): {"tqdm"},
        ("profiling",): {"nvtx"},
        ("applications", "pictures"): {"matplotlib"},
        ("torch_memory",): {"torch"},
        ("distributed", "__main__"): {"mpi4py"},
        ("distributed", "cuda_aware"): {"cupy", "mpi4py"},
        ("distributed", "factory"): {"cupy", "mpi4py"},
        ("distributed", "host_mpi"): {"mpi4py"},
    }.get(room, set())
    if room[0] == "batched" and room[1].startswith(("cupy_", "cuda", "cublas")):
        allowed = {"cupy"}
    if room[:1] in of_networks or room[:2] in of_networks:
        allowed = {"torch"}
    if room[0] != "cli":
        assert found & {"torch", "cupy", "mpi4py", "tqdm", "matplotlib", "nvtx"} <= allowed


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_rooms_import_from_floors_below(module: Path):
    """The table in docs/house.md: a room imports from its own floor and those below."""
    room = module.relative_to(PACKAGE).with_suffix("").parts[0]
    if room == "__init__":
        return
    for name in imported(module):
        parts = name.split(".")
        if parts[0] == "gpu_hodlr" and len(parts) > 1 and parts[1] in FLOOR_OF:
            assert FLOOR_OF[parts[1]] <= FLOOR_OF[room], name


def test_blas_is_limited_to_one_thread_from_every_thread():
    """Whichever thread limited it before, and whichever comes first and goes last."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one processor: BLAS has one thread at any time")
    code = """
import threading
from gpu_hodlr.batched import threads
from threadpoolctl import threadpool_info
def now():
    return {x["num_threads"] for x in threadpool_info() if x["user_api"] == "blas"}
first, last = threading.Event(), threading.Event()
seen = []
def works(enter, leave):
    enter.wait()
    with threads.one_blas_thread():
        last.set()
        leave.wait()
        threads.over_nodes(lambda t: seen.append(now()), 8)
threads.over_nodes(lambda t: seen.append(now()), 8)
seen.append(now() - {2})
one, two = (threading.Thread(target=works, args=a) for a in ((first, last), (last, first)))
for each in (one, two): each.start()
first.set()
for each in (one, two): each.join()
print(seen == 8 * [{1}] + [set()] + 16 * [{1}], now())
"""
    assert python(code, OPENBLAS_NUM_THREADS="2", OMP_NUM_THREADS="2") == ["True {2}"]


@pytest.mark.parametrize("words", ["The main job", "The tests"])
def test_ci_runs_the_commands_of_the_readme(words: str):
    """Word for word: it reads them there."""
    assert f".ci/readme_command '{words}'" in (ROOT / ".ci" / "run").read_text()
    script = [ROOT / ".ci" / "readme_command", words]
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("pip install ")
    assert f"```sh\n{done.stdout}```\n" in (ROOT / "README.md").read_text()
    script[1] = f"No {words}"
    done = subprocess.run(script, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert script[1] in done.stderr
