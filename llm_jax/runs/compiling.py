"""Say what is compiled while it is, how long that took, and whether the cache of compiled programs had it.

JAX reports each program by events (`jax.monitoring`): when its function is traced; when it is lowered, and the compiler
starts; whether the cache had it; and when it is compiled.
"""

import contextlib
import threading
from collections.abc import Iterator

from jax import monitoring
from rich.console import Console

PATIENCE = 1.0  # seconds; what compiles faster is not worth a line

TRACED = "/jax/core/compile/jaxpr_trace_duration"
LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
COMPILED = "/jax/core/compile/backend_compile_duration"
HIT = "/jax/compilation_cache/cache_hits"


@contextlib.contextmanager
def told(console: Console) -> Iterator[None]:
    """Print a line on `console` for each program that takes more than `PATIENCE` until it is compiled.

    On a terminal, or in a notebook, another line comes as soon as that time is over.
    """
    watch = _Watch(console)
    monitoring.register_event_duration_secs_listener(watch.duration)
    monitoring.register_event_listener(watch.event)
    try:
        yield
    finally:
        monitoring.unregister_event_duration_listener(watch.duration)
        monitoring.unregister_event_listener(watch.event)
        watch.close()


class _Watch(threading.local):
    """What one thread compiles: its events come in order, those of another thread in between."""

    def __init__(self, console: Console) -> None:
        self._console, self._seconds, self._cached = console, 0.0, False
        self._traced: dict[str, float] = {}
        self._timer: threading.Timer | None = None

    def event(self, event: str, **_: str | int) -> None:
        self._cached |= event == HIT

    def duration(self, event: str, duration_secs: float, **about: str | int) -> None:
        name = str(about.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
        if event == TRACED:
            self._traced[name] = duration_secs
        elif event == LOWERED:
            self._seconds, self._cached = duration_secs + self._traced.pop(name, 0.0), False
            if self._console.is_terminal or self._console.is_jupyter:
                left = max(0.0, PATIENCE - self._seconds)
                self._timer = threading.Timer(left, self._print, [f"compiling {name} ..."])
                self._timer.daemon = True
                self._timer.start()
        elif event == COMPILED:
            self.close()
            self._traced.clear()
            if (total := self._seconds + duration_secs) >= PATIENCE:
                self._print(f"compiled {name} in {total:.1f} s, {'from the cache' if self._cached else 'anew'}")

    def close(self) -> None:
        """Print no more of what is not compiled yet."""
        if self._timer is not None:
            self._timer.cancel()

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, emoji=False, highlight=False, soft_wrap=True)
