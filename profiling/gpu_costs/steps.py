"""A step: one thing that the host asks of the device, with the sizes that its cost depends on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

KERNEL, LIBRARY, ARRAY = "kernel", "library", "array"  # what a device executes
GRAPH, WAIT, COPY, HOST = "graph", "wait", "copy", "host"
EVENT, FOLLOW = "event", "follow"  # a stream's mark, and a stream that waits for one
EXECUTED = (KERNEL, LIBRARY, ARRAY)
KINDS = (*EXECUTED, GRAPH, WAIT, COPY, HOST, EVENT, FOLLOW)


@dataclass(frozen=True)
class Operand:
    """An array as a step sees it."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        """Its values."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return self.size * self.itemsize


@dataclass
class Step:
    """One step.

    Attributes:
        kind: of KINDS.
        name: of the kernel or function, without its type and width.
        phase: the innermost phase it is in, "" outside of all.
        level: nodes of the tree's level it is in, 0 outside.
        stream: a number for each stream.
        grid, block, shared: of a raw kernel.
        operands: arrays, of a raw kernel by the names of its parameters.
        numbers: its other arguments likewise.
        inside: of a graph.
        seconds: of the host's own work, measured.
        event: number of the mark, of EVENT and FOLLOW.
        times: so many times as much of it, see growth.py.
    """

    kind: str
    name: str = ""
    phase: str = ""
    level: int = 0
    stream: int = 0
    grid: tuple[int, ...] = ()
    block: tuple[int, ...] = ()
    shared: int = 0
    operands: dict[str, Operand] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    inside: list[Step] = field(default_factory=list)
    seconds: float = 0.0
    event: int = 0
    times: float = 1.0

    @property
    def nbytes(self) -> int:
        """Bytes of all operands, each once."""
        return sum(x.nbytes for x in self.operands.values())

    @property
    def itemsize(self) -> int:
        """Of its numbers: that of its name where it has one, else of its largest operand."""
        given = int(self.numbers.get("itemsize", 0))
        largest = max(self.operands.values(), key=lambda x: x.nbytes, default=Operand((), 8))
        return given or largest.itemsize

    def scaled(self, factor: float) -> Step:
        """The same for so many times the nodes, or rows of N."""
        inside = [step.scaled(factor) for step in self.inside]
        return replace(
            self, times=self.times * factor, inside=inside, level=round(self.level * factor),
            seconds=self.seconds * factor,
        )  # fmt: skip


def flat(steps: Iterable[Step]) -> Iterator[Step]:
    """All steps, those inside of graphs in the place of these."""
    for step in steps:
        if step.kind == GRAPH:
            yield from flat(step.inside)
        else:
            yield step
