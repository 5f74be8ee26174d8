"""A matrix that is sparse in a Kronecker-factored basis: K = Q (D + S + S^T + P C P^T) Q^T + E."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import DTypeLike

from gpu_hodlr import batched
from gpu_hodlr.arrays import FLOATS
from gpu_hodlr.batched.stored import FLOAT32, WIDTHS
from gpu_hodlr.devices import Array, HostIndex, namespace, to_host
from gpu_hodlr.distributed import ALONE, Ownership
from gpu_hodlr.eigenbasis import KroneckerBasis, LayerBasis
from gpu_hodlr.once import once
from gpu_hodlr.structures.dealt_rows import DealtRows, check_rows
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
        product += self.rows.symmetric_matmul(c)
        if len(self.C):
            inner = batched.matmul(self.P[None], c[None], transpose_a=True)
            inner *= self.C[:, None]
            batched.matmul(self.P[None], inner, add_to=product[None])
        return product

    @cached_property
    def rows(self) -> DealtRows:
        """S."""
        return DealtRows(self.starts, self.columns, self.values, self.cuts, self.owners.comm)

    # --- the diagonal ----------------------------------------------------------------------------

    def diagonal(self) -> Array:
        """See `Structure`.

        With U the units of a layer, V its features, and S_ab the block of units a and b:
        sum_a U[u, a]^2 sum_i V[f, i]^2 D_ai + 2 sum_ab U[u, a] U[u, b] (V S_ab V^T)_ff, which costs
        as many operations as S has entries, times features.
        """
        blocks = [
            namespace(self.D).zeros(
                (layer.units,) * (1 if layer.U is None else 2) + (layer.inputs,), self.D.dtype
            )
            for layer in self.basis.layers
        ]  # of units that are not rotated each alone
        self._add_diagonals(blocks)
        parts = []
        for index, layer in enumerate(self.basis.layers):
            h = blocks[index] if self.rows.whole else self.owners.sum(blocks[index])
            parts.append(layer.written(self._layer_diagonal(index, h)[None])[0])
        diagonal = namespace(self.D).concatenate(parts)
        if len(self.C):
            diagonal += (self.basis.rotate_back(self.P) ** 2) @ self.C
        diagonal = self.owners.take(diagonal)
        return diagonal if self.E is None else diagonal + self.E

    def _layer_diagonal(self, index: int, h: Array) -> Array:
        """(w, f) from h[a, b] = diag(V S_ab V^T); from h[a] = diag(V S_aa V^T) where U = I."""
        xp, layer = namespace(h), self.basis.layers[index]
        r, f, V2 = layer.units, layer.inputs, layer.V**2
        own = slice(*self.basis.firsts[index : index + 2].tolist())
        within = self.D[own].reshape(r, layer.features) @ V2.T
        null = layer.null * (1 - V2.sum(axis=1))
        if layer.U is None:
            return 2 * h + within + null
        h = h + h.transpose(1, 0, 2)
        unit = xp.arange(r)
        h[unit, unit] += within
        result = xp.empty((layer.width, f), h.dtype)
        for u in range(0, layer.width, _FEATURES):  # U h U^T, some rows of U at a time
            some = layer.U[u : u + _FEATURES]
            half = (some @ h.reshape(r, r * f)).reshape(len(some), r, f)
            result[u : u + _FEATURES] = (some[:, :, None] * half).sum(axis=1)
        if layer.tail is not None:
            missing = 1 - (layer.U**2).sum(axis=1)
            result += missing[:, None] * (V2 @ layer.tail)
        return result + null

    def _add_diagonals(self, blocks: list[Array]) -> None:
        """To h of every layer, those of this rank's rows of S."""
        begin, end = self.rows.rows.start, self.rows.rows.stop
        starts = to_host(self.starts)
        for layer, first, h in zip(self.basis.layers, self.basis.firsts, blocks, strict=False):
            g, low = layer.features, int(first)
            rows = range(max(begin, low), min(end, low + layer.coupled), g)
            if layer.U is None and g > 1 and rows:  # one feature has nothing below the diagonal
                edges = starts[rows.start - begin : rows.stop - begin + 1]
                self._add_alone(layer, low, rows.start - low, edges, h)
            elif layer.U is not None:
                for row in rows:
                    edges = starts[row - begin : row - begin + g + 1]
                    self._add_unit(layer, low, (row - low) // g, edges, h)

    def _add_unit(
        self, layer: LayerBasis, first: int, unit: int, edges: HostIndex, h: Array
    ) -> None:
        """Of the rows of one unit, which start at these entries: to h[unit]."""
        xp, g = namespace(self.D), layer.features
        here = slice(int(edges[0]), int(edges[-1]))
        part = batched.sparse_rows(
            xp.asarray(edges - edges[0]), self.columns[here], self.values[here], self.basis.size
        )
        own = slice(first, first + (unit + 1) * g)
        for i in range(0, layer.inputs, _FEATURES):
            some = xp.ascontiguousarray(layer.V[i : i + _FEATURES].T)
            turned = part.transposed_matmul(some)[own].reshape(unit + 1, g, -1)
            h[unit, : unit + 1, i : i + _FEATURES] += (turned * some).sum(axis=1)

    def _add_alone(
        self, layer: LayerBasis, first: int, row: int, edges: HostIndex, h: Array
    ) -> None:
        """Of the rows of whole units from a row of the layer on: S_aa, as dense blocks, to h."""
        xp, g = namespace(self.D), layer.features
        together = batched.columns_at_once(h, 2 * g * max(g, layer.inputs) * h.itemsize)
        for start in range(0, len(edges) - 1, together * g):
            own = edges[start : start + together * g + 1]
            here = slice(int(own[0]), int(own[-1]))
            place = xp.arange(here.start, here.stop)
            i = xp.searchsorted(xp.asarray(own), place, side="right") - 1
            low = first + row + start
            j = self.columns[here].astype(np.int64) - low
            chosen = xp.nonzero((j >= 0) & (j // g == i // g))[0]
            i, j, value = i[chosen], j[chosen], self.values[here][chosen]
            blocks = xp.zeros(((len(own) - 1) // g, g, g), h.dtype)
            blocks[i // g, i % g, j % g] = value
            units = slice((row + start) // g, (row + start) // g + len(blocks))
            h[units] += (layer.features_out(blocks) * layer.V.T).sum(axis=1)

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
        return self.rows.entries()

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

    def absorbed(self) -> tuple[Self, bool]:
        """The same with E in the basis, as far as it is diagonal there; and whether that is all.

        Collective: all ranks call.
        """
        if self.E is None:
            return self, True
        basis, added, exact = self.basis.plus(self.owners.whole(self.E))
        return replace(self, basis=basis, D=self.D + added, E=None), exact

    def astype(self, dtype: DTypeLike) -> Self:
        """See `Structure`; of a wider type the basis is orthonormal to its precision.

        There is no far field: what would be narrower than float32 is float32.
        """
        cast = super().astype(FLOAT32 if isinstance(dtype, str) and dtype in WIDTHS else dtype)
        if np.finfo(cast.dtype).eps >= np.finfo(self.dtype).eps:
            return cast
        return replace(cast, basis=cast.basis.orthonormal())

    def _mapped(self, floats: Map, indices: Map, far: Map | None = None) -> Self:
        return replace(
            self, basis=self.basis.mapped(floats), D=floats(self.D), starts=indices(self.starts),
            columns=indices(self.columns), values=floats(self.values), P=floats(self.P),
            C=floats(self.C), E=None if self.E is None else floats(self.E),
        )  # fmt: skip

    # --- files -----------------------------------------------------------------------------------

    def pack(self) -> dict[str, Any]:
        """See `Stored`; S is brought together, all ranks have all of it."""
        lengths, columns, values = self.rows.gathered()
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
        if any(layer.null for layer in self.basis.layers):
            arrays["nulls"] = np.array([layer.null for layer in self.basis.layers])
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
        check_rows(lengths, columns, values, cuts, M)
        if (columns >= np.repeat(np.arange(M), lengths)).any():
            raise ValueError("an entry is not below the diagonal")
        S = DealtRows.part_of(lengths, columns, values, cuts, part.owners.comm)
        E = part.own_rows("E") if part.has("E") else None
        return cls(basis, D, S.starts, S.columns, S.values, cuts, P, C, E, owners=part.owners)


def _unpacked_basis(part: Part) -> KroneckerBasis:
    layers = []
    shapes, nulls = part["layers"], part.get("nulls")
    if shapes.ndim != 2 or shapes.shape[1] != 3 or (shapes < 0).any():
        raise ValueError("the layers' shapes are none")
    if nulls is not None and (nulls.shape != shapes[:, 0].shape or not np.isfinite(nulls).all()):
        raise ValueError("what lies outside the layers' features is no number")
    for index, (width, inputs, bias) in enumerate(shapes.tolist()):
        U, V, tail = part.get(f"U{index}"), part[f"V{index}"], part.get(f"tail{index}")
        if V.ndim != 2 or len(V) != inputs or (U is not None and (U.ndim != 2 or len(U) != width)):
            raise ValueError(f"the basis of layer {index} does not fit its {width} units")
        if (U is not None and U.shape[1] < width) != (tail is not None):
            raise ValueError(f"layer {index} lacks what lies outside its basis, or has too much")
        if tail is not None and tail.shape != V.shape[1:]:
            raise ValueError(f"tail {tail.shape} of layer {index} with {V.shape[1]} features")
        null = 0.0 if nulls is None else float(nulls[index])
        layers.append(LayerBasis(U, V, width, bool(bias), tail, null))
    return KroneckerBasis(layers)
