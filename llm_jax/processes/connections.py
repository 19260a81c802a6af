"""Connections between the processes of one run, on a network where anyone may connect.

Process 0 listens, every other one connects. Each proves to the other that it knows the key of the run: by an HMAC over
random numbers of both, before anything else is read. A client that can't prove it (a port scanner, a browser, one that
sends nothing) is dropped after `GREETING` seconds at most, and never ends or blocks the others.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import os
import queue
import secrets
import socket
import threading
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

GREETING = 10.0  # seconds that one connection has to prove itself
STRANGERS = 64  # connections that do so at once; another one is closed, and a process of the run tries again
RETRY = 0.2  # seconds before it does
LONGEST = 1 << 16  # bytes of a message
HELLO = b"llm_jax:1\n"
NONCE = 16
PROOF = hashlib.sha256().digest_size


class NotOurs(ConnectionError):
    """The other end can't prove that it belongs to this run."""


@dataclass
class Arrivals:
    """Who connected: a connection to each process by its number, and the number of rejected strangers."""

    peers: dict[int, Connection] = field(default_factory=dict)
    strangers: int = 0


def run_key(*values: object) -> bytes:
    """Return the key of a run: what all its processes know, and with `LLM_JAX_SECRET` nobody else."""
    known = "\0".join([os.environ.get("LLM_JAX_SECRET", ""), *map(str, values)])
    return hashlib.sha256(known.encode(errors="surrogateescape")).digest()


def listen(host: str, port: int) -> socket.socket:
    """Listen on `host` if that is an IP address or `localhost`, else on all addresses of this machine.

    A name can mean one address here (127.0.1.1, or that of another network card) and another one elsewhere.
    Raise `OSError` if the port is taken.
    """
    try:
        family = {4: socket.AF_INET, 6: socket.AF_INET6}[ipaddress.ip_address(host).version]
        return socket.create_server((host, port), family=family, backlog=STRANGERS)
    except ValueError:
        if host == "localhost":
            return socket.create_server((host, port), backlog=STRANGERS)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 can be off in a kernel that knows it
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=STRANGERS)
    return socket.create_server(("", port), backlog=STRANGERS)


def gather(listener: socket.socket, key: bytes, count: int, seconds: int | float) -> Arrivals:
    """Accept until processes 1 to `count` - 1 are there, or the time is up; return those that came."""
    arrivals, arrived = Arrivals(), queue.SimpleQueue[tuple[int, Connection] | None]()
    room = threading.BoundedSemaphore(STRANGERS)
    deadline = time.monotonic() + seconds
    listener.settimeout(RETRY / 2)
    while len(arrivals.peers) < count - 1 and time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # nobody, or one that is gone already
            connection, _ = listener.accept()
            if room.acquire(blocking=False):
                threading.Thread(target=_greet, args=(connection, key, arrived, room), daemon=True).start()
            else:
                connection.close()
        while not arrived.empty():
            _receive(arrivals, arrived.get(), count)
    return arrivals


def _receive(arrivals: Arrivals, arrival: tuple[int, Connection] | None, count: int) -> None:
    if arrival is None:
        arrivals.strangers += 1
        return
    number, connection = arrival
    if number in arrivals.peers or not 0 < number < count:
        tell(connection, f"--process {number} is another one already; give each process a number of its own".encode())
        connection.close()
    else:
        arrivals.peers[number] = connection


def _greet(
    connection: socket.socket,
    key: bytes,
    arrived: "queue.SimpleQueue[tuple[int, Connection] | None]",
    room: threading.BoundedSemaphore,
) -> None:
    """Put the process at the other end into `arrived`; None for a stranger."""
    try:
        deadline = time.monotonic() + GREETING
        ours = secrets.token_bytes(NONCE)
        connection.settimeout(GREETING)
        connection.sendall(HELLO + ours)
        answer = _read(connection, len(HELLO) + 4 + NONCE + PROOF, deadline)
        hello, number, theirs, proof = _split(answer, len(HELLO), 4, NONCE, PROOF)
        if hello != HELLO or not hmac.compare_digest(proof, _proof(key, b"peer", ours, theirs, number)):
            raise NotOurs
        connection.sendall(_proof(key, b"first", theirs, ours, number))
        arrived.put((int.from_bytes(number), _opened(connection)))
    except OSError:
        connection.close()
        arrived.put(None)
    finally:
        room.release()


def connect(host: str, port: int, key: bytes, number: int, seconds: int | float) -> Connection:
    """Connect to process 0, as process `number`; retry until the time is up.

    Raise `NotOurs` if the other end has another key, `OSError` if nobody answers.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            left = max(RETRY, min(GREETING, deadline - time.monotonic()))
            return _introduce(socket.create_connection((host, port), timeout=left), key, number.to_bytes(4))
        except NotOurs:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(RETRY)


def _introduce(connection: socket.socket, key: bytes, number: bytes) -> Connection:
    try:
        deadline = time.monotonic() + GREETING
        hello, theirs = _split(_read(connection, len(HELLO) + NONCE, deadline), len(HELLO), NONCE)
        if hello != HELLO:
            raise ConnectionError("another program listens there")  # perhaps a run that is ending
        ours = secrets.token_bytes(NONCE)
        connection.sendall(HELLO + number + ours + _proof(key, b"peer", theirs, ours, number))
        try:
            proof = _read(connection, PROOF, deadline)
        except ConnectionError:
            proof = b""
        if not hmac.compare_digest(proof, _proof(key, b"first", ours, theirs, number)):
            raise NotOurs("it has another LLM_JAX_SECRET, or belongs to another run")
        return _opened(connection)
    except BaseException:
        connection.close()
        raise


def tell(connection: Connection, message: bytes) -> None:
    """Send `message`, cut to `LONGEST` bytes. A peer that is gone is noticed by reading, not here."""
    with contextlib.suppress(OSError):
        connection.send_bytes(message[:LONGEST])


def _opened(connection: socket.socket) -> Connection:
    """Return the connection for whole messages; it may be silent for hours, while text is prepared."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return Connection(connection.detach())


def _proof(key: bytes, role: bytes, *values: bytes) -> bytes:
    return hmac.digest(key, b"".join([role, *values]), "sha256")


def _read(connection: socket.socket, size: int, deadline: float) -> bytes:
    """Return `size` bytes. Raise `OSError` unless all arrive before `deadline`."""
    data = b""
    while len(data) < size:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer")
        connection.settimeout(left)
        piece = connection.recv(size - len(data))
        if not piece:
            raise ConnectionResetError("closed by the other end")
        data += piece
    return data


def _split(data: bytes, *sizes: int) -> list[bytes]:
    fields = []
    for size in sizes:
        fields.append(data[:size])
        data = data[size:]
    return fields
