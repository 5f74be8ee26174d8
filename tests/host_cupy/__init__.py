"""CuPy on the host: a test aid that lets the CUDA path of gpu_hodlr run without a GPU.

It is NOT a GPU run. `installed()` puts modules named cupy in the place of CuPy: arrays lie in
NumPy memory, raw kernels go to tests/host_cuda, which executes their source, cuBLAS calls to a
small library with cuBLAS's C interface, and a captured graph is a list of what was asked for,
done again on the same memory.

It shows that the path asks CuPy only for what CuPy has, with arguments of the right kinds, that
nothing is copied or waited for unseen (what CuPy refuses is refused, the rest is counted), that
operands of cuBLAS lie in device memory, that nothing is read before it is written (memory starts
as NaN), that cuBLAS has a workspace of ours in a capture, that a graph is dropped after what it was
launched for has been waited for, and that the results are right. It cannot show what a GPU does:
compiled code, races within a kernel's weaker memory or between streams, cuBLAS's own rounding and
its algorithms, alignment, speed, memory that a driver would need beside the arrays.

Stricter than CuPy: an index outside its axis is an error (CuPy wraps around), as is assigning an
element twice, indexing with lists or host arrays, NumPy's functions on device arrays, a grid with
a 0 (CuPy launches one block), cudaMalloc during a capture (CuPy's default mode allows it).
"""

from __future__ import annotations

from host_cupy.install import HostCupy, installed
from host_cupy.state import counters

__all__ = ["HostCupy", "counters", "installed"]
