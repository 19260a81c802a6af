"""Join the other processes of a run, and give all of them the same value."""

import atexit
import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from llm_jax.processes import meeting

Value = TypeVar("Value")

BEAT = 1  # seconds between two heartbeats
HEARTBEAT = 45  # seconds; JAX aborts a silent process with a stack trace, so our own watch is faster
SHUTDOWN = 15  # seconds that a process which ends waits for the others
DAY = 24 * 60 * 60 * 1000  # milliseconds; preparing a corpus may take hours

state: Any = distributed.global_state  # the client of the coordination service has no public name
_numbers = itertools.count()  # all processes make the same calls in the same order, so a number identifies each


def count() -> int:
    """Return the number of processes. Unlike `jax.process_count`, it starts no backend."""
    return state.num_processes


def is_first() -> bool:
    """Return whether this is process 0, which prints and writes."""
    return state.process_id == 0


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Join the other processes: those of the arguments, else those of the scheduler, else none.

    Call it before the first array. Raises `ValueError` if some don't arrive in time, and names them.
    """
    address = meeting.address_of(coordinator, processes, process)
    if address is None:
        return
    bind = meeting.meet(address)
    try:
        jax.distributed.initialize(
            address.coordinator,
            address.processes,
            address.process,
            local_device_ids=address.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=meeting.FIND,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
            coordinator_bind_address=os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", bind),
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"JAX can't join the processes ({str(error).splitlines()[0]}); start all of them again"
        ) from error


@contextlib.contextmanager
def joined(coordinator: str | None, processes: int | None, process: int | None) -> Iterator[None]:
    """Join the others in the block. After an error, exit at once: a normal exit waits for processes in mid-step."""
    join(coordinator, processes, process)
    try:
        yield
    except BaseException as error:
        if count() > 1:
            with contextlib.suppress(RuntimeError):  # most errors occur in all processes: let each print its own
                state.client.wait_at_barrier("llm_jax/failed", 5000)
            atexit.register(leave, 130 if isinstance(error, KeyboardInterrupt) else 2)  # after it is printed
        raise
    if count() > 1:
        jax.distributed.shutdown()


def from_first(make: Callable[[], Value]) -> Value:
    """Return in every process what `make` returns in process 0, a JSON value; a `ValueError` it raises, too."""
    if count() == 1:
        return make()
    name = next_name()
    if is_first():
        try:
            value = make()
        except ValueError as error:
            state.client.key_value_set(name, json.dumps({"error": str(error)}))
            raise
        state.client.key_value_set(name, json.dumps({"value": value}))
        return value
    answer = json.loads(state.client.blocking_key_value_get(name, DAY))
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["value"]


def from_all(value: Value) -> list[Value]:
    """Return in every process the JSON `value` of each process, in their order."""
    if count() == 1:
        return [value]
    name = next_name()
    state.client.key_value_set(f"{name}/{state.process_id}", json.dumps(value))
    return [json.loads(state.client.blocking_key_value_get(f"{name}/{number}", DAY)) for number in range(count())]


def gathered(tree: Any) -> Any:
    """Return `tree` with whole arrays, as NumPy if there are several processes."""
    return tree if count() == 1 else jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def barrier() -> None:
    """Wait until all processes are here, for up to a day."""
    state.client.wait_at_barrier(next_name(), DAY)


def next_name() -> str:
    """Return a name for the next thing that all processes do together, the same in each."""
    return f"llm_jax/{next(_numbers)}"


def leave(status: int) -> None:
    """End this process, without waiting for the others."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if is_first():
        time.sleep(BEAT)  # the others learn of the end here; otherwise JAX would abort them in mid-step
    os._exit(status)
