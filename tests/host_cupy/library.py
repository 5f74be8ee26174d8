"""cuBLAS and cuSOLVER of the stand-in: host_cublas.cpp, built and loaded."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from host_cuda import runner

from host_cupy import memory, state
from host_cupy.state import CUDARuntimeError

_SOURCE = Path(__file__).with_name("host_cublas.cpp")
_NAME = "libcublas.so.12"
_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
)
_CHECK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t)


def _build(folder: Path) -> Path:
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-ffp-contract=off"]
    text = _SOURCE.read_bytes()
    digest = hashlib.sha256("\0".join([runner.COMPILER, *flags]).encode() + text).hexdigest()[:16]
    command = [runner.COMPILER, *flags, str(_SOURCE), "-o"]
    return runner.built(
        folder / f"host_cublas-{digest}.so", lambda path: runner._run([*command, str(path)])
    )


class Library:
    """The loaded library with its hooks; `problem` says what a hook objected to."""

    def __init__(self, folder: Path) -> None:
        self.path = _build(folder)
        self.raw = ctypes.CDLL(str(self.path))
        self.raw.host_cublas_create.restype = ctypes.c_void_p
        self.problem: Exception | None = None
        # ctypes does not keep callbacks alive.
        self._callbacks = _HOOK(self._called), _CHECK(self._checked)
        self.raw.host_cublas_hooks(*self._callbacks)
        self._handles: dict[str, int] = {}
        self._replaying = False

    def reset(self) -> None:
        self._handles.clear()
        self.problem = None
        self.raw.host_cublas_forget()

    def handle(self, kind: str) -> int:
        """A handle of "cublas" or "cusolver"; it is made at the first call."""
        if kind not in self._handles:
            state.refuse_capture(f"creating the {kind} handle")
            self._handles[kind] = self.raw.host_cublas_create()
        return self._handles[kind]

    def _called(
        self, name: bytes, stream: int | None, number: int, workspace: int | None, size: int
    ) -> int:
        state.counters.library_calls += 1
        try:
            capture = state.capture_of(stream or 0)
            if workspace is not None and not memory.accounts.memory.hold(workspace, size):
                raise CUDARuntimeError(700, f"a workspace of {size} bytes is not device memory")
        except CUDARuntimeError as e:  # nothing may pass through C
            self.problem = e
            return -1
        if capture is None:
            return 0
        if workspace is None:
            state.counters.captured_without_workspace += 1
        capture.add(lambda: self._replay(number), stream or 0)
        return 1

    def _replay(self, number: int) -> None:
        self._replaying = True  # the arrays of the capture may be gone
        try:
            if self.raw.host_cublas_replay(number):
                raise CUDARuntimeError(700, str(self.problem))
        finally:
            self._replaying = False

    def _checked(self, start: int, size: int) -> int:
        accounts = memory.accounts
        if (accounts.memory if self._replaying else accounts.arrays).hold(start, size):
            return 1
        self.problem = CUDARuntimeError(
            700, f"a cuBLAS operand of {size} bytes at {start:#x} is not in a device array"
        )
        return 0

    @contextmanager
    def found_by_name(self) -> Iterator[None]:
        """`ctypes.CDLL("libcublas.so.12")` gives this library.

        By that name and not by a SONAME: a process with CUDA's torch or with CuPy may have the
        real library loaded already, and would be given this one later if it had not.
        """
        original = ctypes.CDLL

        def load(name: Any, *arguments: Any, **options: Any) -> ctypes.CDLL:
            path = str(self.path) if name == _NAME else name
            return original(path, *arguments, **options)

        ctypes.CDLL = load  # type: ignore[assignment,misc]
        try:
            yield
        finally:
            ctypes.CDLL = original  # type: ignore[misc]

    # ---- cupy_backends.cuda.libs.cusolver -------------------------------------------------------

    def spotrfBatched(  # noqa: N802
        self, handle: int, uplo: int, n: int, Aarray: int, lda: int, infoArray: int, batchSize: int
    ) -> None:
        self._potrf("s", handle, uplo, n, Aarray, lda, infoArray, batchSize)

    def dpotrfBatched(  # noqa: N802
        self, handle: int, uplo: int, n: int, Aarray: int, lda: int, infoArray: int, batchSize: int
    ) -> None:
        self._potrf("d", handle, uplo, n, Aarray, lda, infoArray, batchSize)

    def _potrf(
        self, letter: str, handle: int, uplo: int, n: int, a: int, lda: int, info: int, count: int
    ) -> None:
        if handle != self._handles.get("cusolver"):
            raise RuntimeError("CUSOLVER_STATUS_NOT_INITIALIZED")
        state.refuse_library("cuSOLVER")
        function = getattr(self.raw, f"host_{letter}potrf_batched")
        status = function(uplo, n, ctypes.c_void_p(a), lda, ctypes.c_void_p(info), count)
        if status:
            raise RuntimeError(f"cuSOLVER potrfBatched failed with status {status}: {self.problem}")
