"""Read files that may be damaged: one line for what is wrong with them, and silence from the library that reads."""

import gc
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Read = TypeVar("Read")


def attempt(read: Callable[[], Read]) -> tuple[Read | None, str | None]:
    """Return what `read` returns, or else a line on how its bytes are damaged. Other errors are raised."""
    try:
        with hushed():
            return read(), None
    except Exception as error:
        if not _is_damage(error):
            raise
        return None, gist(error)


@contextmanager
def hushed() -> Iterator[None]:
    """Silence Orbax: at a damaged file it abandons its other reads, and each would print its own traceback.

    Raise what the block raises, without its traceback.
    """
    hooks, level = (sys.unraisablehook, sys.excepthook), logging.root.manager.disable
    sys.unraisablehook = sys.excepthook = lambda *_: None
    logging.disable()
    try:
        yield
    except Exception as error:
        error.__traceback__ = error.__context__ = error.__cause__ = None  # these keep the abandoned reads alive
        with warnings.catch_warnings(action="ignore"):
            gc.collect()
            time.sleep(0.2)
        raise
    finally:
        sys.unraisablehook, sys.excepthook = hooks
        logging.disable(level)


def _is_damage(error: Exception) -> bool:
    """Return whether damaged bytes are to blame, which may raise anything, and not memory or permissions."""
    elsewhere = re.search("RESOURCE_EXHAUSTED|PERMISSION_DENIED", str(error))
    return not (elsewhere or isinstance(error, MemoryError | PermissionError))


def gist(error: Exception) -> str:
    """Return an error on one line: the operating system's message, where it has one."""
    line = " ".join(str(error).split()) or type(error).__name__
    system = re.search(r"([\w ]+) \[os_error_code", line)
    return system[1].strip() if system else re.split("[.:] ", line)[0]
