"""The pool of processes that tokenizes, and its end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_bpe import TEXT

from llm_jax.data import pool
from llm_jax.data.addresses import File
from llm_jax.data.prepare import prepare
from llm_jax.data.sources import documents, open_files
from llm_jax.data.tokenizer import build


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


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of small files and a large one, among them an empty one; documents end in each of them."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(12):
        lines = [f"{number} {line} {TEXT[line : line + 40]}" for line in range(3 + 80 * (number == 5))]
        (folder / f"{number:02}.txt").write_text("<|endoftext|>".join(lines) if number != 3 else "")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_are_the_same_however_many_processes_tokenize(text: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pool, "JOB_BYTES", 500)
    told: dict[int, list[str]] = {1: [], 2: []}
    for workers in told:
        prepare(str(text), tmp_path / str(workers), tokenizer="byte", workers=workers, report=told[workers].append)
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert told[1] == told[2]


@pytest.mark.parametrize("limit", [-1, 1000, 1 << 30])
def test_what_jobs_give_does_not_depend_on_who_reads_the_files(limit: int, text: Path, monkeypatch):
    monkeypatch.setattr(pool, "JOB_BYTES", 300)
    files, tally = open_files(str(text), None, None, print)
    sizes = {file: file.size for file in files}
    jobs = list(pool._jobs(pool._pieces(sizes, limit, None, tally), sizes))
    read = [piece for job in jobs for piece in job if isinstance(piece, File)]
    assert len(read) == {-1: 0, 1000: 11, 1 << 30: 12}[limit]
    tokenizer, reading = build("byte", tuple), pool.Reading(None, "", special=False)
    found = [pool.encode(tokenizer, reading, job) for job in jobs]
    every = list(documents(str(text)))
    assert [origin for one in found for origin in one.origins] == [document.origin for document in every]
    expected = [tokenizer.encode(document.text) for document in every]
    assert np.concatenate([one.ids for one in found]).tolist() == np.concatenate(expected).tolist()
    assert [size for one in found for size in one.sizes.tolist()] == [len(ids) for ids in expected]


def test_rows_without_text_are_counted_over_all_jobs(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pool, "JOB_BYTES", 1)
    (tmp_path / "rows").mkdir()
    for number in range(3):
        (tmp_path / "rows" / f"{number}.jsonl").write_text('{"text": "<|endoftext|>"}\n{"text": ""}\n{"text": "b"}\n')
    told: list[str] = []
    prepare(str(tmp_path / "rows"), tmp_path / "out", tokenizer="byte", heldout=0.0, workers=1, report=told.append)
    assert told[1:3] == [
        f"{tmp_path}/rows: the text is the column 'text'",
        "0.jsonl#0 spells <|endoftext|>, which is read as text; for the token set data.special=true",
    ]
    assert f"{tmp_path}/rows: 3 of 9 rows have no 'text' (first: 0.jsonl, line 2)" in told


def die(folder: Path, reading: pool.Reading, job: pool.Job):
    os._exit(1)


def test_a_process_that_dies_is_an_error_with_a_next_move(monkeypatch, text: Path, tmp_path: Path):
    monkeypatch.setattr(pool, "_encode_here", die)
    with pytest.raises(ValueError, match=r"a process that tokenizes died.*__main__"):
        prepare(str(text), tmp_path / "out", tokenizer="byte", workers=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (0, "workers=0 tokenizes nothing; use 1 or more"),
        ("many", "workers=many is unknown; expected a number of processes, ray, or ray://HOST:PORT"),
        ("ray", r"workers=ray needs Ray; pip install 'llm-jax\[ray\]'"),
        ("ray://head:10001", r"needs Ray; pip install 'llm-jax\[ray\]'"),
    ],
)
def test_workers_that_cannot_be_had_are_refused_at_once(workers, message, text: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=message):
        prepare(str(text), tmp_path / "out", tokenizer="byte", workers=workers)
    assert pool.workers_of("3") == 3
    assert not (tmp_path / "out").exists()
