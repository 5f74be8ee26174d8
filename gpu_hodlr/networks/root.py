"""The stored root: K = A^T A by its rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

from gpu_hodlr import batched
from gpu_hodlr.arrays import as_array
from gpu_hodlr.batched.tall import inner_in_double, inner_of_one
from gpu_hodlr.devices import Array, check_memory, move, namespace, namespace_on
from gpu_hodlr.distributed import ALONE, Communicator, shares
from gpu_hodlr.eigenbasis import LayerShape, Rotated, rotated_root
from gpu_hodlr.networks.access import Access
from gpu_hodlr.networks.functional import Functional
from gpu_hodlr.operators import Dual, Runs


class Root(Access):
    """K = A^T A with A (rows, N) stored as A^T: products, entries and diagonal by it.

    A row is a backward pass of one sample for one row of its root; afterwards the network is not
    needed.

    Args:
        functional: products of the same matrix.

    Raises:
        MemoryEstimateError: A does not fit.
    """

    name = "root"
    has_entries = has_eigenbasis = True

    def __init__(self, functional: Functional) -> None:
        super().__init__(functional.n, functional.dtype, functional.device)
        rows = functional.problem.rows
        check_memory(
            self.n * rows * self.dtype.itemsize, f"the root of {rows} x {self.n}",
            "the number of samples, or take entries='none'", self.device,
        )  # fmt: skip
        self._at = namespace_on(self.device).empty((self.n, rows), self.dtype)
        place = 0
        with functional.problem.network.plain():
            for part in functional.root_rows():
                self._at[:, place : place + len(part)] = as_array(part, "A").T
                place += len(part)
        assert place == rows
        self._runs = functional.runs()
        network = functional.problem.network
        shapes = (tuple(p.shape) for p in network.theta)
        self._layers = layer_shapes(zip(network.names, shapes, strict=True))
        self._costs()

    def _costs(self) -> None:
        rows = self._at.shape[1]
        self.product_cost, self.entry_cost = 4.0 * self.n * rows, 2.0 * rows

    def on(self, device: str) -> Root:
        """The same with A there."""
        moved = copy.copy(self)
        moved._at, moved.device = move(self._at, device), device
        return moved

    def summand(self, index: int, count: int) -> Root:
        """Some of the rows of A."""
        part = copy.copy(self)
        part._at = namespace(self._at).ascontiguousarray(
            self._at[:, shares(self._at.shape[1], count)[index]]
        )
        part._costs()
        part.has_eigenbasis = False
        return part

    def runs(self) -> Runs:
        """Unit by unit."""
        return self._runs

    def eigenbasis(self) -> Rotated:
        """K in the Kronecker-factored eigenbasis of the root's own moments.

        Raises:
            MemoryEstimateError: a second root does not fit.
        """
        return rotated_root(self._at, self._layers)

    def root(self) -> Array:
        """A^T, (N, rows)."""
        return self._at

    def dual(self) -> Dual:
        """Of the stored A."""
        return _Dual(self._at)

    @batched.one_blas_thread()
    def matmat(self, v: Array) -> Array:
        """A^T (A v)."""
        inner = inner_of_one(self._at, v)
        return batched.matmul(self._at[None], inner[None])[0]

    def blocks(self, rows: Array, cols: Array) -> Array:
        """Of gathered rows of A^T, one product a block."""
        xp = namespace(self._at)
        out = xp.empty((*rows.shape, cols.shape[1]), self.dtype)
        taken = (rows.shape[1] + cols.shape[1]) * self._at.shape[1] * self.dtype.itemsize
        together = batched.columns_at_once(self._at, max(1, taken))
        for start in range(0, len(out), together):
            part = slice(start, start + together)
            left, right = (batched.gather_rows(self._at, i[part]) for i in (rows, cols))
            out[part] = batched.matmul(left, right, transpose_b=True)
        return out

    def diagonal(self) -> Array:
        """Squared norms of the rows of A^T."""
        return batched.squared_norms(self._at).astype(self.dtype)

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array:
        """A^T Omega / sqrt(num)."""
        omega = batched.normal_source((seed,), self.device)((self._at.shape[1], num), self.dtype)
        omega = namespace(omega).ascontiguousarray(omega) / self.dtype.type(num**0.5)
        return batched.matmul(self._at[None], omega[None])[0]


class _Dual(Dual):
    """Of A^T (N, rows), stored."""

    def __init__(self, at: Array) -> None:
        super().__init__(at.shape[1], 2.0 * len(at) * float(at.shape[1]) ** 2)
        self._at = at

    @batched.one_blas_thread()
    def gram(self, comm: Communicator = ALONE.comm) -> Array:
        """See `Dual`: each rank multiplies some of the parameters."""
        own = self._at[shares(len(self._at), comm.size)[comm.rank]]
        gram = inner_in_double(own, own)
        return gram if comm.size == 1 else comm.allreduce(gram)

    def combine(self, w: Array) -> Array:
        """See `Dual`."""
        return batched.matmul(self._at[None], namespace(w).ascontiguousarray(w)[None])[0]


def layer_shapes(named: Iterable[tuple[str, tuple[int, ...]]]) -> list[LayerShape]:
    """Parameters as matrices (w, f), w their first axis, all others unfolded.

    A vector goes along as the bias of what stands before it in the same module and has as many
    units. What goes together is a matter of storage alone: any basis is right.

    Args:
        named: names and shapes, in order.
    """
    found: list[LayerShape] = []
    last = None  # module of the last one
    for name, shape in named:
        module = name.rpartition(".")[0]
        if len(shape) == 1 and found and module == last and found[-1].width == shape[0]:
            width, inputs, bias = found[-1]
            if not bias:
                found[-1] = LayerShape(width, inputs + 1, True)
                continue
        while len(shape) > 2 and shape[0] == 1:
            shape = shape[1:]  # a table of positions for all samples
        width = shape[0] if shape else 1
        if width and math.prod(shape):
            found.append(LayerShape(width, math.prod(shape[1:])))
            last = module
    return found
