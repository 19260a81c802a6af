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
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Client, Listener, wait
from typing import Any, TypeVar

import jax
from jax._src import distributed
from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax.experimental import multihost_utils

Value = TypeVar("Value")
Peers = dict[Any, int]  # connections, and the number of the process at the other end of each

FIND = 120  # seconds that the processes have to find each other
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


def started_as_one_of_several(environ: Mapping[str, str], *, tpu_vm: bool, terminal: bool) -> bool:
    """Whether the scheduler that started this process has started others beside it.

    Only then does JAX look for them. An interactive shell inside an allocation has the variables of the allocation, but
    is a step of one task; whoever types on one machine of a TPU slice means that machine.
    """
    slurm = int(environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "SLURM_PROCID" in environ
    kubernetes = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()
    slices = int(environ.get("MEGASCALE_NUM_SLICES", 1)) > 1 or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    metadata = "TPU_SKIP_MDS_QUERY" not in environ and "TPU_WORKER_HOSTNAMES" not in environ
    return slurm or (kubernetes and not tpu_vm) or (tpu_vm and not terminal and (slices or metadata))


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Makes this process one of several: by the arguments, else as its scheduler has it, else it stays alone.

    Comes before the first array. Raises `ValueError` where the others don't turn up.
    """
    given = {"--coordinator HOST:PORT": coordinator, "--processes N": processes, "--process I": process}
    missing = [option for option, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"processes find each other by {', '.join(given)} together; add {' and '.join(missing)}")
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ValueError(f"--process {process} is none of --processes {processes}; use 0 to {processes - 1}")
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"--coordinator {coordinator} has no port; use HOST:PORT, as node0:8476")
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if missing and not started_as_one_of_several(os.environ, tpu_vm=running_in_cloud_tpu_vm, terminal=terminal):
        return
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method=None if missing else "deactivate",
            initialization_timeout=FIND,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=SHUTDOWN,
        )
    except (RuntimeError, ValueError) as error:  # the latter where a scheduler does not say enough
        where = coordinator or _state.coordinator_address or "the address that the scheduler gives"
        raise ValueError(
            f"the processes did not find each other at {where} within {FIND} s ({str(error).splitlines()[0]}); start "
            "all of them with one HOST:PORT that each can reach, and a --process of its own"
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
    """Process 0 has a connection to each other process, and each of these one to it."""
    key = from_first(secrets.token_hex).encode()
    if not is_first():
        port = from_first(int)
        host = _state.coordinator_address.rpartition(":")[0].strip("[]")
        peer = Client((host, port), authkey=key)
        peer.send_bytes(str(_state.process_id).encode())
        return {peer: 0}
    with Listener(("", 0), backlog=count(), authkey=key) as listener:
        from_first(lambda: listener.address[1])
        peers = [listener.accept() for _ in range(count() - 1)]
    return {peer: int(peer.recv_bytes()) for peer in peers}


def _watch(peers: Peers, way_on: str) -> None:
    heard, due = dict.fromkeys(peers, time.monotonic()), 0.0
    while peers:
        if time.monotonic() >= due:
            due = time.monotonic() + BEAT
            _tell(peers, b"beat")
        ready: list[Any] = wait(list(peers), timeout=max(0, due - time.monotonic()))
        for peer in ready:
            try:
                word = peer.recv_bytes()
            except (EOFError, OSError):
                word = f"process {peers[peer]} of {count()} is gone".encode()
            if word == b"bye":
                del peers[peer]
            elif word != b"beat":
                _end(peers, word.decode(), way_on)
            heard[peer] = time.monotonic()
        for peer, number in peers.items():
            if time.monotonic() - heard[peer] > SILENCE:
                _end(peers, f"process {number} of {count()} has not been heard for {SILENCE} s", way_on)


def _end(peers: Peers, reason: str, way_on: str) -> None:
    if is_first():
        _tell(peers, reason.encode())
    os.write(2, f"llm-jax: error: {reason}, and this one stops; {way_on}\n".encode())
    _leave(GONE)


def _tell(peers: Peers, word: bytes) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):  # one that is gone is noticed where it is read
            peer.send_bytes(word)


def _leave(status: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if is_first():
        time.sleep(BEAT)  # it is where the others hear of the end; without it JAX would abort them in the middle
    os._exit(status)
