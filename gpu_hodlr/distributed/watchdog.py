"""Ends all ranks where one has waited too long for the others, and says where."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from gpu_hodlr.errors import ArgumentError

TIMEOUT = "GPU_HODLR_TIMEOUT"
_GRACE = 0.25, 1.0, 10.0  # of the timeout, least, most: seconds in which others tell theirs


class Watchdog:
    """A context round waits. Where one takes too long, its stack is printed and all is ended.

    Args:
        seconds: that a wait may take.
        who: waits, for the message.
        end: called at last.
    """

    def __init__(self, seconds: float, who: str, end: Callable[[], Any]) -> None:
        self._seconds, self._who, self._end = seconds, who, end
        self._since: dict[int, float] = {}  # by thread
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

    def _watch(self) -> None:
        while not (late := self._late()):
            time.sleep(min(1.0, self._seconds / 10))
        frames = sys._current_frames()
        for thread in late:
            stack = "".join(traceback.format_stack(frames.get(thread)))
            sys.stderr.write(
                f"{self._who} has waited for the others for {self._seconds:g} s ({TIMEOUT}), all "
                f"are ended; it waits here:\n{stack}"
            )
        sys.stderr.flush()
        share, least, most = _GRACE
        time.sleep(min(max(share * self._seconds, least), most))
        self._end()

    def _late(self) -> list[int]:
        """The threads that have waited too long."""
        now = time.monotonic()
        waits = list(self._since.items())
        return [thread for thread, since in waits if now - since > self._seconds]


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
