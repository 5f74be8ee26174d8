"""Mutation testing of one module: small faults are planted, one at a time, and tests must notice.

    nice python tests/mutants.py gpu_hodlr/factor/ulv.py tests/test_factor.py tests/test_hodlr.py

In a copy of the tree, in a temporary folder, with NumPy alone; with `--stand-in` with CuPy's too. A
mutant that survives the test files named is printed with its line; `--most 60` draws so many,
`--only 17` runs one again, `--list` shows all. Verdicts on survivors are kept in
profiling/results/mutants.json.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMPARISONS: dict[type[ast.cmpop], list[type[ast.cmpop]]] = {
    ast.Lt: [ast.LtE, ast.Gt], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.Lt],
    ast.GtE: [ast.Gt, ast.Lt], ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is], ast.In: [ast.NotIn], ast.NotIn: [ast.In],
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.Mod: ast.FloorDiv,
}  # fmt: skip
OTHER_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "hypot": "max",
               "zeros": "ones", "ones": "zeros", "floor": "ceil", "ceil": "floor"}  # fmt: skip
COMMUTING = {"min", "max", "minimum", "maximum"}
UNTOLD = {  # functions that are no numerics: what is said, and files
    "__repr__", "nbytes", "_more_said", "index_arrays", "pack", "about", "stacks", "read_leaves",
    "_unpack", "_unpacked", "_unpack_step",
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A module with one fault.

    Attributes:
        line: of the fault.
        before: the code there.
        after: what became of it.
        source: of the whole module.
    """

    line: int
    before: str
    after: str
    source: str


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What a node may be replaced by, one small fault each."""
    new = copy.deepcopy(node)
    match new:
        case ast.Compare(ops=[op]):
            for other in COMPARISONS.get(type(op), []):
                changed = copy.deepcopy(new)
                changed.ops = [other()]
                yield changed
        case ast.BinOp(op=op):
            if isinstance(op, ast.MatMult):
                new.left, new.right = new.right, new.left
                yield new
            elif type(op) in ARITHMETIC:
                new.op = ARITHMETIC[type(op)]()
                yield new
        case ast.AugAssign(op=op):
            if type(op) in ARITHMETIC:
                new.op = ARITHMETIC[type(op)]()
                yield new
            yield ast.Pass()
        case ast.Constant(value=bool()):
            yield ast.Constant(not new.value)
        case ast.Constant(value=int()):
            yield ast.Constant(new.value + 1)
        case ast.Constant(value=float()):
            yield ast.Constant(3 * new.value + 1)
        case ast.UnaryOp(op=ast.USub() | ast.Not()):
            yield new.operand
        case ast.BoolOp(op=op):
            new.op = ast.Or() if isinstance(op, ast.And) else ast.And()
            yield new
        case ast.IfExp() | ast.If():
            new.test = ast.UnaryOp(ast.Not(), new.test)
            yield new
        case ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Attribute(attr="T"):
            yield new.value
        case ast.Call(func=ast.Attribute(attr="swapaxes" | "copy" | "conj") as called):
            yield called.value
        case ast.Call(args=[first, second, *rest]) if (
            not any(isinstance(a, ast.Starred) for a in (first, second))
            and ast.dump(first) != ast.dump(second)
            and ast.unparse(new.func).split(".")[-1] not in COMMUTING
        ):
            new.args = [second, first, *rest]
            yield new
        case ast.Attribute(attr=name) if name in OTHER_NAMES:
            new.attr = OTHER_NAMES[name]
            yield new
        case ast.Name(id=name) if name in OTHER_NAMES:
            new.id = OTHER_NAMES[name]
            yield new
        case ast.Slice(lower=lower, upper=upper):
            for part in ("lower", "upper"):
                bound = lower if part == "lower" else upper
                if bound is not None and not isinstance(bound, ast.Constant):
                    changed = copy.deepcopy(new)
                    setattr(changed, part, ast.BinOp(bound, ast.Add(), ast.Constant(1)))
                    yield changed


def places(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Every child that may be replaced: its parent, the field and the place in a list."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "bases", "type_params"):
            continue
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or _silent(child):
                continue
            yield node, field, i if isinstance(value, list) else None
            yield from places(child)


def _silent(node: ast.AST) -> bool:
    """What is said to people or to the type checker, or what asserts."""
    return (
        isinstance(node, (ast.JoinedStr, ast.Raise, ast.Assert, ast.Import, ast.ImportFrom))
        or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        or (isinstance(node, ast.FunctionDef) and node.name in UNTOLD)
        or (isinstance(node, ast.keyword) and node.arg == "strict")
    )


def mutants(source: str) -> list[Mutant]:
    """Every one of a module."""
    tree, found = ast.parse(source), []
    for parent, field, i in places(tree):
        holder = getattr(parent, field)
        old = holder if i is None else holder[i]
        for new in variants(old):
            new = ast.fix_missing_locations(ast.copy_location(new, old))
            if i is None:
                setattr(parent, field, new)
            else:
                holder[i] = new
            line = getattr(old, "lineno", getattr(parent, "lineno", 0))
            said = [ast.unparse(x).split("\n")[0] for x in (old, new)]
            found.append(Mutant(line, *said, ast.unparse(tree)))
            if i is None:
                setattr(parent, field, old)
            else:
                holder[i] = old
    return found


def copied(folder: Path) -> Path:
    """What git knows of the tree, in a folder."""
    known = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "gpu_hodlr", "kernels", "tests",
         "profiling", "docs", "*.toml", "*.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    for name in known:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def passes(folder: Path, tests: list[str], timeout: float, chosen: str) -> bool | None:
    """Whether the tests chosen (`-k`) pass in a child, which has what is imported; None: no end."""
    child = os.fork()
    if not child:
        os.setsid()
        silent = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(silent, stream)
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        sys.argv = ["pytest"]
        import pytest

        options = ["-x", "-n", "0", "-p", "no:cacheprovider", "--tb=no", "-k", chosen,
                   "-W", "ignore::pytest.PytestAssertRewriteWarning"]  # fmt: skip
        try:
            code = int(pytest.main([*options, *tests]))
        except BaseException:
            code = 1
        os._exit(code)
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _warm(torch: Any) -> None:
    """What torch loads at its first derivatives; without threads, which a fork does not have."""
    torch.set_num_threads(1)
    layers = torch.nn.Linear(2, 2), torch.nn.Tanh()
    model, x = torch.nn.Sequential(*layers), torch.eye(2)
    theta = dict(model.named_parameters())

    def outputs(theta: Any) -> Any:
        return torch.func.functional_call(model, theta, x)

    torch.func.vmap(lambda _: torch.func.jvp(outputs, (theta,), (theta,))[1])(x)
    torch.func.vmap(torch.func.vjp(outputs, theta)[1])(torch.ones(1, 2, 2))
    torch.optim.Adam(model.parameters()).zero_grad()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        outputs(theta).sum().backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("module")
    parser.add_argument("tests", nargs="*")
    parser.add_argument("--most", type=int)
    parser.add_argument("--only", type=int, nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--stand-in", action="store_true")
    options = parser.parse_args()
    found = dict(enumerate(mutants((ROOT / options.module).read_text())))
    if options.only:
        found = {i: found[i] for i in options.only}
    elif options.most and options.most < len(found):
        drawn = sorted(random.Random(0).sample(sorted(found), options.most))
        found = {i: found[i] for i in drawn}
    if options.list:
        for i, mutant in found.items():
            print(f"{i}: line {mutant.line}: {mutant.before}  ->  {mutant.after}")
        return
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ.pop("PYTHONPATH", None)
    names = ["numpy", "scipy.linalg", "scipy.sparse.linalg", "scipy.spatial.distance",
             "scipy.special", "hypothesis.strategies", "threadpoolctl", "pytest"]  # fmt: skip
    if any("torch" in Path(test.split("::")[0]).read_text() for test in options.tests):
        names += ["torch", "torch.func", "torch.nn.attention", "torch.utils.flop_counter"]
    for name in names:  # once, for all children
        importlib.import_module(name)
    if "torch" in sys.modules:
        _warm(sys.modules["torch"])
    sys.path = [p for p in sys.path if not Path(p or ".").resolve().is_relative_to(ROOT)]
    with tempfile.TemporaryDirectory() as name:
        folder = copied(Path(name))
        began = time.monotonic()
        chosen = "" if options.stand_in else "not stand_in"
        if not passes(folder, options.tests, 600, chosen):
            sys.exit("the tests fail without a mutant")
        timeout = 20 + 4 * (time.monotonic() - began)
        print(f"{len(found)} mutants, {timeout / 4 - 5:.0f} s for one that survives", flush=True)
        path, survivors = folder / options.module, 0
        for done, (i, mutant) in enumerate(found.items()):
            if not done % 10:
                print(f"{done} done", file=sys.stderr, flush=True)
            path.write_text(mutant.source)
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
            if passes(folder, options.tests, timeout, chosen):
                survivors += 1
                print(f"{i}: line {mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)
        print(f"{survivors} of {len(found)} survive")


if __name__ == "__main__":
    main()
