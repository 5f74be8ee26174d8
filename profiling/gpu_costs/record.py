"""Records what the CUDA path asks for, on the tests' stand-in for CuPy: not a GPU run.

Everything that the stand-in counts becomes a step, in its order; a kernel or library call that has
no description ends in an error. See twins.py for how matrices of true size are recorded.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from gpu_costs import steps as kinds
from gpu_costs.steps import Step

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from host_cupy import HostCupy, installed, state  # noqa: E402

LIBRARIES = ROOT / ".pytest_cache" / "d" / "host_cuda"  # where the tests keep them too
HOST_WORK = 5e-4  # seconds: less between two steps is the interpreter's, and the host's per step
_NODES = re.compile(r"(\d+) nodes")


class Recorder:
    """The steps of what is done while it watches the stand-in; takes the place of nvtx's domain.

    Attributes:
        host: the stand-in.
        steps: so far.
        capture: those of the graph that is being captured, None outside of a capture.
        muted: whether nothing is noted.
        is_hollow: whether nothing is executed.
        executed: primitives with a twin that were executed all the same.
        uncomputed: ids of the arrays made while nothing is executed.
    """

    def __init__(self, host: HostCupy) -> None:
        self.host = host
        self.steps: list[Step] = []
        self.capture: list[Step] | None = None
        self.muted = self.is_hollow = False
        self.executed: set[str] = set()
        self.uncomputed: set[int] = set()
        self._expected: dict[str, Step] = {}
        self._phases: list[str] = []
        self._levels: list[int] = []
        self._streams: dict[int, int] = {0: 0}
        self._aside = 0
        self._collection = ExitStack()
        self._host_time = time.thread_time()

    def of(self, job: Callable[[], Any]) -> tuple[list[Step], Any]:
        """The steps of a job, and what it gave."""
        before, self.steps = self.steps, []
        self._host_time = time.thread_time()
        try:
            result = job()
            return self.steps, result
        finally:
            self.steps = before

    @contextmanager
    def hollow(self) -> Iterator[None]:
        """Nothing is executed; new arrays hold nothing."""
        before, self.is_hollow = self.is_hollow, True
        try:
            yield
        finally:
            self.is_hollow = before
            if not before:
                self.uncomputed.clear()

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Nothing is noted, the host's time neither."""
        before = self.muted
        with self.aside():
            self.muted = True
            try:
                yield
            finally:
                self.muted = before

    # ---- Noting ---------------------------------------------------------------------------------

    @property
    def list(self) -> list[Step]:
        """Where steps go: to the graph being captured, if there is one."""
        return self.steps if self.capture is None else self.capture

    def note(self, kind: str) -> None:
        """Something was counted: the step that describes it follows the others."""
        if self.muted:
            return
        step = self._expected.pop(kind, None)
        if step is None:
            if kind in (kinds.KERNEL, kinds.LIBRARY):
                raise RuntimeError(f"a {kind} was asked for in a way that is not recorded")
            step = Step(kind)
        self.append(step)

    def append(self, step: Step, stream: Any = None) -> None:
        """Add a step of the current phase and level, on a stream or the current one."""
        if self.muted:
            return
        step.phase = self._phases[-1] if self._phases else ""
        step.level = self._levels[-1] if self._levels else 0
        pointer = state.stream_pointer() if stream is None else stream.ptr
        step.stream = self._streams.setdefault(pointer, len(self._streams))
        self.list.append(step)

    @contextmanager
    def described(self, step: Step) -> Iterator[Step]:
        """What is counted next of this kind is this step."""
        before = self._expected.get(step.kind)
        self._expected[step.kind] = step
        try:
            with self.aside():
                yield step
        finally:
            self._expected.pop(step.kind, None)
            if before is not None:
                self._expected[step.kind] = before

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What the stand-in spends is not the host's own work, which is noted when it begins."""
        if self._aside == 0:
            seconds = time.thread_time() - self._host_time
            if seconds > HOST_WORK and self.capture is None:
                self.append(Step(kinds.HOST, seconds=seconds))
        self._aside += 1
        try:
            yield
        finally:
            self._aside -= 1
            if self._aside == 0:
                self._host_time = time.thread_time()

    def collecting(self, phase: str, info: dict[str, int]) -> None:
        """Of `gc.callbacks`: going through all that was recorded is not the host's work."""
        if phase == "start":
            self._collection.enter_context(self.aside())
        else:
            self._collection.close()

    # ---- As nvtx's domain: phases, and levels by their number of nodes --------------------------

    def get_event_attributes(self, message: str) -> str:
        """As nvtx's."""
        return message

    def push_range(self, name: str) -> None:
        """As nvtx's."""
        nodes = _NODES.search(name)
        self._levels.append(int(nodes[1]) if nodes else self._levels[-1] if self._levels else 0)
        before = self._phases[-1] if self._phases else ""
        self._phases.append(before if nodes else name)

    def pop_range(self) -> None:
        """As nvtx's."""
        self._levels.pop()
        self._phases.pop()


@contextmanager
def recording(
    folder: Path = LIBRARIES, *, twins: bool = True, **options: Any
) -> Iterator[Recorder]:
    """A recorder on the stand-in, which is installed meanwhile.

    Args:
        folder: for compiled libraries.
        twins: whether primitives take their values from NumPy's implementation.
        options: see `host_cupy.installed`.
    """
    from gpu_costs.twins import use_twins  # these modules import this one
    from gpu_costs.watch import watching

    folder.mkdir(parents=True, exist_ok=True)
    with installed(folder, **options) as host:
        recorder = Recorder(host)
        with watching(recorder):
            if twins:
                use_twins(recorder)
            yield recorder
