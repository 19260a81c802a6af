"""What asks a run to stop: the first SIGTERM or Ctrl-C, a callback. Several processes stop as one.

A second signal stops it at once.
"""

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


class Stop(Exception):
    """Raised by a callback of `fit`: the run saves a checkpoint and ends."""


class Stopping:
    """Asked after every step whether the run stops there. Of several processes all hear yes at the same step.

    `reason` is what a callback of this process stopped it for; None where a signal did, or another process.
    """

    def __init__(self, reached: Callable[[int], bool] | None = None) -> None:
        self._reached, self._asked = reached, threading.Event()
        self.reason: Stop | None = None

    def __call__(self, step: int) -> bool:
        return self._asked.is_set() if self._reached is None else self._reached(step)

    def ask(self, reason: Stop | None = None) -> None:
        """Ask the run to stop. A process that is not alone sends itself the signal that JAX tells the others of."""
        self.reason = self.reason or reason
        if self._reached is None:
            self._asked.set()
        else:
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def stop_signals() -> Iterator[Stopping]:
    """Let the first SIGTERM or Ctrl-C within it only ask to stop; a second one acts as ever.

    Of several processes whichever is asked tells the others, and all stop at one step, the next that none of them has
    come to. In a thread that is not the main one, where Python allows no handlers, signals act as ever from the first.
    """
    stopping = Stopping()

    def ask(number: int, frame: FrameType | None) -> None:
        global last_signal
        last_signal = signal.Signals(number)
        stopping.ask()
        signal.signal(number, before[signal.Signals(number)])
        # Not by print: whoever was interrupted may be in the middle of one.
        os.write(STDERR, b"\nstopping after this step, with a checkpoint; once more stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    if processes.count() > 1:
        with _interrupt_as_termination():
            yield Stopping(multihost_utils.reached_preemption_sync_point)
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _interrupt_as_termination() -> Iterator[None]:
    """Send Ctrl-C where SIGTERM goes: to the handler of JAX, unseen by Python, that tells the other processes."""
    before = signal.signal(signal.SIGINT, lambda number, frame: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
