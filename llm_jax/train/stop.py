"""SIGTERM and Ctrl-C: the first one asks a run to stop, the second one stops it."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STDERR = 2


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within it, the first SIGTERM or Ctrl-C only turns the yielded function true; a second one acts as ever.

    In a thread that is not the main one, where Python allows no handlers, signals act as ever from the first.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        signal.signal(number, before[signal.Signals(number)])
        # Not by print: whoever was interrupted may be in the middle of one.
        os.write(STDERR, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
