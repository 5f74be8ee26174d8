"""A matrix that is sparse in a Kronecker-factored basis: K = Q (D + S + S^T + P C P^T) Q^T + E."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr import batched
from gpu_hodlr.arrays import FLOATS
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import ALONE, Communicator, OrderedSum, Ownership
from gpu_hodlr.eigenbasis import KroneckerBasis, LayerBasis
from gpu_hodlr.once import once
from gpu_hodlr.structures.stored import Part, Ranks, Source, Stack
from gpu_hodlr.structures.structure import Map, Structure
from gpu_hodlr.tree import rows_tree

_FEATURES = 64  # rows of V at once, for the diagonal


@dataclass(frozen=True, repr=False)
class RotatedSparse(Structure):
    """D diagonal, S strictly lower triangular and sparse, P C P^T of low rank, E diagonal.

    Outside the range of Q, (N, M) with orthonormal columns, K is what the basis says. Rows of S
    are dealt out to the ranks in parts that do not depend on their number; where there is one part
    every rank has it. All else is on every rank, but for E.

    Attributes:
        basis: Q.
        D: (M,).
        starts: (rows + 1,) where each of this rank's rows of S starts in the next two.
        columns: (entries,) uint16 where M has room in it, else int32.
        values: (entries,).
        cuts: (parts + 1,) the first row of S of every part, and M: no unit is cut in two; a host
            array.
        P: (M, r) orthonormal columns; r may be 0.
        C: (r,).
        E: (N,) in the user's order, or this rank's rows of it; None for none.
        owners: see `Structure`.
    """

    BY_ROWS = ("E",)

    basis: KroneckerBasis
    D: Array
    starts: Array
    columns: Array
    values: Array
    cuts: HostIndex
    P: Array
    C: Array
    E: Array | None = None
    owners: Ownership = field(default=ALONE, kw_only=True)

    @property
    def n(self) -> int:
        """N."""
        return self.basis.n

    @property
    def leaves(self) -> Array:  # type: ignore[override]  # a field elsewhere
        """A single leaf."""
        return namespace(self.D).arange(self.owners.num_rows(self.n))[None]

    @property
    def ranks(self) -> tuple[tuple[int, ...], ...]:
        """See `Structure`: that of the low-rank part."""
        return ((len(self.C),),)

    # --- products ------------------------------------------------------------------------------

    def matmat(self, v: Array) -> Array:
        """See `Structure`; every rank rotates the whole vectors."""
        owners = self.owners
        product = owners.take(self.basis.matmat(self.core, owners.whole(v)))
        if self.E is not None:
            product = product + self.E[:, None] * v
        return product

    def core(self, c: Array) -> Array:
        """(D + S + S^T + P C P^T) c for c (M, k), the same on every rank."""
        product = self.D[:, None] * c
        product += next(self._terms(c)) if self.whole else self._sum(self._terms(c), c)
        if len(self.C):
            inner = batched.matmul(self.P[None], c[None], transpose_a=True)
            inner *= self.C[:, None]
            batched.matmul(self.P[None], inner, add_to=product[None])
        return product

    @property
    def whole(self) -> bool:
        """Whether every rank has all of S."""
        return len(self.cuts) == 2

    @property
    def own(self) -> slice:
        """The parts of this rank."""
        return slice(0, 1) if self.whole else self._sum.own

    @cached_property
    def _sum(self) -> OrderedSum:
        return OrderedSum(self.owners.comm, len(self.cuts) - 1, self.basis.size)

    def _terms(self, c: Array) -> Iterator[Array]:
        """Of every part of this rank, its rows of S c and what they add to S^T c."""
        for rows, part in self._parts:
            term = part.transposed_matmul(c[rows])
            term[rows] += part.matmul(c)
            yield term

    @cached_property
    def _parts(self) -> list[tuple[slice, batched.SparseRows]]:
        """Which rows of S, and these, of every part of this rank."""
        own, parts = self.cuts[self.own.start : self.own.stop + 1].tolist(), []
        first = own[0]
        for cut, here in zip(pairwise(own), pairwise(self._edges), strict=True):
            rows = slice(*cut)
            starts = self.starts[rows.start - first : rows.stop - first + 1] - here[0]
            some = slice(*here)
            parts.append((rows, batched.sparse_rows(
                starts, self.columns[some], self.values[some], self.basis.size
            )))  # fmt: skip
        return parts

    @cached_property
    def _edges(self) -> list[int]:
        """Where this rank's parts start in `values`."""
        cuts = self.cuts[self.own.start : self.own.stop + 1]
        return [int(s) for s in to_host(self.starts)[cuts - cuts[0]]]

    # --- the diagonal ----------------------------------------------------------------------------

    def diagonal(self) -> Array:
        """See `Structure`.

        With U the units of a layer, V its features, and S_ab the block of units a and b:
        sum_a U[u, a]^2 sum_i V[f, i]^2 D_ai + 2 sum_ab U[u, a] U[u, b] (V S_ab V^T)_ff, which costs
        as many operations as S has entries, times features.
        """
        blocks = [
            namespace(self.D).zeros((layer.units, layer.units, layer.inputs), self.D.dtype)
            for layer in self.basis.layers
        ]
        self._add_diagonals(blocks)
        parts = []
        for index, layer in enumerate(self.basis.layers):
            h = blocks[index] if self.whole else self.owners.sum(blocks[index])
            parts.append(layer.written(self._layer_diagonal(index, h)[None])[0])
        diagonal = namespace(self.D).concatenate(parts)
        if len(self.C):
            diagonal += (self.basis.rotate_back(self.P) ** 2) @ self.C
        diagonal = self.owners.take(diagonal)
        return diagonal if self.E is None else diagonal + self.E

    def _layer_diagonal(self, index: int, h: Array) -> Array:
        """(w, f) from h[a, b] = diag(V S_ab V^T)."""
        xp, layer = namespace(h), self.basis.layers[index]
        r, f, V2 = layer.units, layer.inputs, layer.V**2
        own = slice(*self.basis.firsts[index : index + 2].tolist())
        within = self.D[own].reshape(r, layer.features) @ V2.T
        h = h + h.transpose(1, 0, 2)
        unit = xp.arange(r)
        h[unit, unit] += within
        if layer.U is None:
            return h[unit, unit]
        result = xp.empty((layer.width, f), h.dtype)
        for u in range(0, layer.width, _FEATURES):  # U h U^T, some rows of U at a time
            some = layer.U[u : u + _FEATURES]
            half = (some @ h.reshape(r, r * f)).reshape(len(some), r, f)
            result[u : u + _FEATURES] = (some[:, :, None] * half).sum(axis=1)
        if layer.tail is not None:
            missing = 1 - (layer.U**2).sum(axis=1)
            result += missing[:, None] * (V2 @ layer.tail)
        return result

    def _add_diagonals(self, blocks: list[Array]) -> None:
        """To h[a, b] of every layer, those of this rank's rows of S, unit by unit."""
        firsts, row = self.basis.firsts, int(self.cuts[self.own.start])
        starts = to_host(self.starts)
        begin, end = row, int(self.cuts[self.own.stop])
        while row < end:
            index = int(np.searchsorted(firsts, row, side="right")) - 1
            layer, first = self.basis.layers[index], int(firsts[index])
            g, unit = layer.features, (row - first) // layer.features
            edges = starts[row - begin : row - begin + g + 1]
            here = slice(int(edges[0]), int(edges[-1]))
            part = batched.sparse_rows(
                self.starts[row - begin : row - begin + g + 1] - here.start,
                self.columns[here], self.values[here], self.basis.size,
            )  # fmt: skip
            own = slice(first, first + (unit + 1) * g)
            for i in range(0, layer.inputs, _FEATURES):
                some = namespace(layer.V).ascontiguousarray(layer.V[i : i + _FEATURES].T)
                turned = part.transposed_matmul(some)[own].reshape(unit + 1, g, -1)
                blocks[index][unit, : unit + 1, i : i + _FEATURES] += (turned * some).sum(axis=1)
            row += g

    # --- what is stored --------------------------------------------------------------------------

    def arrays(self) -> list[Array]:
        """See `Structure`."""
        E = [] if self.E is None else [self.E]
        return [self.D, self.values, self.P, self.C, *self.basis.arrays(), *E]

    def index_arrays(self) -> list[Any]:
        """See `Structure`."""
        return [self.starts, self.columns, self.cuts]

    @property
    def num_stored(self) -> int:
        """See `Structure`; Q is counted, and an index by its bytes, of 8 that are a number."""
        dense = [self.D, self.P, self.C, *self.basis.arrays()]
        floats = sum(a.size for a in dense) + (0 if self.E is None else self.n) + self.entries
        return int(floats + (self.columns.itemsize * self.entries + 4 * self.basis.size) // 8)

    @once
    def entries(self) -> int:
        """Of S, on all ranks."""
        own = int(self.values.size)
        return own if self.whole else int(sum(self.owners.comm.share(own)))

    def all_rows(self) -> tuple[Array, Array, Array]:
        """All of S on every rank: lengths of the rows, columns and values."""
        lengths = namespace(self.D).ascontiguousarray(self.starts[1:] - self.starts[:-1])
        comm = ALONE.comm if self.whole else self.owners.comm
        return gathered(comm, lengths, self.columns, self.values)

    def scaled(self, factor: float) -> Self:
        """See `Structure`."""
        number = self.D.dtype.type(factor)
        return replace(
            self, basis=self.basis.scaled(factor), D=self.D * number, values=self.values * number,
            C=self.C * number, E=None if self.E is None else self.E * number,
        )  # fmt: skip

    def plus_diagonal(self, d: Array) -> Self:
        """See `Structure`."""
        d = d.astype(self.D.dtype)
        return replace(self, E=d if self.E is None else self.E + d)

    def astype(self, dtype: DTypeLike) -> Self:
        """See `Structure`; of a wider type the basis is orthonormal to its precision."""
        cast = super().astype(dtype)
        if np.finfo(cast.dtype).eps >= np.finfo(self.dtype).eps:
            return cast
        return replace(cast, basis=cast.basis.orthonormal())

    def _mapped(self, floats: Map, indices: Map) -> Self:
        return replace(
            self, basis=self.basis.mapped(floats), D=floats(self.D), starts=indices(self.starts),
            columns=indices(self.columns), values=floats(self.values), P=floats(self.P),
            C=floats(self.C), E=None if self.E is None else floats(self.E),
        )  # fmt: skip

    # --- files -----------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """See `Stored`; S is brought together, all ranks have all of it."""
        lengths, columns, values = self.all_rows()
        arrays = {
            "D": self.D, "lengths": lengths, "columns": columns, "values": values,
            "cuts": self.cuts, "P": self.P, "C": self.C, "layers": self.basis.shapes(),
        }  # fmt: skip
        for index, layer in enumerate(self.basis.layers):
            for name in ("U", "V", "tail"):
                a = getattr(layer, name)
                if a is not None:
                    arrays[f"{name}{index}"] = a
        if self.E is not None:
            arrays["E"] = self.E
        return {name: to_host(a) for name, a in arrays.items()}

    @classmethod
    def stacks(cls, leaves: HostIndex, levels: int, read: Callable[[str], Any]) -> dict[str, Stack]:
        """See `Stored`: none."""
        return {}

    @classmethod
    def read_leaves(cls, source: Source, ranks: int) -> HostIndex | None:
        """See `Stored`."""
        if ranks == 1:
            return None
        widths, inputs, _ = np.asarray(source.read("layers")).T
        return rows_tree(int(widths @ inputs), ranks).leaves

    @classmethod
    def _unpack(cls, part: Part, ranks: Ranks) -> Self:
        basis = _unpacked_basis(part)
        D, P, C, cuts = (part[name] for name in ("D", "P", "C", "cuts"))
        lengths, columns, values = (part[name] for name in ("lengths", "columns", "values"))
        M = basis.size
        kinds = {a.dtype for a in (D, P, C, values, *basis.arrays())}
        if len(kinds) != 1 or D.dtype not in FLOATS:
            raise ValueError(f"the arrays have types {sorted(map(str, kinds))}")
        if D.shape != (M,) or P.shape != (M, len(C)) or ranks != [(len(C),)]:
            raise ValueError(f"D {D.shape}, P {P.shape} and C {C.shape} do not fit {M} coordinates")
        if cuts.ndim != 1 or cuts[0] or cuts[-1] != M or (np.diff(cuts) < 0).any():
            raise ValueError("the parts of the rows are none")
        if lengths.shape != (M,) or (lengths < 0).any() or lengths.sum() != len(values):
            raise ValueError("the rows' lengths do not fit the entries")
        row = np.repeat(np.arange(M), lengths)
        if columns.shape != values.shape or (columns < 0).any() or (columns >= row).any():
            raise ValueError("an entry is not below the diagonal")
        starts = np.concatenate([[0], np.cumsum(lengths)])
        one, comm = len(cuts) == 2, part.owners.comm
        own = slice(0, 1) if one else OrderedSum(comm, len(cuts) - 1, M).own
        rows = slice(int(cuts[own.start]), int(cuts[own.stop]))
        here = slice(int(starts[rows.start]), int(starts[rows.stop]))
        E = part.own_rows("E") if part.has("E") else None
        return cls(
            basis, D, starts[rows.start : rows.stop + 1] - here.start, columns[here], values[here],
            cuts, P, C, E, owners=part.owners,
        )  # fmt: skip


def gathered(
    comm: Communicator, lengths: Array, columns: Array, values: Array
) -> tuple[Array, Array, Array]:
    """Sparse rows of all ranks, one rank's after the other's: their lengths, and the entries."""
    counts = comm.share((len(lengths), int(values.size)))
    rows, entries = ([c[i] for c in counts] for i in (0, 1))
    return (
        comm.allgather(lengths, rows),
        comm.allgather(columns, entries),
        comm.allgather(values, entries),
    )


def _unpacked_basis(part: Part) -> KroneckerBasis:
    layers = []
    shapes = part["layers"]
    if shapes.ndim != 2 or shapes.shape[1] != 3 or (shapes < 0).any():
        raise ValueError("the layers' shapes are none")
    for index, (width, inputs, bias) in enumerate(shapes.tolist()):
        U, V, tail = part.get(f"U{index}"), part[f"V{index}"], part.get(f"tail{index}")
        if V.ndim != 2 or len(V) != inputs or (U is not None and (U.ndim != 2 or len(U) != width)):
            raise ValueError(f"the basis of layer {index} does not fit its {width} units")
        if (U is not None and U.shape[1] < width) != (tail is not None):
            raise ValueError(f"layer {index} lacks what lies outside its basis, or has too much")
        if tail is not None and tail.shape != V.shape[1:]:
            raise ValueError(f"tail {tail.shape} of layer {index} with {V.shape[1]} features")
        layers.append(LayerBasis(U, V, width, bool(bias), tail))
    return KroneckerBasis(layers)
