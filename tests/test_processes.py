"""Several processes are one run: the same numbers, files written once, one end. Real processes, over gloo."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_run import rows, write_corpus

from llm_jax import log
from llm_jax.data.loader import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.processes import watch
from llm_jax.sharding import MeshConfig
from llm_jax.train.config import RunConfig
from llm_jax.train.optimizer import OptimizerConfig

ROOT = Path(__file__).parents[1]
RECIPE = """
from test_processes import recipe

config = recipe({corpus!r})
"""
# In every process: what the last checkpoint and a batch hold, on each mesh, as a hash.
LOOK = """
import dataclasses, sys
from pathlib import Path
from tiny_run import batch_hash
from llm_jax import processes, tree
from llm_jax.data.loader import Loader
from llm_jax.sharding import MeshConfig
from llm_jax.runs import folder as run_folder
from llm_jax.runs.data import open_data
from llm_jax.runs.checkpoint import Checkpoints
from llm_jax.runs.run import Run
from llm_jax.train.program import Program

folder, (_, coordinator, _, n, _, i) = Path(sys.argv[1]), sys.argv[2:]
with processes.joined(coordinator, int(n), int(i)):
    for axis in ("data", "fsdp", "tensor"):
        mesh = MeshConfig(**{"data": 1, axis: -1})
        program = Program.on(dataclasses.replace(run_folder.load_config(folder), mesh=mesh))
        with Checkpoints(folder) as checkpoints:
            state, progress = checkpoints.restore(program.abstract_state, print)
        loader = Loader(open_data(program.config, print).split("train"), program.config.data, rows=program.rows)
        batch = program.put(loader.batch(5))
        seen = [tree.fingerprint(processes.gathered(state)), batch_hash(processes.gathered(batch)), progress.step]
        print("seen", *seen, flush=True)
    print("said", Run.open(folder).generate("ab", temperature=0.0, max_tokens=4), flush=True)
"""


def recipe(corpus: str) -> RunConfig:
    """Packed documents, accumulation and dropout; whatever devices there are share the rows and the parameters."""
    return RunConfig(
        model=ModelConfig(vocab_size=264, d_model=32, n_layers=2, n_heads=4, max_seq_len=32, d_ff=32, dropout=0.1),
        data=DataConfig(uri=corpus, tokenizer="byte", heldout=0.2, seq_len=32, batch_size=24),
        mesh=MeshConfig(data=1, fsdp=-1),
        optimizer=OptimizerConfig(warmup_steps=2),
        steps=6,
        accumulate=2,
        evaluate_every=3,
        evaluate_batches=1,
        checkpoint_every=4,
    )


class Launch:
    """A command under `scripts/launch/local`, and what it has written so far."""

    def __init__(self, output: Path, process: subprocess.Popen) -> None:
        self._output, self._process = output, process

    @property
    def text(self) -> str:
        return self._output.read_text(errors="replace")

    def pids(self) -> list[int]:
        return [int(pid) for pid in re.findall(r"is process (\d+)", self.text)]

    def wait(self, seconds: float) -> int:
        """The exit status, in time; then no process is left."""
        status = self._process.wait(seconds)
        assert not any(Path(f"/proc/{pid}").exists() for pid in self.pids())
        return status


@contextlib.contextmanager
def launched(folder: Path, number: int, *words: str) -> Iterator[Launch]:
    output = folder / f"output-{time.monotonic_ns()}"
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "LLM_JAX_CACHE": str(folder / "cache")}
    local = [sys.executable, str(ROOT / "scripts/launch/local"), str(number), "--", sys.executable, *words]
    command = ["timeout", "600", *local]  # ends it where pytest itself is killed, and can't
    with open(output, "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True
        )
    try:
        yield Launch(output, process)
    finally:
        for pid in Launch(output, process).pids():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait(10)


def done(folder: Path, number: int, *words: str, seconds: float = 400) -> str:
    with launched(folder, number, *words) as launch:
        status = launch.wait(seconds)
        assert status == 0, launch.text
        return launch.text


def wait_until(true: Callable[[], Any], launch: Launch, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert "error" not in launch.text, launch.text
        assert time.monotonic() < deadline, launch.text
        time.sleep(0.1)


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in log.read(folder)]


def make_folder(factory: pytest.TempPathFactory) -> Path:
    """Make a folder for the runs of a file, with one cache."""
    folder = factory.mktemp("processes")
    (folder / "tiny.py").write_text(RECIPE.format(corpus=str(write_corpus(folder / "corpus"))))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def four(runs: Path) -> str:
    """What a whole run of four processes said; it lies in `runs / "four"`."""
    return done(runs, 4, "-m", "llm_jax", "train", "tiny.py", "--run", "four")


@pytest.mark.slow
def test_four_processes_train_as_one_does(runs: Path, four: str):
    done(runs, 1, "-m", "llm_jax", "train", "tiny.py", "--run", "one")
    ours, theirs = rows(runs / "four"), rows(runs / "one")
    assert [list(row) for row in ours] == [list(row) for row in theirs]
    for one, other in zip(ours, theirs, strict=True):
        numbers = [[x for x in row.values() if isinstance(x, int | float)] for row in (one, other)]
        np.testing.assert_allclose(*numbers, rtol=2e-5)


@pytest.mark.slow
def test_one_of_four_processes_speaks_and_writes(runs: Path, four: str):
    for line in ("on 4 device(s) of 4 processes", "step 6/6", "held-out loss", "done; read four/report.html"):
        assert {row[:3] for row in four.splitlines() if line in row} == {"[0]"}
    assert steps(runs / "four") == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (runs / "four" / "checkpoints").iterdir()) == ["4", "6"]


@pytest.mark.slow
def test_one_and_two_processes_read_the_state_and_next_batch_of_four(runs: Path, four: str):
    (runs / "look.py").write_text(LOOK)
    texts = [done(runs, number, "look.py", "four") for number in (1, 2)]
    assert len({line for text in texts for line in re.findall("said .*", text)}) == 1  # each generates by itself
    seen = [re.findall("seen .*", text) for text in texts]
    assert [len(lines) for lines in seen] == [3, 6]
    assert len({line for lines in seen for line in lines}) == 1
    assert seen[0][0].endswith(" 6")


def test_the_launcher_names_the_process_that_died_not_the_one_that_noticed(tmp_path: Path):
    script = f"""
import os, signal, sys, time
if sys.argv[-1] == "0":
    sys.exit({watch.GONE})  # noticed
time.sleep(0.5)
os.kill(os.getpid(), signal.SIGKILL)  # reported later, as a large process that is killed may be
"""
    with launched(tmp_path, 2, "-c", script) as launch:
        assert launch.wait(30) == 128 + signal.SIGKILL, launch.text
        assert "[1] ended by SIGKILL, and the others with it" in launch.text
