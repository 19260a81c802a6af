import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import largest_file

from llm_jax.compat import safetensors
from llm_jax.data.prepare import prepare
from llm_jax.files import locked, read_json, whole_folder, write_json, write_whole, written

# Opens a folder of ours, says so, and waits for its end.
FILLS = """
import sys, time
from pathlib import Path
from llm_jax.files import locked, whole_folder
with {opened}:
    print("open", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def another_process():
    """Runs a `with` block in a process of its own; the process, once it is inside the block."""
    started = []

    def start(opened: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", FILLS.format(opened=opened)], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_whole(path, "old")

    def full(_number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["report.html"]


def test_a_file_that_is_cut_by_a_few_bytes_is_never_taken_for_whole(tmp_path):
    """NumPy hands the end of an array to a buffer, and hears nothing of what becomes of it."""
    (tmp_path / "text.txt").write_text("abcd " * 4000)
    x, out = np.arange(10_000, dtype=np.float32).reshape(100, 100), tmp_path / "shards"
    writes: dict[str, Any] = {
        "model.safetensors": lambda path: safetensors.write_file(path, {"x": x.shape}, "float32", lambda _: x.T),
        "whole": lambda path: write_whole(path, x.tobytes()),
    }
    for name, write in writes.items():
        for most in (39_000, 36_000, 5):
            with largest_file(most), pytest.raises(OSError, match="File too large") as raised:
                write(tmp_path / name)
            assert raised.value.filename == str(tmp_path / name)
    for most in (39_000, 3_000, 5):
        with largest_file(most), pytest.raises(ValueError, match=f"cannot write {out}: File too large; fix that"):
            prepare(str(tmp_path / "text.txt"), out, tokenizer="byte", heldout=0.0)
        assert not list(tmp_path.glob("*shards*"))
    prepare(str(tmp_path / "text.txt"), out, tokenizer="byte", heldout=0.0)
    writes["model.safetensors"](tmp_path / "model.safetensors")
    np.testing.assert_array_equal(safetensors.open_file(tmp_path / "model.safetensors")["x"].read(), x.T)


def test_a_folder_that_can_not_be_filled_is_named_as_it_would_be_called(tmp_path):
    def named(*error: Any) -> str:
        with pytest.raises(OSError, match="full") as raised, whole_folder(tmp_path / "shards", "prepare") as folder:
            raise OSError(*(each.format(folder) if isinstance(each, str) else each for each in error))
        return raised.value.filename or str(raised.value)

    shards = str(tmp_path / "shards")
    assert named(28, "full") == shards
    assert named(28, "full", "{}/tokens") == f"{shards}/tokens"
    assert named(28, "full", "/elsewhere") == "/elsewhere"
    assert named("the disk of {} is full") == f"the disk of {shards} is full"
    with pytest.raises(OSError, match="No such file") as raised, written(tmp_path / "none" / "a"):
        pass
    assert raised.value.filename == str(tmp_path / "none" / "a")


def test_the_next_write_removes_what_a_killed_one_left(tmp_path):
    (killed := tmp_path / ".report.html.123.part").write_text("half")
    (other := tmp_path / ".config.json.123.part").write_text("half")
    (fresh := tmp_path / ".report.html.124.part").write_text("half")  # of a process that may still write
    for path in (killed, other):
        os.utime(path, (0, 0))
    write_whole(tmp_path / "report.html", b"whole")
    assert names(tmp_path) == sorted([other.name, fresh.name, "report.html"])


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def fail() -> None:
        with whole_folder(tmp_path / "shards", "prepare") as folder:
            (folder / "tokens").write_text("1 2 3")
            raise ValueError("no tokens")

    with pytest.raises(ValueError, match="no tokens"):
        fail()
    assert names(tmp_path) == []


def test_a_folder_never_replaces_one_that_appeared_meanwhile(tmp_path):
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "shards", "prepare"):
        (tmp_path / "shards").mkdir()
    assert names(tmp_path) == ["shards"]


def test_the_next_folder_removes_what_a_killed_process_left(tmp_path, another_process):
    opened = f"whole_folder(Path({str(tmp_path)!r}) / 'shards', 'prepare')"
    killed, alive = another_process(opened), another_process(opened)
    assert len(left := names(tmp_path)) == 2
    assert all(name.startswith(".shards.prepare.") for name in left)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with whole_folder(tmp_path / "shards", "prepare") as folder:
        assert len(names(tmp_path)) == 2  # that of the process which lives, and this one
        (folder / "tokens").write_text("1 2 3")
    assert alive.poll() is None
    assert len(names(tmp_path)) == 2
    assert names(tmp_path / "shards") == ["tokens"]


def test_what_is_left_under_an_unused_name_is_removed_after_a_day(tmp_path, another_process):
    """The folders of a cache are named by their content: of a text that has changed since the old name is lost."""
    alive = another_process(f"whole_folder(Path({str(tmp_path)!r}) / 'alive', 'prepare')")
    for name in (".old.prepare.a", ".new.prepare.b", ".old.import.c", ".none.prepare.d"):
        (tmp_path / name / "whole").mkdir(parents=True)
        (tmp_path / name / "lock").touch()
    (tmp_path / ".none.prepare.d" / "whole").rmdir()
    (tmp_path / ".file.prepare.e").touch()
    for path in tmp_path.rglob("*"):
        if not path.relative_to(tmp_path).parts[0].startswith(".new."):
            os.utime(path, (0, 0))
    before = names(tmp_path)
    with whole_folder(tmp_path / "shards", "prepare"):
        pass
    assert [name for name in before if name not in names(tmp_path)] == [".old.prepare.a"]
    assert alive.poll() is None


def test_one_process_owns_a_folder_until_it_ends(tmp_path, another_process):
    owner = another_process(f"locked(Path({str(tmp_path)!r}))")
    with pytest.raises(BlockingIOError), locked(tmp_path):
        pass
    owner.kill()
    owner.wait()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not JSON"),
        ('{"steps": 3', "is not JSON"),
        ("[" * 100_000, "is not JSON (nested too deeply)"),
        (f'{{"steps": {"9" * 5000}}}', "is not JSON"),
        ("\ud800", "is not JSON"),
        ("null", "holds null, expected an object"),
        ("[3]", "holds a list, expected an object"),
        ("{}", "has no 'steps'"),
        ('{"steps": "3"}', "'steps' is a string, expected an integer"),
        ('{"steps": true}', "'steps' is true or false, expected an integer"),
        ('{"steps": null}', "'steps' is null, expected an integer"),
    ],
)
def test_json_of_another_shape_is_refused_in_one_line(tmp_path, text, reason):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(ValueError) as error:
        read_json(path, {"steps": int}, advice="restore it")
    assert str(error.value).startswith(str(path))
    assert reason in str(error.value)
    assert str(error.value).endswith("; restore it")
    assert "\n" not in str(error.value)


def test_json_that_was_written_is_read_again(tmp_path):
    write_json(tmp_path / "config.json", found := {"steps": 3, "name": "é", "rate": None})
    assert read_json(tmp_path / "config.json", {"steps": int, "rate": (float, type(None))}, advice="") == found
    assert json.loads((tmp_path / "config.json").read_text()) == found
