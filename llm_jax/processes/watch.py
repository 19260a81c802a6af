"""Notice a process that dies or hangs, and end all the others.

A dead process closes its connection to process 0 at once; a stopped or unreachable one falls silent. Process 0 tells
the rest. A process that waits for a dead one inside a collective can't be woken, only ended.
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from llm_jax.processes import connections, meeting
from llm_jax.processes.group import BEAT, barrier, count, from_first, is_first, leave, state

Peers = dict[Connection, int]  # connections, and the number of the process at the other end of each

SILENCE = 15  # seconds without a heartbeat, after which a process counts as hung
GONE = 75  # EX_TEMPFAIL of sysexits.h: the exit status of a process that lost another one; start again


@contextlib.contextmanager
def watched(next_move: str) -> Iterator[None]:
    """End all processes if one dies or hangs in the block: each prints which one it was, and `next_move`.

    Raise `ValueError` if process 0 can't be reached.
    """
    if count() == 1:
        yield
        return
    peers = _connect()
    watch = threading.Thread(target=_watch, args=(dict(peers), next_move), daemon=True)
    watch.start()
    try:
        yield
    except Exception as error:
        watch.join(2 * BEAT)  # a collective fails if another process died: then the watch ends this one, with a reason
        _tell(peers, f"process {state.process_id} of {count()} failed ({error})".encode())
        raise
    for peer in peers:
        peer.send_bytes(b"bye")
    barrier()
    watch.join()  # it has read the last message of every peer
    for peer in peers:
        peer.close()


def _connect() -> Peers:
    """Return the connections of this process: from process 0 to each other one, from each of these to process 0.

    All arrive here before any connects: until now they may have prepared their data alone, which takes hours.
    """
    barrier()
    key = connections.run_key("watch", from_first(secrets.token_hex))
    host = state.coordinator_address.rpartition(":")[0].strip("[]")
    if not is_first():
        port = from_first(int)
        try:
            return {connections.connect(host, port, key, state.process_id, meeting.FIND): 0}
        except OSError as error:
            raise ValueError(
                f"process 0 can't be reached at {host}:{port} ({error}); let the machines of a run reach each other on "
                "all ports, and set LLM_JAX_SECRET to the same text on all of them"
            ) from None
    with connections.listen(host, 0) as listener:
        port = listener.getsockname()[1]
        from_first(lambda: port)
        arrivals = connections.gather(listener, key, count(), meeting.FIND)
    if absent := meeting.absent_from(arrivals, count(), f"{host}:{port}"):
        raise ValueError(f"{absent}; let the machines of a run reach each other on all ports")
    return {peer: number for number, peer in arrivals.peers.items()}


def _watch(peers: Peers, next_move: str) -> None:
    heard, due = dict.fromkeys(peers, time.monotonic()), 0.0
    while peers:
        if time.monotonic() >= due:
            due = time.monotonic() + BEAT
            _tell(peers, b"beat")
        ready: list[Any] = wait(list(peers), timeout=max(0, due - time.monotonic()))
        for peer in ready:
            try:
                word = peer.recv_bytes(connections.LONGEST)
            except (EOFError, OSError):
                word = f"process {peers[peer]} of {count()} is gone".encode()
            if word == b"bye":
                del peers[peer]
            elif word != b"beat":
                _end(peers, word.decode(errors="replace"), next_move)
            heard[peer] = time.monotonic()
        for peer, number in peers.items():
            if time.monotonic() - heard[peer] > SILENCE:
                _end(peers, f"process {number} of {count()} has not been heard for {SILENCE} s", next_move)


def _end(peers: Peers, reason: str, next_move: str) -> None:
    if is_first():
        _tell(peers, reason.encode())
    reason = " ".join(reason.split())
    os.write(2, f"llm-jax: error: {reason}, and this one stops; {next_move}\n".encode())
    leave(GONE)


def _tell(peers: Peers, word: bytes) -> None:
    for peer in peers:
        connections.tell(peer, word)
