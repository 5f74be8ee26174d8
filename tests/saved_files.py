"""Saved files changed, damaged, and saves that fail on the way."""

import dataclasses
import io
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from thread_ranks import on_threads

import gpu_hodlr as gh

Change = Callable[[dict[str, Any]], Any]


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def as_header(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Header and arrays of a file."""
    with np.load(path) as f:
        arrays = dict(f)
    return json.loads(arrays.pop("header").tobytes()), arrays


def rewritten(path: Path, header: Change = id, arrays: Change = id) -> Path:
    """The file with its header and arrays changed."""
    about, content = contents(path)
    header(about)
    arrays(content)
    path.write_bytes(npz(**content, header=as_header(about)))
    return path


def round_trip(K: Any, folder: Path) -> Any:
    """A matrix saved and loaded, which is the same to the bit, and so is its factor."""
    K.save(folder / "m")
    again = gh.load(folder / "m")
    assert dataclasses.asdict(again.report) == dataclasses.asdict(K.report)
    assert (again.ranks, again.nbytes) == (K.ranks, K.nbytes)
    v = np.random.default_rng(0).standard_normal((K.shape[0], 2)).astype(K.dtype)
    np.testing.assert_array_equal(again @ v, K @ v)
    np.testing.assert_array_equal(again.factorize(0.5).solve(v), K.factorize(0.5).solve(v))
    return again


def parts(index: Path) -> list[Path]:
    """The ranks' files beside an index, which has a folder of its own."""
    return sorted(path for path in index.parent.iterdir() if path != index)


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def flip(path: Path) -> None:
    """One bit in the middle is another."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def fail(
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    error: type[BaseException],
    rank: int | None = None,
) -> None:
    """Let np.savez (after half a file), os.fsync or os.replace fail, on one rank or on all."""
    real = {"np.savez": np.savez, "os.fsync": os.fsync, "os.replace": os.replace}[function]

    def fails(*args: Any, **kwargs: Any) -> Any:
        if rank is not None and threading.current_thread().name != f"rank {rank}":
            return real(*args, **kwargs)
        if function == "np.savez":
            args[0].write(b"PK\x03\x04 half a file")
        raise error

    monkeypatch.setattr(f"gpu_hodlr.files.writing.{function}", fails)


def on_named_threads(size: int, function: Callable[[Any], Any]) -> list[Any]:
    """`on_threads`, whose threads are named so that `fail` knows them."""

    def job(comm: Any) -> Any:
        threading.current_thread().name = f"rank {comm.rank}"
        return function(comm)

    return on_threads(size, job)
