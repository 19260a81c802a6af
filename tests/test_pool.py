"""The pool of processes that tokenizes, and its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_bpe import TEXT, trained

from llm_jax.data import pool


def session(leader: int) -> list[int]:
    """The processes of the session that `leader` began and that still run, itself among them."""
    told = subprocess.run(["ps", "-A", "-o", "pid=,sess=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in told.splitlines()]
    return [int(pid) for pid, sess, stat in rows if int(sess) == leader and not stat.startswith("Z")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ps of other systems has no sessions by number")
def test_a_killed_prepare_leaves_no_process_and_the_next_clears_its_folder(tmp_path: Path):
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "{"word " * 20_000}{n}"}}\n' for n in range(300)))
    command = [sys.executable, "-m", "llm_jax", "prepare", "text.jsonl", "--out", "out", "--tokenizer", "byte"]
    where = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}}
    prepare = subprocess.Popen([*command], start_new_session=True, stderr=subprocess.DEVNULL, **where)
    deadline = time.monotonic() + 120
    while len(session(prepare.pid)) < 4:  # itself, the tracker of resources, two workers
        assert prepare.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    prepare.send_signal(signal.SIGKILL)
    prepare.wait()
    killed = time.monotonic()
    while left := session(prepare.pid):
        if time.monotonic() - killed > 10:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} processes outlive a killed prepare by 10 s")
        time.sleep(0.05)
    assert [path.name.split(".")[:3] for path in tmp_path.glob(".*")] == [["", "out", "prepare"]]
    lines = (tmp_path / "text.jsonl").read_text().splitlines(keepends=True)[:100]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    subprocess.run(command, check=True, capture_output=True, **where)
    assert not list(tmp_path.glob(".*"))


def test_a_pool_encodes_many_texts_as_one_process_does(monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "BATCH_CHARS", 1000)
    texts = [TEXT[i : i + 400] for i in range(20)] * 4
    trained().save(tmp_path)
    monkeypatch.setattr(pool, "BATCHES_ALONE", 2)
    encoded = list(pool.encode_all(tmp_path, iter(texts)))
    assert [ids.tolist() for ids in encoded] == [trained().encode(text).tolist() for text in texts]


def die(folder: str, texts: list[str], special: bool):
    os._exit(1)


def test_a_process_that_dies_is_an_error_with_a_next_move(monkeypatch, tmp_path):
    monkeypatch.setattr(pool, "BATCHES_ALONE", 0)
    monkeypatch.setattr(pool, "_encode_batch", die)
    trained().save(tmp_path)
    with pytest.raises(ValueError, match=r"a process that tokenizes died.*__main__"):
        list(pool.encode_all(tmp_path, ["text"]))
