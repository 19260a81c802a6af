"""Connections between the processes of one run, on a network where anyone may connect.

Process 0 listens, every other one connects. Each proves to the other that it knows the key of the run: by an HMAC over
random numbers of both, before anything else is read. What can't prove it (a port scanner, a browser, a client that
says nothing) is dropped after `GREETING` seconds at the latest, and never ends or blocks the meeting.
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
STRANGERS = 64  # connections that do so at once; one more is closed, and a process of the run tries again
RETRY = 0.2  # seconds until it does
LONGEST = 1 << 16  # bytes of a message
HELLO = b"llm_jax:1\n"
NONCE = 16
PROOF = hashlib.sha256().digest_size


class NotOurs(ConnectionError):
    """The other end can't prove that it belongs to this run."""


@dataclass
class Meeting:
    """Who came: a connection to each process by its number, and how many others were turned away."""

    peers: dict[int, Connection] = field(default_factory=dict)
    strangers: int = 0


def run_key(*parts: object) -> bytes:
    """The key of a run: what all its processes know, and with `LLM_JAX_SECRET` nobody else."""
    told = "\0".join([os.environ.get("LLM_JAX_SECRET", ""), *map(str, parts)])
    return hashlib.sha256(told.encode(errors="surrogateescape")).digest()


def listen(host: str, port: int) -> socket.socket:
    """Listen on `host` where that is an address of this machine or `localhost`, else on all of its addresses.

    A name can mean one address here (127.0.1.1, or that of another network card) and another one elsewhere.
    Raises `OSError` where the port is taken.
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


def gather(listener: socket.socket, key: bytes, count: int, seconds: int | float) -> Meeting:
    """Accept until processes 1 to `count` - 1 are there, or the time is up: then those that came."""
    meeting, arrived = Meeting(), queue.SimpleQueue[tuple[int, Connection] | None]()
    room = threading.BoundedSemaphore(STRANGERS)
    deadline = time.monotonic() + seconds
    listener.settimeout(RETRY / 2)
    while len(meeting.peers) < count - 1 and time.monotonic() < deadline:
        with contextlib.suppress(OSError):  # nobody, or one who left already
            connection, _ = listener.accept()
            if room.acquire(blocking=False):
                threading.Thread(target=_greet, args=(connection, key, arrived, room), daemon=True).start()
            else:
                connection.close()
        while not arrived.empty():
            _receive(meeting, arrived.get(), count)
    return meeting


def _receive(meeting: Meeting, arrival: tuple[int, Connection] | None, count: int) -> None:
    if arrival is None:
        meeting.strangers += 1
        return
    number, connection = arrival
    if number in meeting.peers or not 0 < number < count:
        tell(connection, f"--process {number} is another one already; give each process a number of its own".encode())
        connection.close()
    else:
        meeting.peers[number] = connection


def _greet(
    connection: socket.socket,
    key: bytes,
    arrived: "queue.SimpleQueue[tuple[int, Connection] | None]",
    room: threading.BoundedSemaphore,
) -> None:
    """Put who is at the other end into `arrived`: None for a stranger."""
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
    """Connect to process 0, as process `number`; tries until the time is up.

    Raises `NotOurs` where someone with another key is there, `OSError` where nobody is.
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
            raise ConnectionError("another program listens there")  # a run that ends, perhaps
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
    """Send `message`, or as much of it as may be sent; one that is gone is noticed where it is read."""
    with contextlib.suppress(OSError):
        connection.send_bytes(message[:LONGEST])


def _opened(connection: socket.socket) -> Connection:
    """The same, for whole messages: it may be silent for hours, while text is prepared."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return Connection(connection.detach())


def _proof(key: bytes, role: bytes, *parts: bytes) -> bytes:
    return hmac.digest(key, b"".join([role, *parts]), "sha256")


def _read(connection: socket.socket, size: int, deadline: float) -> bytes:
    """`size` bytes. Raises `OSError` where they don't come in time, however slowly they come."""
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
    parts = []
    for size in sizes:
        parts.append(data[:size])
        data = data[size:]
    return parts
