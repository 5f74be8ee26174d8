"""Every CuPy name that the package uses, read from its sources, looked up in the installed CuPy.

As a script it prints what it found as JSON: in a process of its own nothing but the names' own
modules has been imported, so that a submodule that nobody imports is missing here as it is there.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOTS = ("cupy", "cupyx", "cupy_backends")
LIBRARIES = "cupy_backends.cuda.libs"
# Calls of the package that give a module of CuPy.
_NAMESPACES = ("namespace", "namespace_on")


@dataclass
class Names:
    """What sources refer to: names in full, with the places where they stand."""

    chains: dict[str, str] = field(default_factory=dict)  # attributes of imported modules
    imports: dict[str, str] = field(default_factory=dict)  # by import statements and functions
    # Bindings of libraries imported past their package, which would find the library.
    bypasses: list[str] = field(default_factory=list)


class _Reader(ast.NodeVisitor):
    """Follows modules of CuPy through imports, assignments and attributes of one source."""

    def __init__(self, file: str, names: Names) -> None:
        self._file, self._names = file, names
        self._scopes: list[dict[str, str | None]] = [{}]

    def _place(self, node: Any) -> str:
        return f"{self._file}:{node.lineno}"

    def _known(self, name: str) -> str | None:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return "cupy" if name == "xp" else None  # a parameter

    def _meaning(self, node: ast.expr | None) -> str | None:
        """The full name of a module of CuPy or of what lies in one."""
        if isinstance(node, ast.Name):
            return self._known(node.id)
        if isinstance(node, ast.Attribute):
            if node.attr == "_xp":  # what classes call their arrays' library
                return "cupy"
            owner = self._meaning(node.value)
            return None if owner is None else f"{owner}.{node.attr}"
        if isinstance(node, ast.IfExp):
            return self._meaning(node.body) or self._meaning(node.orelse)
        if isinstance(node, ast.Call):
            return self._result(node)
        return None

    def _result(self, call: ast.Call) -> str | None:
        function = call.func
        called = function.attr if isinstance(function, ast.Attribute) else None
        called = function.id if isinstance(function, ast.Name) else called
        text = call.args[0].value if call.args and isinstance(call.args[0], ast.Constant) else None
        if called in _NAMESPACES:
            return "cupy"
        if called == "cuda_library" and isinstance(text, str):
            self._names.imports[f"{LIBRARIES}.{text}"] = self._place(call)
            return f"{LIBRARIES}.{text}"
        if called == "import_module" and isinstance(text, str) and text.split(".")[0] in ROOTS:
            self._imported(text, call)
            return text
        made = self._meaning(function)  # of a class: an instance, whose attributes it has
        return None if made is None else f"{made}()"

    def _imported(self, module: str, node: ast.AST) -> None:
        self._names.imports[module] = self._place(node)
        if module.startswith(LIBRARIES + "."):
            self._names.bypasses.append(f"{module} ({self._place(node)})")

    def visit_Import(self, node: ast.Import) -> None:
        for one in node.names:
            if one.name.split(".")[0] in ROOTS:
                self._imported(one.name, node)
                bound = one.asname or one.name.split(".")[0]
                self._scopes[-1][bound] = one.name if one.asname else bound

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.split(".")[0] in ROOTS:
            for one in node.names:
                full = f"{node.module}.{one.name}"
                self._names.imports[full] = self._place(node)
                self._scopes[-1][one.asname or one.name] = full

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                # Of starred ones no pairs can be told.
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for to, value in pairs:
                if isinstance(to, ast.Name):
                    self._scopes[-1][to.id] = self._meaning(value)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        full = self._meaning(node)
        if full is not None:
            self._names.chains.setdefault(full, self._place(node))
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self._meaning(node)
        self.generic_visit(node)

    def _scope(self, node: ast.AST) -> None:
        self._scopes.append({})
        self.generic_visit(node)
        self._scopes.pop()

    visit_FunctionDef = visit_Lambda = _scope  # noqa: N815


def read(text: str, file: str, names: Names) -> None:
    """Add the names of one source."""
    _Reader(file, names).visit(ast.parse(text))


def names_of(folder: Path) -> Names:
    """The names of all modules of a package."""
    names = Names()
    for path in sorted(folder.rglob("*.py")):
        read(path.read_text(encoding="utf-8"), str(path.relative_to(folder.parent)), names)
    return names


class _Lookup:
    """Finds full names, without a GPU and without CUDA's libraries."""

    def __init__(self) -> None:
        self.unloadable: set[str] = set()  # bindings whose library is not installed

    def missing(self, names: Names) -> Iterator[str]:
        for full, place in names.chains.items():  # before anything else is imported
            if not full.startswith(LIBRARIES) and not self._has(full):
                yield f"{full} ({place})"
        for full, place in (names.imports | names.chains).items():
            if (full in names.imports or full.startswith(LIBRARIES)) and not self._imports(full):
                yield f"{full} ({place})"

    def _has(self, full: str) -> bool:
        first, *rest = full.split(".")
        found: Any = importlib.import_module(first)
        for part in rest:
            if part.removesuffix("()").endswith("()"):
                return True  # the result of a result
            if not hasattr(found, part.removesuffix("()")):
                return False
            found = getattr(found, part.removesuffix("()"))
            # Of an instance the class is looked at; what a function returns is not known.
            if part.endswith("()") and not inspect.isclass(found):
                return True
            if not isinstance(found, ModuleType) and not inspect.isclass(found):
                return True
        return True

    def _imports(self, full: str) -> bool:
        if full.startswith(LIBRARIES + "."):
            return self._has_binding(*full.removeprefix(LIBRARIES + ".").split("."))
        owner, _, name = full.rpartition(".")
        if not owner:
            return importlib.import_module(name) is not None
        return hasattr(importlib.import_module(owner), name)

    def _has_binding(self, library: str, *names: str) -> bool:
        """Of a binding that cannot be loaded here: its file, and the names written in it."""
        package = importlib.import_module(LIBRARIES)
        try:
            binding = getattr(package, library)
        except AttributeError:
            return False
        except ImportError:
            self.unloadable.add(library)
        else:
            return not names or hasattr(binding, names[0].removesuffix("()"))
        found = importlib.util.find_spec(f"{LIBRARIES}.{library}")
        if found is None or found.origin is None:
            return False
        name = names[0].removesuffix("()") if names else library
        pattern = rb"(?<![A-Za-z0-9_])" + re.escape(name.encode()) + rb"(?![A-Za-z0-9_])"
        return re.search(pattern, Path(found.origin).read_bytes()) is not None


def main(folder: Path) -> None:
    names, lookup = names_of(folder), _Lookup()
    missing = list(lookup.missing(names))
    found = {
        "names": sorted(names.chains | names.imports),
        "missing": missing,
        "bypasses": names.bypasses,
        "unloadable": sorted(lookup.unloadable),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
