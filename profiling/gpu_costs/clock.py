"""Seconds of a list of steps: the host's clock, the streams' clocks, and what they wait for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from gpu_costs import steps as kinds
from gpu_costs.gpus import Gpu
from gpu_costs.kernels import kernel_work
from gpu_costs.libraries import array_work, library_work
from gpu_costs.steps import Step
from gpu_costs.work import Work


def work_of(step: Step, gpu: Gpu) -> Work:
    """Of something that a device executes."""
    if step.kind == kinds.KERNEL:
        return kernel_work(step)
    if step.kind == kinds.LIBRARY:
        return library_work(step, gpu)
    return array_work(step)


@dataclass
class Totals:
    """What a job, or one of its phases, comes to.

    Attributes:
        seconds: predicted.
        busy: seconds in which the GPU works.
        host: seconds of the host's own work between its calls.
        steps: kernels, library calls and operations, those in graphs too.
        graphs, waits, copies: of the host.
        bytes: in device memory, least.
        flops: operations.
        depth: the longest chain of steps that depend on each other.
    """

    seconds: float = 0.0
    busy: float = 0.0
    host: float = 0.0
    steps: int = 0
    graphs: int = 0
    waits: int = 0
    copies: int = 0
    bytes: float = 0.0
    flops: float = 0.0
    depth: int = 0


@dataclass
class _Clocks:
    """When the host and every stream are free, and how deep their chains are."""

    host: float = 0.0
    streams: dict[int, float] = field(default_factory=dict)
    depths: dict[int, int] = field(default_factory=dict)
    events: dict[int, tuple[float, int]] = field(default_factory=dict)
    shared: float = 0.0  # the whole GPU is taken until then, were all of it at work

    @property
    def now(self) -> float:
        return max([self.host, *self.streams.values()])

    def execute(self, stream: int, earliest: float, seconds: float, share: float) -> None:
        """After what is on the stream, and not before the GPU has room for it."""
        start = max(earliest, self.streams.get(stream, 0.0))
        self.shared = max(self.shared, start) + share
        self.streams[stream] = max(start + seconds, self.shared)
        self.depths[stream] = self.depths.get(stream, 0) + 1

    def follow(self, stream: int, event: int) -> None:
        when, depth = self.events.get(event, (0.0, 0))
        self.streams[stream] = max(self.streams.get(stream, 0.0), when)
        self.depths[stream] = max(self.depths.get(stream, 0), depth)

    def record(self, stream: int, event: int) -> None:
        self.events[event] = self.streams.get(stream, 0.0), self.depths.get(stream, 0)


class Clock:
    """Goes through steps as host and device would.

    Args:
        gpu: the device.

    Attributes:
        total: of all steps so far.
        phases: by phase.
        by_name: seconds of the GPU by kernel or function.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._clocks = _Clocks()
        self.total = Totals()
        self.phases: dict[str, Totals] = {}
        self.by_name: dict[str, float] = {}

    def run(self, steps: Iterable[Step]) -> Clock:
        """Go through the steps; then the host waits for all of it."""
        for step in steps:
            before = self._clocks.now
            mine = Totals()
            self._one(step, mine)
            mine.seconds = self._clocks.now - before
            phase = self.phases.setdefault(step.phase, Totals())
            for totals in (self.total, phase):
                for name, value in vars(mine).items():
                    if name != "depth":
                        setattr(totals, name, getattr(totals, name) + value)
        self.total.depth = max(self._clocks.depths.values(), default=0)
        return self

    def _one(self, step: Step, mine: Totals) -> None:
        gpu, clocks = self._gpu, self._clocks
        if step.kind in kinds.EXECUTED:
            clocks.host += {
                kinds.KERNEL: gpu.launch, kinds.LIBRARY: gpu.call, kinds.ARRAY: gpu.operation
            }[step.kind]  # fmt: skip
            # A device that still has work starts the next piece after a gap; an idle one when the
            # launch has reached it.
            waiting = clocks.streams.get(step.stream, 0.0) + gpu.gap
            self._execute(step, step.stream, max(clocks.host + gpu.latency, waiting), mine)
        elif step.kind == kinds.GRAPH:
            self._graph(step, mine)
        elif step.kind == kinds.WAIT:
            clocks.host = max(clocks.host, clocks.streams.get(step.stream, 0.0))
            clocks.host += gpu.wait + step.nbytes * step.times / gpu.pcie
            mine.waits = 1
        elif step.kind == kinds.COPY:
            clocks.host += gpu.send + step.nbytes * step.times / gpu.pcie
            stream = clocks.streams.get(step.stream, 0.0)
            clocks.streams[step.stream] = max(stream, clocks.host)
            mine.copies = 1
        elif step.kind == kinds.HOST:
            mine.host = gpu.host_share * step.seconds
            clocks.host += mine.host
        elif step.kind == kinds.EVENT:
            clocks.host += gpu.mark
            clocks.record(step.stream, step.event)
        elif step.kind == kinds.FOLLOW:
            clocks.host += gpu.mark
            clocks.follow(step.stream, step.event)
        else:
            raise ValueError(f"a step of unknown kind {step.kind!r}")

    def _execute(self, step: Step, stream: int, earliest: float, mine: Totals) -> None:
        work = work_of(step, self._gpu)
        seconds = work.seconds(self._gpu)
        share = work.share_of_device(self._gpu)
        self._clocks.execute(stream, earliest, seconds, share)
        self.by_name[step.name] = self.by_name.get(step.name, 0.0) + seconds
        mine.busy += seconds
        mine.steps += 1
        mine.bytes += work.bytes
        mine.flops += work.flops

    def _graph(self, step: Step, mine: Totals) -> None:
        """Its nodes on streams of their own; the stream it is launched on goes on when all end."""
        gpu, clocks = self._gpu, self._clocks
        clocks.host += gpu.replay + gpu.replayed_node * len(step.inside)
        begin = max(clocks.host + gpu.latency, clocks.streams.get(step.stream, 0.0))
        depth = clocks.depths.get(step.stream, 0)
        inside = _Clocks(shared=max(clocks.shared, begin))
        outside, self._clocks = clocks, inside
        try:
            for node in step.inside:
                inside.streams.setdefault(node.stream, begin)
                if node.kind == kinds.EVENT:
                    inside.record(node.stream, node.event)
                elif node.kind == kinds.FOLLOW:
                    inside.follow(node.stream, node.event)
                elif node.kind in kinds.EXECUTED:
                    earliest = inside.streams[node.stream] + gpu.node
                    self._execute(node, node.stream, earliest, mine)
                else:
                    raise ValueError(f"a graph cannot hold a step of kind {node.kind!r}")
        finally:
            self._clocks = outside
        clocks.streams[step.stream] = max([begin, *inside.streams.values()])
        clocks.shared = max(clocks.shared, inside.shared)
        clocks.depths[step.stream] = depth + max(inside.depths.values(), default=0)
        mine.graphs = 1


def predicted(steps: Iterable[Step], gpu: Gpu) -> Clock:
    """The clock after all steps, begun on an idle device."""
    return Clock(gpu).run(steps)
