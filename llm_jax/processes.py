"""Several processes, one run: how they find each other, agree, and notice that one of them is gone.

Process 0 speaks and writes for all. In a process that is alone every function here does the plain thing at once.
"""

import atexit
import contextlib
import itertools
import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any, TypeVar

import jax
from jax._src import distributed
from jax.experimental import multihost_utils

from llm_jax import meeting
from llm_jax import peers as network

Value = TypeVar("Value")
Peers = dict[Any, int]  # connections, and the number of the process at the other end of each

BEAT = 1  # seconds between two signs of life
SILENCE = 15  # seconds without one, after which a process counts as hung
HEARTBEAT = 45  # JAX's own such limit aborts the process with a stack trace; ours comes before it
SHUTDOWN = 15  # seconds for which a process that ends waits for the others
DAY = 24 * 60 * 60 * 1000  # milliseconds; to prepare a corpus may take hours
GONE = 75  # EX_TEMPFAIL of sysexits.h: the exit status of a process that another one left alone; start again

_state: Any = distributed.global_state  # the client of the coordination service has no public name
_turns = itertools.count()  # every process asks the same questions in the same order, so a number names each


def count() -> int:
    """How many processes there are. Unlike `jax.process_count`, it starts no backend."""
    return _state.num_processes


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return _state.process_id == 0


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Make this process one of several: by the arguments, else as its scheduler has it, else it stays alone.

    Comes before the first array. Raises `ValueError` where the others don't turn up, and says who is missing.
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
    """As `join`. An error leaves at once: a normal exit would wait for others, who are in the middle of a step."""
    join(coordinator, processes, process)
    try:
        yield
    except BaseException as error:
        if count() > 1:
            with contextlib.suppress(RuntimeError):  # what is wrong here is wrong in all, mostly: let each say it
                _state.client.wait_at_barrier("llm_jax/failed", 5000)
            atexit.register(_leave, 130 if isinstance(error, KeyboardInterrupt) else 2)  # when it has been said
        raise
    if count() > 1:
        jax.distributed.shutdown()


def from_first(make: Callable[[], Value]) -> Value:
    """What `make` gives in process 0, a JSON value, in every process; a `ValueError` that it raises, too."""
    if count() == 1:
        return make()
    name = f"llm_jax/{next(_turns)}"
    if is_first():
        try:
            value = make()
        except ValueError as error:
            _state.client.key_value_set(name, json.dumps({"error": str(error)}))
            raise
        _state.client.key_value_set(name, json.dumps({"value": value}))
        return value
    answer = json.loads(_state.client.blocking_key_value_get(name, DAY))
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["value"]


def from_all(value: Value) -> list[Value]:
    """The JSON `value` of each process, in their order, in every process."""
    if count() == 1:
        return [value]
    name = f"llm_jax/{next(_turns)}"
    _state.client.key_value_set(f"{name}/{_state.process_id}", json.dumps(value))
    return [json.loads(_state.client.blocking_key_value_get(f"{name}/{number}", DAY)) for number in range(count())]


def gathered(tree: Any) -> Any:
    """`tree` as every process can compute with it alone: where there are several, as whole NumPy arrays."""
    return tree if count() == 1 else jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


@contextlib.contextmanager
def watched(way_on: str) -> Iterator[None]:
    """Within it, a process that dies or hangs ends all the others: each says which one it was, and `way_on`.

    A dead process closes its connection to process 0 at once; a stopped one, or one that can't be reached, falls
    silent. Process 0 tells the rest. What waits for a dead process inside a collective can't be woken, only ended.
    """
    if count() == 1:
        yield
        return
    peers = _connect()
    watch = threading.Thread(target=_watch, args=(dict(peers), way_on), daemon=True)
    watch.start()
    try:
        yield
    except Exception as error:
        watch.join(2 * BEAT)  # a collective fails where another process died: then the watch says so, and ends this one
        _tell(peers, f"process {_state.process_id} of {count()} failed ({error})".encode())
        raise
    for peer in peers:
        peer.send_bytes(b"bye")
    _state.client.wait_at_barrier(f"llm_jax/{next(_turns)}", DAY)
    watch.join()  # it has heard the last word of every peer
    for peer in peers:
        peer.close()


def _connect() -> Peers:
    """Process 0 has a connection to each other process, and each of these one to it.

    All come here first: they may have prepared their data by themselves until now, which takes hours.
    """
    _state.client.wait_at_barrier(f"llm_jax/{next(_turns)}", DAY)
    key = network.run_key("watch", from_first(secrets.token_hex))
    host = _state.coordinator_address.rpartition(":")[0].strip("[]")
    if not is_first():
        port = from_first(int)
        try:
            return {network.connect(host, port, key, _state.process_id, meeting.FIND): 0}
        except OSError as error:
            raise ValueError(
                f"process 0 can't be reached at {host}:{port} ({error}); let the machines of a run reach each other on "
                "all ports, and set LLM_JAX_SECRET to the same text on all of them"
            ) from None
    with network.listen(host, 0) as listener:
        port = listener.getsockname()[1]
        from_first(lambda: port)
        came = network.gather(listener, key, count(), meeting.FIND)
    if absent := meeting.absent_from(came, count(), f"{host}:{port}"):
        raise ValueError(f"{absent}; let the machines of a run reach each other on all ports")
    return {peer: number for number, peer in came.peers.items()}


def _watch(peers: Peers, way_on: str) -> None:
    heard, due = dict.fromkeys(peers, time.monotonic()), 0.0
    while peers:
        if time.monotonic() >= due:
            due = time.monotonic() + BEAT
            _tell(peers, b"beat")
        ready: list[Any] = wait(list(peers), timeout=max(0, due - time.monotonic()))
        for peer in ready:
            try:
                word = peer.recv_bytes(network.LONGEST)
            except (EOFError, OSError):
                word = f"process {peers[peer]} of {count()} is gone".encode()
            if word == b"bye":
                del peers[peer]
            elif word != b"beat":
                _end(peers, word.decode(errors="replace"), way_on)
            heard[peer] = time.monotonic()
        for peer, number in peers.items():
            if time.monotonic() - heard[peer] > SILENCE:
                _end(peers, f"process {number} of {count()} has not been heard for {SILENCE} s", way_on)


def _end(peers: Peers, reason: str, way_on: str) -> None:
    if is_first():
        _tell(peers, reason.encode())
    reason = " ".join(reason.split())
    os.write(2, f"llm-jax: error: {reason}, and this one stops; {way_on}\n".encode())
    _leave(GONE)


def _tell(peers: Peers, word: bytes) -> None:
    for peer in peers:
        network.tell(peer, word)


def _leave(status: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if is_first():
        time.sleep(BEAT)  # it is where the others hear of the end; without it JAX would abort them in the middle
    os._exit(status)
