"""Whoever connects: only a process that knows the key comes in, and nobody else ends or blocks the meeting."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from llm_jax.processes import connections

KEY = connections.run_key("test")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with connections.listen("localhost", 0) as found:
        yield found


def knock(listener: socket.socket, data: bytes, *, stay: bool = True) -> socket.socket:
    stranger = socket.create_connection(listener.getsockname())
    stranger.sendall(data)
    if not stay:
        stranger.close()
    return stranger


def test_strangers_neither_end_nor_block_a_meeting(listener: socket.socket):
    proof = connections.HELLO + (1).to_bytes(4) + bytes(connections.NONCE + connections.PROOF)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        gathered = pool.submit(connections.accept_all, listener, KEY, 3, 20)
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(5000), b"\xff" * 9, connections.HELLO, proof):
            stack.enter_context(knock(listener, data))  # silent from then on
            knock(listener, data, stay=False)
        started = time.monotonic()
        ours = [pool.submit(connections.connect, *listener.getsockname(), KEY, number, 20) for number in (2, 1)]
        arrivals = gathered.result()
        assert time.monotonic() - started < connections.GREETING / 2
        assert sorted(arrivals.peers) == [1, 2]
        arrivals.peers[2].send_bytes(b"word")
        assert ours[0].result().recv_bytes() == b"word"
        for connection in (*arrivals.peers.values(), *(future.result() for future in ours)):
            connection.close()


def test_more_strangers_than_there_is_room_for_only_delay_it(listener: socket.socket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "STRANGERS", 4)
    monkeypatch.setattr(connections, "GREETING", 0.3)
    before = threading.active_count()
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        gathered = pool.submit(connections.accept_all, listener, KEY, 2, 20)
        for _ in range(12):
            stack.enter_context(knock(listener, b""))
        with pool.submit(connections.connect, *listener.getsockname(), KEY, 1, 20).result():
            arrivals = gathered.result()
        assert sorted(arrivals.peers) == [1]
        assert arrivals.strangers >= 4
        arrivals.peers[1].close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_one_who_answers_a_byte_at_a_time_is_dropped_in_time(listener: socket.socket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(connections, "GREETING", 0.3)
    with ThreadPoolExecutor(1) as pool, knock(listener, b"") as slow:
        gathered = pool.submit(connections.accept_all, listener, KEY, 2, 1)
        with contextlib.suppress(OSError):  # it is told so, sooner or later
            for _ in range(40):
                slow.sendall(b"x")
                time.sleep(0.02)
        assert gathered.result().strangers == 1


def test_another_secret_is_refused_on_both_sides(listener: socket.socket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLM_JAX_SECRET", "another")
    with ThreadPoolExecutor(1) as pool:
        gathered = pool.submit(connections.accept_all, listener, KEY, 2, 0.5)
        with pytest.raises(connections.NotOurs, match="another LLM_JAX_SECRET"):
            connections.connect(*listener.getsockname(), connections.run_key("test"), 1, 5)
        assert not gathered.result().peers


def test_one_who_does_not_know_the_key_can_t_pose_as_process_0(listener: socket.socket):
    with ThreadPoolExecutor(1) as pool:
        joining = pool.submit(connections.connect, *listener.getsockname(), KEY, 1, 5)
        impostor, _ = listener.accept()
        with impostor:
            impostor.sendall(connections.HELLO + bytes(connections.NONCE))
            impostor.recv(1000)
            impostor.sendall(bytes(connections.PROOF))
            with pytest.raises(connections.NotOurs):
                joining.result()


def test_an_address_of_this_machine_is_all_that_is_listened_on():
    for host, told in (("localhost", "127.0.0.1"), ("127.0.0.1", "127.0.0.1")):
        with connections.listen(host, 0) as listener:
            assert listener.getsockname()[0] == told
    with connections.listen("a-name", 0) as listener:
        assert listener.getsockname()[0] in ("::", "0.0.0.0")
