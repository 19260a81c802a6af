"""Ray tokenizes as one process does, and says in one line what went wrong. `pip install 'llm-jax[ray]'`."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_pool import content

from llm_jax.data import pool
from llm_jax.data.prepare import prepare

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray leaves sockets and files to the garbage collector
]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        lines = (f'{{"text": "{number} {line} {"word " * line}"}}\n' for line in range(40))
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a cluster of two cores, whose machines have what this one has."""
    with socket.socket() as free, socket.socket() as other:
        free.bind(("", 0)), other.bind(("", 0))
        port, client = free.getsockname()[1], other.getsockname()[1]
    # A folder of its own: `ray.init()` elsewhere would look for a cluster that has gone. Sockets need short paths.
    folder = tempfile.mkdtemp(prefix="ray")
    options = [f"--port={port}", f"--ray-client-server-port={client}", "--num-cpus=2", f"--temp-dir={folder}"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", *options]
    there = os.environ | {"PYTHONPATH": str(ROOT), "RAY_raylet_start_wait_time_s": "300"}
    started = subprocess.Popen(
        command, env=there, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 300
        while not answers(client):
            assert started.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield f"ray://127.0.0.1:{client}"
    finally:  # not by `ray stop`, which ends all Ray on this machine
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        shutil.rmtree(folder, ignore_errors=True)


def answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.mark.parametrize("shared", [False, True], ids=["sent", "read there"])
def test_a_cluster_makes_the_same_shards(shared: bool, text: Path, tmp_path: Path, head: str, monkeypatch):
    monkeypatch.setattr(pool, "JOB_BYTES", 2000)
    uri = f"file://{text}" if shared else str(text)
    for workers in (1, head):
        prepare(uri, tmp_path / str(workers)[:3], tokenizer="byte", workers=workers)
    assert content(tmp_path / "1") == content(tmp_path / "ray")


def test_what_a_worker_cannot_read_is_one_line(text: Path, tmp_path: Path, head: str):
    (text / "3.jsonl").write_text('{"text": "a"}\n{"text": 7}\n')
    with pytest.raises(ValueError, match=r"3.jsonl, line 2: 'text' is a number, expected a string") as caught:
        prepare(f"file://{text}", tmp_path / "out", tokenizer="byte", workers=head)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_address_without_a_cluster_is_one_line(text: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no Ray cluster answers at ray://127.0.0.1:9: .*ray start --head") as caught:
        prepare(str(text), tmp_path / "out", tokenizer="byte", workers="ray://127.0.0.1:9")
    assert "\n" not in str(caught.value)
