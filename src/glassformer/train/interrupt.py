"""Interrupts: Ctrl-C and ``kill`` end a run after the step at hand, saved; a second one ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Notes SIGINT and SIGTERM while it is entered; ``caught`` is the name of the first, or None.

    ``shown``: say so on standard error when the first one comes. Only the main thread may handle signals: elsewhere nothing
    is installed. What was installed before is put back.
    """

    def __init__(self, shown: bool = False) -> None:
        self._shown = shown
        self.caught: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Put back the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.caught is None:
            self.caught = signal.Signals(number).name
            if self._shown:
                os.write(2, b"stopping after this step (a compilation ends first) and saving; again: stop at once, with the last save\n")
            return
        self.close()
        os.kill(os.getpid(), number)  # the second time: as if nobody had listened
