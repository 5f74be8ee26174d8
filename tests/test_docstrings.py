"""The examples in docstrings: every public name has one, and all are run."""

import doctest
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpu_hodlr as gh
from gpu_hodlr.factor import MultipoleSolver, RefinedFactor, Woodbury
from gpu_hodlr.operators import CrossKernel
from gpu_hodlr.structures.stored import Stored

# What `compress` and `factorize` give without being a name of the package, and the modules.
NAMES = {name: getattr(gh, name) for name in gh.__all__ if name != "__version__"} | {
    "MultipoleSolver": MultipoleSolver,
    "RefinedFactor": RefinedFactor,
    "Woodbury": Woodbury,
    "CrossKernel": CrossKernel,
    "check_operator": gh.testing.check_operator,
    "NotPositiveDefiniteError": gh.errors.NotPositiveDefiniteError,
}
del NAMES["testing"]  # its one function is among them


def definers(kind: type, name: str) -> Iterator[Any]:
    """A method, and those it overrides, in this package."""
    for base in kind.__mro__:
        if base.__module__.startswith("gpu_hodlr") and name in vars(base):
            yield vars(base)[name]


def methods(kind: type) -> Iterator[tuple[str, list[Any]]]:
    """What a user can call; what `Stored` declares is for files."""
    for name in dir(kind):
        found = list(definers(kind, name))
        if name.startswith("_") or not found or not inspect.isfunction(found[0]):
            continue
        if name not in vars(Stored):
            yield name, found


def documented() -> Iterator[tuple[str, list[Any]]]:
    """Every public name and method, with the objects whose docstrings are about it."""
    for name, found in NAMES.items():
        yield name, [found]
        if inspect.isclass(found) and not issubclass(found, Exception):
            for method, objects in methods(found):
                yield f"{name}.{method}", objects


def examples() -> dict[str, doctest.DocTest]:
    """All examples by where they stand; none twice, however many classes inherit them."""
    finder = doctest.DocTestFinder(recurse=False)
    found = {}
    for name, objects in documented():
        bases = NAMES[name].__mro__ if inspect.isclass(NAMES.get(name)) else ()
        for item in (*objects, *(b for b in bases if b.__module__.startswith("gpu_hodlr"))):
            for test in finder.find(item, getattr(item, "__qualname__", name), module=False):
                if test.examples:
                    test.globs = {"np": np, "gh": gh, "__name__": "__main__"}
                    found[test.name] = test
    return found


EXAMPLES = examples()


def test_every_public_name_has_an_example():
    lacking = [
        name
        for name, objects in documented()
        if not any("Example:\n" in (inspect.getdoc(item) or "") for item in objects)
    ]
    assert lacking == []
    assert len(EXAMPLES) > 50


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    test = EXAMPLES[name]
    if "import torch" in (test.docstring or ""):
        pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    result = doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
    assert result.attempted
    assert not result.failed, "".join(said)
