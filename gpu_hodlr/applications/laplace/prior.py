"""A Gaussian prior of a network's parameters, centred at 0: its precision, one for every group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from gpu_hodlr.arrays import as_array, check_finite
from gpu_hodlr.checks import check_number
from gpu_hodlr.devices import HostArray, HostIndex, is_array, to_host
from gpu_hodlr.errors import ArgumentError, DtypeError, ShapeError

STRUCTURES = ("scalar", "layer")


@dataclass(frozen=True, eq=False)
class Prior:
    """P = diag(p_g w_i) for the parameters i of every group g.

    Attributes:
        names: of the groups; () of one for all parameters.
        group: (N,) which group a parameter is of.
        weights: (N,) w; None for ones.
        precisions: (groups,) p.
    """

    names: tuple[str, ...]
    group: HostIndex
    weights: HostArray | None
    precisions: HostArray

    @classmethod
    def read(cls, given: Any, sizes: Mapping[str, int]) -> Self:
        """What a user gives.

        Args:
            given: a number, a mapping of layers or parameters by name, or an array (N,).
            sizes: entries of the parameters by name, in their order.

        Raises:
            DtypeError, ShapeError, ArgumentError: it is none of these, not positive, or leaves
                parameters out.
        """
        n = sum(sizes.values())
        one = np.zeros(n, np.int64)
        if isinstance(given, Mapping):
            names = tuple(map(str, given))
            values = [check_number(p, f"prior_precision[{name!r}]", positive=True)
                      for name, p in given.items()]  # fmt: skip
            return cls(names, _grouped(names, sizes), None, np.array(values))
        if is_array(given) and given.ndim:
            return cls((), one, _weights(given, n), np.ones(1))
        if is_array(given):
            given = given.item()
        number = check_number(given, "prior_precision", positive=True)
        return cls((), one, None, np.array([number]))

    def structured(self, structure: str | None, sizes: Mapping[str, int]) -> Prior:
        """With other groups, which have about the precisions that their parameters had.

        Raises:
            ArgumentError: there is no such structure.
        """
        if structure is None:
            return self
        if structure not in STRUCTURES:
            raise ArgumentError(
                f"structure must be None or one of {', '.join(STRUCTURES)}, got {structure!r}"
            )
        layers = {name.rpartition(".")[0] or name: None for name in sizes}
        names = tuple(layers) if structure == "layer" else ()
        group = _grouped(names, sizes) if names else np.zeros(len(self.group), np.int64)
        logs = np.bincount(group, np.log(self.rows())) / np.bincount(group)
        return Prior(names, group, None, np.exp(logs))

    def at(self, precisions: HostArray) -> Prior:
        """With other precisions."""
        return replace(self, precisions=precisions)

    @property
    def given(self) -> Any:
        """As a user gives it."""
        if self.names:
            return dict(zip(self.names, map(float, self.precisions), strict=True))
        return float(self.precisions[0]) if self.weights is None else self.rows()

    def rows(self) -> HostArray:
        """The diagonal of P, (N,)."""
        p = self.precisions[self.group]
        return p if self.weights is None else p * self.weights

    @property
    def damping(self) -> float | HostArray:
        """What a factorization adds to the diagonal: a number, or one of every row."""
        uniform = self.weights is None and (self.precisions == self.precisions[0]).all()
        return float(self.precisions[0]) if uniform else self.rows()

    @property
    def least(self) -> float:
        """The smallest precision of a parameter."""
        return float(self.rows().min())

    @property
    def counts(self) -> HostIndex:
        """Parameters of every group."""
        return np.bincount(self.group, minlength=len(self.precisions))

    def logdet(self) -> float:
        """Log det P."""
        return float(np.log(self.rows()).sum())

    def sums(self, values: HostArray) -> HostArray:
        """(groups,) sum of w_i times (N,) values."""
        weighted = values if self.weights is None else self.weights * values
        return np.bincount(self.group, weighted, minlength=len(self.precisions))


def _weights(given: Any, n: int) -> HostArray:
    """(N,) of every parameter.

    Raises:
        ShapeError, DtypeError, ArgumentError: it is not, or not positive.
    """
    given = given.detach() if hasattr(given, "detach") else given
    rows = to_host(as_array(given, "prior_precision"))
    if rows.shape != (n,):
        raise ShapeError(
            f"prior_precision must be a number, a dict of layers, or have shape ({n},), "
            f"got {rows.shape}"
        )
    if rows.dtype.kind not in "iuf":
        raise DtypeError(f"prior_precision must be real numbers, got {rows.dtype}")
    rows = rows.astype(np.float64)
    check_finite(rows, "prior_precision")
    if not (rows > 0).all():
        raise ArgumentError(f"prior_precision must be > 0, got {rows.min()}")
    return rows


def _grouped(names: Sequence[str], sizes: Mapping[str, int]) -> HostIndex:
    """(N,) of every parameter the name that is its own or its layer's, the longest one.

    Raises:
        ArgumentError: it has none, or a name has no parameter.
    """
    groups = []
    for parameter in sizes:
        mine = [x for x in names if parameter == x or parameter.startswith(f"{x}.")]
        if not mine:
            raise ArgumentError(
                f"prior_precision names {', '.join(names) or 'nothing'}, but not {parameter} or "
                "its layer: each parameter needs one"
            )
        groups.append(names.index(max(mine, key=len)))
    unused = sorted(set(range(len(names))) - set(groups))
    if unused:
        raise ArgumentError(
            f"prior_precision: {names[unused[0]]!r} is no layer or parameter that the posterior is "
            f"of; these are {', '.join(sizes)}"
        )
    return np.repeat(np.array(groups, np.int64), list(sizes.values()))
