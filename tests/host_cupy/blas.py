"""cuBLAS called through ctypes as the package does, for tests."""

from __future__ import annotations

import ctypes
from types import ModuleType

import numpy as np


class Blas:
    """cuBLAS through ctypes, as the package calls it, on column-major operands of any layout."""

    def __init__(self, cp: ModuleType, dtype: type) -> None:
        self.cp, self.dtype = cp, dtype
        self.library = ctypes.CDLL("libcublas.so.12")
        self.handle = ctypes.c_void_p(cp.cuda.device.get_cublas_handle())
        self.rtol = 1e-4 if dtype == np.float32 else 1e-12

    def __call__(self, name: str, *arguments) -> int:
        pointer = ctypes.c_void_p(self.cp.cuda.get_current_stream().ptr)
        assert self.library.cublasSetStream_v2(self.handle, pointer) == 0
        letter = "S" if self.dtype == np.float32 else "D"
        return getattr(self.library, f"cublas{letter}{name}")(self.handle, *arguments)

    def number(self, value: float):
        kind = ctypes.c_float if self.dtype == np.float32 else ctypes.c_double
        return ctypes.byref(kind(value))

    def store(self, stack: np.ndarray, gap: int, space: int):
        """Column-major with `gap` more rows and `space` values between: array, ld, stride."""
        count, m, n = stack.shape
        ld = m + gap
        stride = ld * n + space
        flat = np.full(count * stride, np.nan, self.dtype)
        self.matrices(flat, stack.shape, ld, stride)[...] = stack
        return self.cp.asarray(flat), ld, ctypes.c_longlong(stride)

    @staticmethod
    def matrices(flat: np.ndarray, shape, ld: int, stride: int) -> np.ndarray:
        item = flat.itemsize
        return np.lib.stride_tricks.as_strided(flat, shape, (stride * item, item, ld * item))

    def load(self, stored, shape) -> np.ndarray:
        x, ld, stride = stored
        return self.matrices(x.get(), shape, ld, stride.value)

    def random(self, *shape: int) -> np.ndarray:
        return np.random.default_rng(len(shape)).standard_normal(shape).astype(self.dtype)


def address(x) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data.ptr)
