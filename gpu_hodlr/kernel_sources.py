"""The raw CUDA sources, as text for a run-time compiler."""

from __future__ import annotations

import re
from pathlib import Path

from gpu_hodlr.errors import ArgumentError, DeviceError

_HEADER = "common.cuh"
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


def source_folder() -> Path:
    """The folder of the CUDA sources, of an installed package or of an editable checkout.

    Raises:
        DeviceError: there are none.
    """
    package = Path(__file__).resolve().parent
    candidates = (package / "kernels", package.parent / "kernels")
    for folder in candidates:
        if (folder / _HEADER).is_file():
            return folder
    raise DeviceError(
        f"the CUDA kernel sources are missing: no {_HEADER} in "
        f"{' or '.join(str(folder) for folder in candidates)}; reinstall gpu-hodlr"
    )


def source_names() -> tuple[str, ...]:
    """Names of the kernel sources, as `read_source` takes them."""
    return tuple(sorted(path.stem for path in source_folder().glob("*.cu")))


def read_source(name: str) -> str:
    """One kernel source, self-contained: what it includes is inlined.

    Args:
        name: of the file, without ".cu".

    Raises:
        ArgumentError: there is no such source.
        DeviceError: there are no sources at all.
    """
    folder = source_folder()
    if name not in source_names():
        raise ArgumentError(f"name must be one of {', '.join(source_names())}, got {name!r}")
    source = (folder / f"{name}.cu").read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: (folder / found[1]).read_text(encoding="utf-8"), source)
