"""Names of the kernels of a source, which its macros spell out: a module cannot be asked."""

from __future__ import annotations

import re
from functools import cache

from gpu_hodlr.kernel_sources import read_source, source_names

_MACRO = re.compile(r"^#define (\w+)\(([^)]*)\)(.*)$", re.MULTILINE)
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(')
_WORD = re.compile(r'"[^"]*"|\w+')  # a macro's parameters are replaced outside of strings
_SUFFIX = re.compile(r"_(?:f32|f64|bf16)(?:_\d+)?$")


def entry_points(source: str) -> list[str]:
    """The kernels of a source text, in its order."""
    text = source.replace("\\\n", " ")
    plain = _MACRO.sub("", text)
    found = _names(plain)
    for macro, parameters, body in _MACRO.findall(text):
        if "__global__" not in body:
            continue
        names = [name.strip() for name in parameters.split(",")]
        for given in re.findall(rf"^{macro}\(([^)]*)\)", plain, re.MULTILINE):
            values = dict(zip(names, (value.strip() for value in given.split(",")), strict=True))
            expanded = _WORD.sub(lambda m, v=values: v.get(m[0], m[0]), body)
            found += _names(re.sub(r"\s*##\s*", "", expanded))
    return found


def _names(text: str) -> list[str]:
    return _KERNEL.findall(re.sub(r"\s+", " ", text))


@cache
def all_entry_points() -> dict[str, list[str]]:
    """The kernels of every source of the package."""
    return {name: entry_points(read_source(name)) for name in source_names()}


def stem(kernel: str) -> str:
    """A kernel's name without its type and width: restrict_rows_f64_4 is restrict_rows."""
    return _SUFFIX.sub("", kernel)
