"""What the curvature matrices of a network share: how they are read, and the ways to them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gpu_hodlr.arrays import check_dtype
from gpu_hodlr.checks import check_count
from gpu_hodlr.devices import Array, free_bytes, resolve_device
from gpu_hodlr.distributed import ALONE, Communicator
from gpu_hodlr.eigenbasis import Rotated
from gpu_hodlr.errors import ArgumentError, UnsupportedLayerError
from gpu_hodlr.networks.access import Access
from gpu_hodlr.networks.data import Data, Tree
from gpu_hodlr.networks.dense import Dense, column_operations, row_operations
from gpu_hodlr.networks.functional import Functional
from gpu_hodlr.networks.khatri_rao import KhatriRao
from gpu_hodlr.networks.layer_hessian import LayerHessian, LayerTerms
from gpu_hodlr.networks.layered import layered
from gpu_hodlr.networks.losses import Loss, read_loss
from gpu_hodlr.networks.metric import Metric
from gpu_hodlr.networks.model import Chosen, Model, Network, Output, Params, choose
from gpu_hodlr.networks.problem import read_problem
from gpu_hodlr.networks.root import Root
from gpu_hodlr.networks.unit_root import TrainedLinear, trained_linear, unit_root, unit_root_bytes
from gpu_hodlr.operators import Dual, Operator, Runs

if TYPE_CHECKING:
    import torch

    from gpu_hodlr.devices import AnyDevice, AnyDtype

ENTRIES = ("auto", "khatri-rao", "root", "dense", "none")
_SHARE = 4  # of the free memory, what is stored unasked
_QUICK = 2e7  # operations of a stored matrix's product that no product by torch is faster than
_COLUMNS = 1000  # that a compression multiplies with, about: what entries may cost


class CurvatureOperator(Operator):
    """A curvature matrix of a network, read through the way that suits it.

    Attributes:
        access: "khatri-rao", "root", "dense" or "none", see `entries` of the subclasses.
        num_samples: n.
        rank_bound: an upper bound of the rank; None where none is known.
        widened: the model's half precision, which is computed in float32; None where it has none.
    """

    num_samples: int
    rank_bound: int | None = None
    widened: str | None = None
    _access: Access

    def _read_through(self, reading: Reading, access: Access, device: AnyDevice | None) -> None:
        """Take a way to the matrix."""
        self.widened = reading.widened
        kind = access.device if device is None else resolve_device(device)
        if kind != access.device:
            access = access.on(kind)
        super().__init__(access.n, access.dtype, access.device)
        self._take(access)

    def _take(self, access: Access) -> None:
        self._access = access
        self.has_entries, self.has_eigenbasis = access.has_entries, access.has_eigenbasis
        self.product_cost, self.entry_cost = access.product_cost, access.entry_cost

    @property
    def access(self) -> str:
        """By what it is read."""
        return self._access.name

    @property
    def has_diagonal(self) -> bool:
        """Of the Hessian by products alone it costs N of them."""
        return self._access.has_diagonal

    @property
    def said(self) -> str:
        """With the way to it, which ranks with other free memory may choose differently."""
        return f"{super().said}, entries={self.access!r}"

    def __repr__(self) -> str:
        said = super().__repr__()
        if self.widened is not None:
            computed = f"{self.dtype} of a model in {self.widened}"
            said = said.replace(str(self.dtype), computed, 1)
        by = {
            "khatri-rao": "entries by Khatri-Rao products",
            "root": "entries by the stored root",
            "dense": "entries stored",
        }
        return said.replace("entries", by.get(self.access, "entries"), 1)

    def _move_data(self, device: str) -> None:
        self._take(self._access.on(device))

    def summand(self, index: int, count: int) -> Operator | None:
        """What a share of the samples contributes to K; for products.

        Example:
            >>> import torch
            >>> x = torch.arange(8.0).reshape(4, 2)
            >>> op = gh.GGNOperator(torch.nn.Sequential(torch.nn.Linear(2, 1)), "mse", x, x[:, :1])
            >>> v = torch.ones(3)
            >>> torch.allclose(sum(op.summand(i, 2) @ v for i in range(2)), op @ v)
            True
        """
        part = self._access.summand(index, count)
        if part is None:
            return None
        other = copy.copy(self)
        other._take(part)
        return other

    def runs(self) -> Runs:
        """Parameters unit by unit, a unit's bias beside its weights.

        Example:
            >>> import torch
            >>> x = torch.arange(8.0).reshape(4, 2)
            >>> op = gh.GGNOperator(torch.nn.Sequential(torch.nn.Linear(2, 2)), "mse", x, x)
            >>> op.runs().permutation  # a unit's two weights and its bias, unit by unit
            array([0, 1, 4, 2, 3, 5])
        """
        return self._access.runs() or super().runs()

    def root(self) -> Array | None:
        """A^T (N, rows) of K = A^T A, where it is stored; else None.

        Example:
            >>> import torch
            >>> x = torch.arange(8.0).reshape(4, 2)
            >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1))
            >>> gh.GGNOperator(model, "mse", x, x[:, :1], entries="root").root().shape
            (3, 4)
        """
        return self._access.root()

    def dual(self) -> Dual | None:
        """A of K = A^T A by A A^T, the neural tangent kernel, and A^T w; A is not stored for it.

        Example:
            >>> import torch
            >>> x = torch.arange(8.0).reshape(4, 2)
            >>> op = gh.GGNOperator(torch.nn.Sequential(torch.nn.Linear(2, 1)), "mse", x, x[:, :1])
            >>> A_transpose = op.dual().combine(np.eye(4, dtype=np.float32))  # (3, 4)
            >>> np.allclose(A_transpose @ A_transpose.T, op.to_dense())
            True
        """
        return self._access.dual()

    def eigenbasis(self) -> Rotated | None:
        """K in the Kronecker-factored eigenbasis of its layers (George et al., NeurIPS 2018).

        Raises:
            MemoryEstimateError: the network's Jacobian in it does not fit.

        Example:
            >>> import torch
            >>> x = torch.arange(8.0).reshape(4, 2)
            >>> op = gh.GGNOperator(torch.nn.Sequential(torch.nn.Linear(2, 2)), "mse", x, x)
            >>> op.eigenbasis().basis.n  # of one layer under "mse" nothing is left off the diagonal
            6
        """
        return self._access.eigenbasis()

    def gram_vectors(self, num: int, seed: int, comm: Communicator = ALONE.comm) -> Array | None:
        """X = A^T Omega / sqrt(num) for K = A^T A and Gaussian Omega; None where it costs too much.

        Example:
            >>> import torch
            >>> x = torch.arange(8.0).reshape(4, 2)
            >>> op = gh.GGNOperator(torch.nn.Sequential(torch.nn.Linear(2, 1)), "mse", x, x[:, :1])
            >>> op.gram_vectors(16, seed=0).shape
            (3, 16)
        """
        return self._access.gram_vectors(num, seed, comm)

    def _matmat(self, v: Array) -> Array:
        return self._access.matmat(v)

    def _matmat_by_blocks(self, v: Array, width: int) -> Array:
        return self._access.matmat_by_blocks(v, width)

    def _blocks(self, rows: Array, cols: Array) -> Array:
        return self._access.blocks(rows, cols)

    def _diagonal(self) -> Array:
        return self._access.diagonal()


class Reading:
    """The arguments of a curvature matrix, read and checked.

    Args:
        model, loss, inputs, targets, params, output, reduction, num_data, dtype, entries, seed: see
            `GGNOperator`.
        allowed: of `ENTRIES` those that the matrix has.

    Attributes:
        loss: as a sum over samples.
        widened: see `CurvatureOperator`.

    Raises:
        ArgumentError, DtypeError, ShapeError, DeviceError, UnsupportedLayerError: says which
            argument cannot be used.
    """

    def __init__(
        self,
        model: Model,
        loss: object,
        inputs: Tree,
        targets: Tree,
        *,
        params: Params,
        output: Output,
        reduction: str | None,
        num_data: int | None,
        dtype: AnyDtype | None,
        entries: str,
        seed: int,
        allowed: tuple[str, ...] = ENTRIES,
    ) -> None:
        if entries not in allowed:
            raise ArgumentError(f"entries must be one of {', '.join(allowed)}, got {entries!r}")
        if num_data is not None:
            check_count(num_data, "num_data")
        self.entries, self.num_data = entries, num_data
        self.seed = check_count(seed, "seed", least=0)
        self._chosen = choose(model, params)
        self.loss: Loss = read_loss(loss, reduction)
        kind = kind_of(self._chosen, dtype)
        self.widened = _half_precision(self._chosen)
        self.network = Network.of(self._chosen, output, kind)
        self.data = Data(inputs, targets, kind, self.network.place)

    def by_layers(self) -> KhatriRao | None:
        """By the layers, where the model is of Linear layers and activations.

        Raises:
            UnsupportedLayerError: that is asked for, and a parameter is of another layer.
        """
        if self.entries not in ("auto", "khatri-rao"):
            return None
        forced = self.entries == "khatri-rao" and self._linear is None
        found = layered(
            self._chosen, self.data, self.loss, self.num_data, self.network, forced=forced
        )
        return None if found is None else KhatriRao(found.layers, found.hessian)

    def hessian(self) -> tuple[Access, int]:
        """The way to the exact Hessian, and how many samples there are.

        Products are by the layers where these are known; not of data that are streamed, of which
        nothing is kept.
        """
        functional = self.functional(None)
        access, num_samples = self.best(functional), functional.problem.num_samples
        if access is not functional or self.data.streamed or not self.loss.convex:
            return access, num_samples
        found = layered(
            self._chosen, self.data, self.loss, self.num_data, self.network, second=True
        )
        if found is not None:
            access = LayerHessian(functional, LayerTerms.of_network(found))
        return access, num_samples

    @cached_property
    def _linear(self) -> list[TrainedLinear] | None:
        return trained_linear(self._chosen)

    def functional(self, metric: Metric | None) -> Functional:
        """Products by torch, of which the other ways are made."""
        return Functional(
            read_problem(self.network, self.data, self.loss, metric, self.num_data, self.seed)
        )

    def best(self, functional: Functional) -> Access:
        """The way that was asked for, or else the cheapest.

        Raises:
            UnsupportedLayerError: layers were asked for that are not called once a sample.
        """
        ways: dict[str, Callable[[], Access]] = {
            "khatri-rao": lambda: self._by_units(functional),
            "root": lambda: Root(functional),
            "dense": lambda: Dense(functional),
            "none": lambda: functional,
        }
        if self.entries != "auto":
            return ways[self.entries]()
        linear = self._linear if functional.problem.metric is not None else None
        try:
            return ways[_cheapest(functional, linear)]()
        except UnsupportedLayerError:
            return ways[_cheapest(functional, None)]()

    def _by_units(self, functional: Functional) -> Access:
        if self._linear is None:
            raise UnsupportedLayerError(
                "entries='khatri-rao' needs all parameters in Linear layers, each in one place"
            )
        return unit_root(functional, self._linear)


def _cheapest(functional: Functional, linear: list[TrainedLinear] | None) -> str:
    """By bytes and operations.

    A root, of parameters or of units, and a matrix that take no more than a quarter of the free
    memory, to make no more than the products of a compression, and whose products cost no more than
    those by torch: the root of many outputs (a language model's tokens) is far from that. Of them
    the smallest.

    Args:
        functional: products of the matrix.
        linear: its layers, where all are Linear.
    """
    problem, n, size = functional.problem, functional.n, functional.dtype.itemsize
    room = free_bytes(functional.device) / _SHARE
    affordable = _COLUMNS * functional.product_cost
    product = max(functional.product_cost, _QUICK)
    ways = {"dense": 2.0 * n * n * size}
    cost = {"dense": min(row_operations(functional), column_operations(functional))}
    if problem.metric is not None:
        ways["root"] = float(n) * problem.rows * size
        cost["root"] = 4.0 * problem.rows * problem.sample_flops
    multiplied = {"dense": 2.0 * n * n, "root": 4.0 * n * problem.rows}
    if linear is not None:
        ways["khatri-rao"] = unit_root_bytes(functional, linear)
        cost["khatri-rao"] = cost["root"]
        units = sum(layer.module.out_features for layer in linear)
        multiplied["khatri-rao"] = 4.0 * (n * problem.num_samples + units * problem.rows)
    fits = [
        way
        for way in ways
        if ways[way] <= room and cost[way] <= affordable and multiplied[way] <= product
    ]
    return min(fits, key=ways.__getitem__, default="none")


def kind_of(chosen: Chosen, dtype: AnyDtype | None) -> torch.dtype:
    """Float32 or float64, in which everything is computed: by default of the widest parameter.

    Raises:
        DtypeError: another dtype.
    """
    import torch

    if dtype is None:
        wide = any(p.dtype is torch.float64 for p in chosen.named.values())
        return torch.float64 if wide else torch.float32
    found = check_dtype(dtype, "dtype")
    return torch.float64 if found == np.float64 else torch.float32


def check_convex(loss: Loss) -> None:
    """Refuse a loss that has no Gauss-Newton matrix.

    Raises:
        ArgumentError: it is not convex in the outputs.
    """
    if not loss.convex:
        raise ArgumentError(
            f"loss {loss.name!r} is not convex in the outputs, and no Gauss-Newton matrix is known "
            "for it: gh.HessianOperator takes it"
        )


def _half_precision(chosen: Chosen) -> str | None:
    """The first floating dtype of less than 32 bits in a model."""
    every = (*chosen.named.values(), *chosen.fixed.values())
    half = [x.dtype for x in every if x.is_floating_point() and x.dtype.itemsize < 4]
    return str(half[0]).removeprefix("torch.") if half else None


def placed_by_position(
    old: tuple[object, ...], dtype: AnyDtype | None, device: AnyDevice | None
) -> tuple[AnyDtype | None, AnyDevice | None]:
    """Dtype and device where they were given by position, as they could be once.

    Raises:
        TypeError: more arguments.
    """
    if not old:
        return dtype, device
    if len(old) > 2:
        raise TypeError(
            f"GGNOperator takes model, loss, inputs, targets by position, got {4 + len(old)}"
        )
    warnings.warn(
        "GGNOperator: dtype and device by position will not be taken any more: write dtype=, "
        "device=",
        DeprecationWarning,
        stacklevel=3,
    )
    given = [*old, device] if len(old) == 1 else [*old]
    return given[0], given[1]
