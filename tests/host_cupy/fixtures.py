"""pytest fixtures: import them where they are used, or in conftest.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from host_cuda import runner

from host_cupy.install import HostCupy, installed


@pytest.fixture(scope="session")
def host_library_folder(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Where built libraries are kept: from run to run, where pytest has a cache."""
    if not runner.has_compiler():
        pytest.skip("no g++: the stand-in for cuBLAS and kernel sources cannot be built")
    cache = getattr(request.config, "cache", None)
    return cache.mkdir("host_cuda") if cache else tmp_path_factory.mktemp("host_cuda")


@pytest.fixture
def stand_in(host_library_folder: Path) -> Iterator[HostCupy]:
    """The stand-in for CuPy, installed for one test."""
    with installed(host_library_folder) as host:
        yield host
