"""Products alone: every one goes through the network again, batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import as_array, tensor_of
from gpu_hodlr.devices import Array, namespace, namespace_on
from gpu_hodlr.distributed import ALONE, Communicator, shares
from gpu_hodlr.errors import DeviceError
from gpu_hodlr.networks.access import Access, chunk_of_blocks
from gpu_hodlr.networks.data import Batch
from gpu_hodlr.networks.problem import Problem
from gpu_hodlr.operators import Dual, Runs

if TYPE_CHECKING:
    import torch

_PASSES = 8.0  # evaluations that a product with one column costs: J t twice, J^T e twice, and two
_KEPT_BYTES = 1 << 25  # of what reverse mode keeps of all samples, for the next product
_MOST_ROOT = 1024  # rows of a sample's root that random vectors are drawn for


class Functional(Access):
    """K v for K = scale sum_k J_k^T M_k J_k, or the exact Hessian.

    Memory does not grow with the data: batches are read again at every product. Of few samples that
    are in memory the first evaluation is kept, for methods that multiply by a column at a time.

    Args:
        problem: the network at its data.
    """

    name = "none"

    def __init__(self, problem: Problem) -> None:
        dtype = np.dtype(str(problem.network.theta[0].dtype).removeprefix("torch."))
        super().__init__(problem.n, dtype, problem.network.place.type)
        self.problem = problem
        self._kept: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.product_cost = _PASSES * problem.sample_flops * problem.num_samples

    def __getstate__(self) -> dict[str, Any]:
        """Copies evaluate for themselves."""
        return {**vars(self), "_kept": None}

    def on(self, device: str) -> Functional:
        """The same with the network and its data there."""
        import torch

        if device == "cuda" and not torch.cuda.is_available():
            raise DeviceError(
                "device 'cuda': products of a network by torch need a torch with CUDA, which this "
                "one is not; entries='root' or 'dense' need it only where the network is"
            )
        moved = copy.copy(self)
        moved.problem = self.problem.on(torch.device(device))
        moved.device = device
        return moved

    def summand(self, index: int, count: int) -> Functional | None:
        """Of every batch a share of the samples, where all ranks see the same batches."""
        if not self.problem.data.ordered:
            return None
        part = copy.copy(self)
        part.problem = self.problem.share(index, count)
        return part

    def runs(self) -> Runs:
        """Unit by unit."""
        return self.problem.network.runs()

    def matmat(self, v: Array) -> Array:
        """K v, many columns at once."""
        return self._products(v, v.shape[1])

    def matmat_by_blocks(self, v: Array, width: int) -> Array:
        """In chunks that cut no block: the shapes are the same for every number of blocks."""
        return self._products(v, width)

    def _products(self, v: Array, width: int) -> Array:
        """K v, where `width` columns, or as many as fit that divide it, go through together."""
        import torch

        if not v.shape[1]:
            return v.copy()
        xp = namespace(v)
        with self.problem.network.plain():
            vt = tensor_of(xp.ascontiguousarray(v.T))
            total = torch.zeros_like(vt)
            for piece in self.problem.pieces():
                chunk = chunk_of_blocks(width, self.problem.columns(piece.size))
                product = self._kept_product_of(piece)
                for start in range(0, len(vt), chunk):
                    total[start : start + chunk] += product(vt[start : start + chunk])
            total *= self.problem.scale
        return xp.ascontiguousarray(as_array(total, "K v").T)

    def _kept_product_of(self, piece: Batch) -> Callable[[torch.Tensor], torch.Tensor]:
        """The same as `_product_of`, which says what of."""
        problem = self.problem
        large = problem.num_samples * problem.sample_bytes > _KEPT_BYTES
        if problem.data.streamed or piece.size < problem.num_samples or large:
            return self._product_of(piece)
        if self._kept is None:
            self._kept = self._product_of(piece)
        return self._kept

    def _product_of(self, piece: Batch) -> Callable[[torch.Tensor], torch.Tensor]:
        """(k, N) -> (k, N) of some samples, without the scale."""
        problem, metric = self.problem, self.problem.metric
        if metric is None:
            return problem.derivatives.hessian(
                problem.network,
                lambda theta: problem.loss.value(
                    problem.network(theta, piece.inputs), piece.targets
                ),
            )
        outputs, push, pull = problem.derivatives.linearized(problem.network, piece)
        outputs = outputs.detach()
        return lambda vt: pull(metric.matmat(outputs, piece, push(vt)))

    def root_rows(self) -> Iterator[torch.Tensor]:
        """Rows of A with K = A^T A, (rows, N) at a time.

        Every sample has rows of its own: one backward pass each. Within `Network.plain`.
        """
        problem, metric = self.problem, self.problem.metric
        assert metric is not None  # the Hessian has no root
        for piece in problem.pieces():
            outputs = problem.outputs(piece)
            size = metric.size(outputs, piece)
            samples = max(1, problem.columns(1) // size)
            for part in piece.pieces(samples):
                root = metric.root(problem.outputs(part), part) * problem.scale**0.5
                most = max(1, problem.columns(part.size))
                for start in range(0, size, most):
                    rows = problem.derivatives.rows(
                        problem.network, part, root[:, start : start + most]
                    )
                    yield rows.detach().reshape(-1, self.n)

    @property
    def has_diagonal(self) -> bool:
        """Whether rows of the root cost less than products with all unit vectors."""
        return self.problem.metric is not None and self.problem.root_size < self.n

    def diagonal(self) -> Array:
        """From rows of the root, or products with unit vectors; neither is kept."""
        import torch

        if self.has_diagonal:
            with self.problem.network.plain():
                total = torch.zeros_like(self.problem.network.joined(_one(self.problem)))[0]
                for rows in self.root_rows():
                    total += (rows * rows).sum(dim=0)
            return as_array(total, "diagonal")
        xp = namespace_on(self.device)
        found = xp.empty(self.n, self.dtype)
        for start, columns in self.unit_products():
            stop = start + columns.shape[1]
            found[start:stop] = columns[start:stop].diagonal()
        return found

    def unit_products(self) -> Iterator[tuple[int, Array]]:
        """Columns of K, some at a time: where they start, and (N, columns)."""
        xp = namespace_on(self.device)
        most = max(1, min(self.n, self.problem.columns(1)))
        for start in range(0, self.n, most):
            columns = min(most, self.n - start)
            yield start, self.matmat(xp.eye(self.n, columns, -start, self.dtype))

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array | None:
        """X = A^T Omega / sqrt(num) for K = A^T A and Gaussian Omega: a backward pass.

        Every rank draws and takes back a share of Omega's columns.
        """
        metric = self.problem.metric
        if metric is None or self.problem.root_size > _MOST_ROOT:
            return None
        xp, device, dtype = namespace_on(self.device), self.device, self.dtype
        parts = shares(num, comm.size)
        part = parts[comm.rank]
        places = count()

        def drawn(rows: int) -> torch.Tensor:
            omega = batched.normal_source((seed, next(places)), device)((rows, num), dtype, part)
            return tensor_of(xp.ascontiguousarray(omega.T))

        own = self.root_transpose_matmat(part.stop - part.start, drawn)
        own /= num**0.5
        return comm.allgather(as_array(own, "X"), [p.stop - p.start for p in parts]).T

    def root_transpose_matmat(self, columns: int, w: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """(A^T w)^T, (columns, N): a backward pass.

        Args:
            columns: of w.
            w: gives the next so many rows of it, transposed, (columns, rows).
        """
        import torch

        problem, metric = self.problem, self.problem.metric
        assert metric is not None  # the Hessian has no root
        with problem.network.plain():
            own = torch.zeros_like(problem.network.joined(_one(problem))).expand(columns, -1)
            own = own.clone()
            for piece in problem.pieces():
                outputs, _, pull = problem.derivatives.linearized(problem.network, piece)
                outputs = outputs.detach()
                size = metric.size(outputs, piece)
                mine = w(piece.size * size).reshape(columns, piece.size, size)
                chunk = problem.columns(piece.size)
                for start in range(0, columns, chunk):
                    e = metric.root_transpose_matmat(outputs, piece, mine[start : start + chunk])
                    own[start : start + chunk] += pull(e)
            own *= problem.scale**0.5
        return own

    def root_matmat(self, vt: torch.Tensor) -> torch.Tensor:
        """(A v)^T, (columns, rows), for v^T (columns, N): a forward pass. In `Network.plain`."""
        import torch

        problem, metric = self.problem, self.problem.metric
        assert metric is not None
        parts = []
        for piece in problem.pieces():
            outputs, push, _ = problem.derivatives.linearized(problem.network, piece)
            root = metric.root(outputs.detach(), piece).flatten(2)
            z = push(vt).reshape(len(vt), piece.size, -1)
            parts.append(torch.einsum("nrd,knd->knr", root, z).flatten(1))
        return torch.cat(parts, dim=1) * problem.scale**0.5

    def dual(self) -> Dual | None:
        """Rows of A by backward passes, and what A makes of them by forward ones; none is kept.

        None where batches may come in another order at every pass.
        """
        known = self.problem.metric is not None and self.problem.data.ordered
        return _Dual(self) if known else None


class _Dual(Dual):
    """Of products alone: a forward pass over all samples for every row of A.

    Args:
        functional: products of the same matrix.
    """

    def __init__(self, functional: Functional) -> None:
        rows = functional.problem.rows
        super().__init__(rows, rows * functional.product_cost / 2)
        self._functional = functional

    def gram(self, comm: Communicator = ALONE.comm) -> Array:
        """See `Dual`: the ranks multiply by some rows each."""
        import torch

        functional = self._functional
        network = functional.problem.network
        place = 0
        with network.plain():
            total = torch.zeros(self.rows, self.rows, dtype=torch.float64, device=network.place)
            for index, rows in enumerate(functional.root_rows()):
                if index % comm.size == comm.rank:
                    total[place : place + len(rows)] = functional.root_matmat(rows)
                place += len(rows)
        assert place == self.rows
        gram = as_array((total + total.T) / 2, "A A^T")
        return gram if comm.size == 1 else comm.allreduce(gram)

    def combine(self, w: Array) -> Array:
        """See `Dual`."""
        wt = tensor_of(namespace(w).ascontiguousarray(w.T))
        place = 0

        def rows(number: int) -> torch.Tensor:
            nonlocal place
            place += number
            return wt[:, place - number : place]

        return as_array(self._functional.root_transpose_matmat(len(wt), rows), "A^T w").T


def _one(problem: Problem) -> tuple[torch.Tensor, ...]:
    """The parameters as a column."""
    return tuple(p[None] for p in problem.network.theta)
