"""Products alone: every one goes through the network again, batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gpu_hodlr import batched
from gpu_hodlr.arrays import as_array, tensor_of
from gpu_hodlr.devices import Array, namespace, namespace_on
from gpu_hodlr.distributed import ALONE, Communicator, shares
from gpu_hodlr.errors import DeviceError
from gpu_hodlr.networks.access import Access
from gpu_hodlr.networks.data import Batch
from gpu_hodlr.networks.problem import Problem
from gpu_hodlr.operators import Runs

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
                most = min(self.problem.columns(piece.size), width)
                chunk = max(c for c in range(1, most + 1) if width % c == 0)
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
        import torch

        metric = self.problem.metric
        if metric is None or self.problem.root_size > _MOST_ROOT:
            return None
        xp = namespace_on(self.device)
        part = shares(num, comm.size)[comm.rank]
        place = 0
        with self.problem.network.plain():
            own = torch.zeros_like(self.problem.network.joined(_one(self.problem)))
            own = own.expand(part.stop - part.start, -1).clone()
            for piece in self.problem.pieces():
                outputs, _, pull = self.problem.derivatives.linearized(self.problem.network, piece)
                outputs = outputs.detach()
                normal = batched.normal_source((seed, place), self.device)
                size = metric.size(outputs, piece)
                omega = normal((piece.size * size, num), self.dtype, part)
                w = tensor_of(xp.ascontiguousarray(omega.T)).reshape(-1, piece.size, size)
                chunk = self.problem.columns(piece.size)
                for start in range(0, len(own), chunk):
                    e = metric.root_transpose_matmat(outputs, piece, w[start : start + chunk])
                    own[start : start + chunk] += pull(e)
                place += 1
            own *= (self.problem.scale / num) ** 0.5
        sizes = [p.stop - p.start for p in shares(num, comm.size)]
        return comm.allgather(as_array(own, "X"), sizes).T


def _one(problem: Problem) -> tuple[torch.Tensor, ...]:
    """The parameters as a column."""
    return tuple(p[None] for p in problem.network.theta)
