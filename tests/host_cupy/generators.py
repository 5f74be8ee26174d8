"""`cupy.random` of the stand-in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from host_cupy import state
from host_cupy.array import ndarray
from host_cupy.functions import zeros


class _BitGenerator:
    """NumPy's Philox under CuPy's name: seeded, and other numbers than a GPU's."""

    def __init__(self, seed: Any = None, *, size: int = -1) -> None:
        state.refuse_capture("seeding a generator")
        # The state of every thread lies in device memory; CuPy draws 32 bits from the seed.
        self._state = zeros(8 * 256 * 132 * 64 if size < 0 else size * 64, np.int8)
        sequence = (
            seed if isinstance(seed, np.random.SeedSequence) else np.random.SeedSequence(seed)
        )
        self._host = np.random.Philox(int(sequence.generate_state(1, np.uint32)[0]))


class Philox4x3210(_BitGenerator):
    pass


class XORWOW(_BitGenerator):
    pass


class Generator:
    def __init__(self, bit_generator: _BitGenerator) -> None:
        self.bit_generator = bit_generator
        self._host = np.random.Generator(bit_generator._host)

    def _draw(self, draw: Callable[[Any], Any], size: Any, dtype: Any, out: Any) -> ndarray:
        if np.dtype(dtype) not in (np.float32, np.float64):
            raise TypeError(f"Unsupported dtype {np.dtype(dtype)}")
        if out is None:
            out = ndarray(() if size is None else size, dtype)
        state.counters.array_operations += 1
        target = out._host
        state.enqueue(lambda: np.copyto(target, draw(target.shape)))
        return out

    def standard_normal(
        self, size: Any = None, dtype: Any = np.float64, out: Any = None
    ) -> ndarray:
        return self._draw(lambda s: self._host.standard_normal(s, dtype), size, dtype, out)

    def random(self, size: Any = None, dtype: Any = np.float64, out: Any = None) -> ndarray:
        return self._draw(lambda s: self._host.random(s, dtype), size, dtype, out)
