"""Blocks of a kernel matrix of points, and products in strips of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from gpu_hodlr import batched
from gpu_hodlr.batched import PointKernel
from gpu_hodlr.devices import Array, device_of, move, namespace
from gpu_hodlr.operators.reader import by_blocks, checked

Profile = Callable[[Array], Any]  # of distances in length scales

_STRIP = 512  # rows of K formed together by an exact product
_LEAST = 32  # where N is so large that more of them take too much memory
_HELD = 1 << 25  # entries of strips held at a time: about 256 MB
_TEMPORARIES = 8  # arrays of their size that array operations may take
_DISTANCES = PointKernel("squared_distance")


@dataclass(frozen=True, eq=False)
class PointBlocks:
    """K[i, j] = variance k(|x_i - x_j|) + nugget_i [i = j].

    Attributes:
        x: (N, d) points in units of the length scale.
        kernel: k by name, its parameter, the variance.
        nugget: (N,), or (1,) for every row.
        own: k as the user's own function of the distance, in the place of the named one.
    """

    x: Array
    kernel: PointKernel
    nugget: Array
    own: Profile | None = None

    def on(self, device: str) -> PointBlocks:
        """The same on a device."""
        return replace(self, x=move(self.x, device), nugget=move(self.nugget, device))

    def blocks(self, rows: Array, cols: Array) -> Array:
        """K[rows[t], cols[t]], (t, m, k), for (t, m) and (t, k) indices; -1 gives zeros.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: of what an own function gives.
        """
        if self.own is None:
            return batched.point_entries(self.x, self.kernel, self.nugget, rows, cols)
        xp, dtype = namespace(self.x), self.x.dtype
        rows, cols = xp.asarray(rows)[:, :, None], xp.asarray(cols)[:, None, :]
        out = self.own_values(xp.sqrt(self.squared_distances(rows[:, :, 0], cols[:, 0])))
        out = out * dtype.type(self.kernel.variance)
        every_row = xp.broadcast_to(self.nugget, (len(self.x),))
        out += xp.where(rows == cols, every_row[rows], dtype.type(0))
        return xp.where((rows >= 0) & (cols >= 0), out, dtype.type(0))

    def squared_distances(self, rows: Array, cols: Array) -> Array:
        """|x_i - x_j|^2 of blocks, (t, m, k)."""
        nothing = namespace(self.x).zeros(1, self.x.dtype)
        return batched.point_entries(self.x, _DISTANCES, nothing, rows, cols)

    def own_values(self, r: Array) -> Array:
        """The user's function of distances r, checked.

        Raises:
            ShapeError, DtypeError, DeviceError, ArgumentError: see `reader.checked`.
        """
        assert self.own is not None
        return checked(self.own(r), r.shape, "kernel", r.dtype, device_of(r))

    def diagonal(self) -> Array:
        """The diagonal, (N,)."""
        xp, dtype = namespace(self.x), self.x.dtype
        at_0 = xp.ones(1, dtype) if self.own is None else self.own_values(xp.zeros(1, dtype))
        found = at_0 * dtype.type(self.kernel.variance) + self.nugget
        return xp.broadcast_to(found, (len(self.x),)).copy()

    def product(self, rows: range, cols: range, v: Array, width: int) -> Array:
        """K[rows, cols] v, exact: K is formed in strips of rows that are multiplied and dropped.

        Args:
            rows: consecutive indices.
            cols: the same.
            v: (len(cols), k).
            width: columns of v multiplied together, see `Operator._matmat_by_blocks`.
        """
        xp = namespace(v)
        out = xp.empty((len(rows), v.shape[1]), v.dtype)
        for here, i, j in self.strips(rows, cols, 1 if self.own is None else _TEMPORARIES):
            strips = self.blocks(i, j)

            def multiply(part: Array, strips: Array = strips) -> Array:
                product = batched.matmul(strips, xp.broadcast_to(part, (len(strips), *part.shape)))
                return product.reshape(len(strips) * strips.shape[1], part.shape[1])

            out[here] = by_blocks(multiply, v, width)[: here.stop - here.start]
        return out

    def strips(
        self, rows: range, cols: range, temporaries: int = _TEMPORARIES
    ) -> Iterator[tuple[slice, Array, Array]]:
        """Strips of rows, as many at a time as memory is meant for; the same on every machine.

        Args:
            rows: consecutive indices.
            cols: the same.
            temporaries: arrays of the size of the strips that are held together.

        Yields:
            Which of the rows, and the indices of their strips, (t, m), and columns, (t, k).
        """
        xp = namespace(self.x)
        every = xp.arange(cols.start, cols.stop)
        held = _HELD // (temporaries * max(1, len(cols)))  # rows
        height = max(_LEAST, min(_STRIP, held)) if temporaries > 1 else _STRIP
        step = height * max(1, held // height)
        for start in range(0, len(rows), step):
            stop = min(len(rows), start + step)
            count = -(-(stop - start) // height)
            index = xp.full((count, height), -1)
            index.reshape(-1)[: stop - start] = xp.arange(rows.start + start, rows.start + stop)
            yield slice(start, stop), index, xp.broadcast_to(every, (count, len(cols)))
