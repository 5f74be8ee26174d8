"""Ends all ranks where one has waited too long for the others, and says where."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

from gpu_hodlr.errors import ArgumentError

TIMEOUT = "GPU_HODLR_TIMEOUT"
_GRACE = 0.25, 1.0, 10.0  # of the timeout, least, most: seconds in which others tell theirs


class Event(Protocol):
    """A point of a GPU's stream, such as CuPy's Event."""

    @property
    def done(self) -> bool:
        """Whether the stream has come to it."""


@dataclass
class _Queued:
    """A message on a stream.

    Attributes:
        begun: it waits for the others from here on, when all before it is done.
        ended: to here.
        stack: of where it was put there.
        state: what it says of itself.
        since: when it was first seen to wait.
    """

    begun: Event
    ended: Event
    stack: traceback.StackSummary
    state: Callable[[], str]
    since: float | None = None

    def waited(self, now: float) -> float:
        """Seconds that it is known to have waited."""
        if self.since is None and _is_done(self.begun):
            self.since = now
        return 0.0 if self.since is None else now - self.since


class Watchdog:
    """A context round waits. Where one takes too long, its stack is printed and all is ended.

    Messages on a GPU's stream, for which nobody waits here, are watched by `follow`.

    Args:
        seconds: that a wait may take.
        who: waits, for the message.
        end: called at last.
    """

    def __init__(self, seconds: float, who: str, end: Callable[[], Any]) -> None:
        self._seconds, self._who, self._end = seconds, who, end
        self._since: dict[int, float] = {}  # by thread
        self._queued: deque[_Queued] = deque()
        threading.Thread(target=self._watch, daemon=True, name=TIMEOUT).start()

    def __enter__(self) -> None:
        self._since[threading.get_ident()] = time.monotonic()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._since.pop(threading.get_ident(), None)

    def follow(self, begun: Event, ended: Event, state: Callable[[], str]) -> None:
        """Watch a message that was put on a stream: from one event to the other it waits.

        Args:
            begun: recorded before it.
            ended: recorded after it.
            state: what it says of itself, should it take too long.
        """
        frames = traceback.walk_stack(sys._getframe(1))
        stack = traceback.StackSummary.extract(frames, lookup_lines=False)
        stack.reverse()
        self._queued.append(_Queued(begun, ended, stack, state))

    def _watch(self) -> None:
        while not (late := self._late()):
            time.sleep(min(1.0, self._seconds / 10))
        for where in late:
            sys.stderr.write(
                f"{self._who} has waited for the others for {self._seconds:g} s ({TIMEOUT}), all "
                f"are ended; it waits {where}"
            )
        sys.stderr.flush()
        share, least, most = _GRACE
        time.sleep(min(max(share * self._seconds, least), most))
        self._end()

    def _late(self) -> list[str]:
        """Where it has waited too long: threads, and messages on streams."""
        now = time.monotonic()
        waits = list(self._since.items())
        threads = [thread for thread, since in waits if now - since > self._seconds]
        frames = sys._current_frames() if threads else {}
        late = [
            "here:\n" + "".join(traceback.format_stack(frames.get(thread))) for thread in threads
        ]
        while self._queued and _is_done(self._queued[0].ended):
            self._queued.popleft()
        for message in list(self._queued):
            if message.waited(now) > self._seconds and not _is_done(message.ended):
                late.append(
                    f"on the GPU, {message.state()}; the message was put on the stream here:\n"
                    + "".join(message.stack.format())
                )
        return late


def _is_done(event: Event) -> bool:
    """What fails is nothing to wait for: whoever uses the stream next meets the error."""
    try:
        return event.done
    except Exception:
        return True


def patience() -> float | None:
    """Seconds that a wait may take, as GPU_HODLR_TIMEOUT says; None: any number.

    Raises:
        ArgumentError: it is not a number > 0.
    """
    said = os.environ.get(TIMEOUT, "")
    if not said:
        return None
    try:
        seconds = float(said)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ArgumentError(f"{TIMEOUT} must be a number of seconds > 0, got {said!r}")
    return seconds
