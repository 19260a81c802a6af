"""A process that dies or hangs ends all the others, which say which one it was. Real processes, over gloo."""

import os
import re
import signal
import time
from pathlib import Path

import pytest
from test_processes import done, launched, make_folder, steps, wait_until

from llm_jax.processes import watch


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory)


@pytest.mark.slow
def test_a_run_resumes_after_a_signal_and_after_the_death_of_a_process(runs: Path):
    folder = runs / "stopped"
    changes = ("steps=1000", "prompts=", "evaluate_every=1000", "mesh.data=-1", "mesh.fsdp=1")
    words = ("-m", "llm_jax", "train", "tiny.py", "--run", "stopped", *changes)
    with launched(runs, 3, *words) as launch:
        wait_until(lambda: len(steps(folder)) > 2, launch)
        os.kill(launch.pids()[2], signal.SIGTERM)
        assert launch.wait(60) == 128 + signal.SIGTERM, launch.text
        (stopped,) = re.findall(r"stopped at step ([\d,]+) of 1,000", launch.text)
    assert (folder / "checkpoints" / stopped).is_dir()
    assert steps(folder) == list(range(1, int(stopped) + 1))

    with launched(runs, 3, "-m", "llm_jax", "resume", "stopped") as launch:
        wait_until(lambda: len(steps(folder)) > int(stopped) + 5, launch)
        assert f"resumed stopped at step {stopped}" in launch.text
        killed = time.monotonic()
        os.kill(launch.pids()[2], signal.SIGKILL)
        assert launch.wait(30) == 128 + signal.SIGKILL, launch.text
        assert time.monotonic() - killed < 30
        said = re.findall(r"\[(\d)\] llm-jax: error: (.*)", launch.text)
        assert sorted(number for number, _ in said) == ["0", "1"]
        assert {line.partition("; ")[0] for _, line in said} == {"process 2 of 3 is gone, and this one stops"}
        assert "Traceback" not in launch.text

    last = max(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdecimal())
    text = done(runs, 1, "-m", "llm_jax", "resume", "stopped", "--steps", str(last + 2))
    assert f"resumed stopped at step {last} of {last + 2}" in text
    assert steps(folder) == list(range(1, last + 3))


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_hangs_is_noticed(runs: Path, number: int):
    folder = runs / f"hung-{number}"
    with launched(runs, 2, "-m", "llm_jax", "train", "tiny.py", "--run", folder.name, "steps=100000") as launch:
        wait_until(lambda: len(steps(folder)) > 1, launch)
        os.kill(launch.pids()[number], signal.SIGSTOP)
        assert launch.wait(watch.SILENCE + 30) == watch.GONE, launch.text
        assert f"process {number} of 2 has not been heard for {watch.SILENCE} s" in launch.text
        assert "Check failure" not in launch.text
