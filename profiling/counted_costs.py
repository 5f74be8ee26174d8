"""What a compression asks of the batched primitives and of its operator: bytes and operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gpu_hodlr import batched, profiling
from gpu_hodlr.devices import Array


@dataclass(frozen=True)
class Cost:
    """Bytes moved at least, bytes a second pass reads again, and operations."""

    bytes: float = 0.0
    flops: float = 0.0
    again: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops, self.again + other.again)


class CallCounter:
    """Counts what a compression asks of the batched primitives and of its operator, by phase.

    Attributes:
        costs: by phase.
    """

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self._phase: str | None = None
        self._inside = False  # a counted call: what it calls is its own affair

    @contextmanager
    def watching(self, operator: Any) -> Iterator[None]:
        """Count while the block runs."""
        module: Any = batched
        targets: list[tuple[Any, str, Callable[..., Cost]]] = [
            (operator, "_matmat", self._product),
            (operator, "_matmat_by_blocks", self._product),
            (operator, "_blocks", self._entries),
            (module, "matmul", self._matmul),
            (module, "pivoted_qr", self._pivoted_qr),
            (module, "interpolation", self._interpolation),
        ]
        self._operator = operator
        timer: Any = profiling.PhaseTimer
        phase = timer.phase
        originals = [(owner, name, vars(owner).get(name)) for owner, name, _ in targets]
        timer.phase = self._noting(phase)
        for owner, name, cost in targets:
            setattr(owner, name, self._counted(getattr(owner, name), cost))
        try:
            yield
        finally:
            timer.phase = phase
            for owner, name, original in originals:
                if original is None:  # a method of the class: uncover it
                    delattr(owner, name)
                else:
                    setattr(owner, name, original)

    def _noting(self, phase: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def noted(timer: Any, name: str) -> Iterator[None]:
            self._phase = name
            try:
                with phase(timer, name):
                    yield
            finally:
                self._phase = None

        return noted

    def _counted(self, call: Callable[..., Any], cost: Callable[..., Cost]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            if self._inside or self._phase is None:
                return call(*args, **kwargs)
            self._inside = True
            try:
                result = call(*args, **kwargs)
            finally:
                self._inside = False
            so_far = self.costs.get(self._phase, Cost())
            self.costs[self._phase] = so_far + cost(result, *args, **kwargs)
            return result

        return counted

    def _product(self, result: Array, v: Array, width: int | None = None) -> Cost:
        return Cost(2 * v.nbytes, v.shape[1] * self._operator.product_cost)

    def _entries(self, result: Array, rows: Array, cols: Array) -> Cost:
        return Cost(result.nbytes, result.size * self._operator.entry_cost)

    @staticmethod
    def _matmul(
        result: Array, a: Array, b: Array, *, transpose_a: bool = False, **options: Any
    ) -> Cost:
        depth = a.shape[1 if transpose_a else 2]
        in_place = any(options.get(name) is not None for name in ("add_to", "subtract_from"))
        moved = a.nbytes + b.nbytes + (2 if in_place else 1) * result.nbytes
        return Cost(moved, 2 * result.size * depth)

    @staticmethod
    def _pivoted_qr(
        result: Any, samples: Array, max_rank: int | None = None, negligible: float = 0.0
    ) -> Cost:
        nodes, m, t = samples.shape
        k = min(m, t) if max_rank is None else min(m, t, max_rank)
        flops = 4 * t * m * k - 2 * (t + m) * k**2 + 4 * k**3 / 3
        return Cost(samples.nbytes + nodes * k * m * samples.itemsize, nodes * flops)

    @staticmethod
    def _interpolation(
        result: Any, qr: Any, rank: int, padding: Array, noise: Array | None = None
    ) -> Cost:
        nodes, _, m = qr.r.shape
        T = result[1]
        return Cost(nodes * rank * m * qr.r.itemsize + T.nbytes, T.size * rank)
