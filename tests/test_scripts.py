"""What the shell scripts decide, with stand-ins for the programs that they start."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SAVES = """
import os, signal, sys, time
def stop(number, frame):
    time.sleep(0.2)
    os.write(1, b"saved\\n")  # not print, which the signal may interrupt
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("runs", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_script_stops_what_it_runs_and_then_the_script(number: int):
    script = f"set -euo pipefail; source scripts/setup; stoppable '{sys.executable}' -c '{SAVES}'; echo continued"
    bash = subprocess.Popen(["bash", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert bash.stdout is not None
        assert bash.stdout.readline() == "runs\n"
        bash.send_signal(number)
        said, _ = bash.communicate(timeout=20)
    finally:
        bash.kill()
    assert (bash.returncode, said) == (128 + number, "saved\n")


@pytest.mark.parametrize(("status", "said"), [(0, "continued"), (2, "")])
def test_a_script_continues_only_where_what_it_ran_succeeded(status: int, said: str):
    script = f"set -euo pipefail; source scripts/setup; stoppable sh -c 'exit {status}'; echo continued"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (status, said)


@pytest.mark.parametrize(
    ("words", "started"),
    [
        (["train", "web", "--run", "runs/web"], "train web --run runs/web --resume"),
        (["train", "web", "--run=runs/web", "steps=5"], "train web --run=runs/web steps=5 --resume"),
        (["train", "web"], "train web --resume"),
        (["resume", "runs/web", "mesh.fsdp=4"], "resume runs/web mesh.fsdp=4"),
    ],
)
def test_a_job_of_slurm_that_is_submitted_again_resumes(words: list[str], started: str, tmp_path: Path):
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / "srun").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = [ROOT / "scripts/launch/slurm", *words]
    told = subprocess.run(script, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told == f"--kill-on-bad-exit=1 --label llm-jax {started}\n"


@pytest.mark.parametrize("script", ["quickstart", "setup", "test", "launch/slurm", "launch/tpu_vm"])
def test_a_script_needs_no_more_than_bash_3_2_and_the_tools_of_macos(script: str):
    """macOS has bash 3.2 and BSD's tools. Words that only newer ones, or GNU's, know."""
    text = (ROOT / "scripts" / script).read_text()
    newer = ["declare -A", "local -n", "mapfile", "readarray", "${1,,}", "wait -n", "&>>", "|&", "coproc", "[-1]"]
    gnu = [
        "readlink -f",
        "sed -i",
        "grep -P",
        "date -d",
        "stat -c",
        "xargs -r",
        "mktemp --",
        "md5sum",
        "nproc",
        "cp -t",
    ]
    assert [word for word in [*newer, *gnu] if word in text] == []
    subprocess.run(["bash", "-n", ROOT / "scripts" / script], check=True)
