"""SIGTERM and Ctrl-C: the first one asks a run to stop, the second one stops it. Several processes stop as one."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jax.experimental import multihost_utils

from llm_jax import processes

STDERR = 2

# What asked the last run of this process to stop: a signal to any of several processes reaches all as a SIGTERM.
last_signal = signal.SIGTERM


@contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Within it, the first SIGTERM or Ctrl-C only turns the yielded function true; a second one acts as ever.

    The function is called with the number of every step. Of several processes whichever is asked tells the others, and
    it turns true in all of them at one step, the next that none of them has come to.

    In a thread that is not the main one, where Python allows no handlers, signals act as ever from the first.
    """
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        global last_signal
        last_signal = signal.Signals(number)
        asked.set()
        signal.signal(number, before[signal.Signals(number)])
        # Not by print: whoever was interrupted may be in the middle of one.
        os.write(STDERR, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda step: asked.is_set()
        return
    if processes.count() > 1:
        with _interrupt_as_termination():
            yield multihost_utils.reached_preemption_sync_point
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda step: asked.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _interrupt_as_termination() -> Iterator[None]:
    """JAX has the handler of SIGTERM, behind Python's back, that tells the other processes; Ctrl-C goes there too."""
    before = signal.signal(signal.SIGINT, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
