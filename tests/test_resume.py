"""The contract: a run that was stopped, at any step and by anything, equals the run that was not, bit for bit."""

import contextlib
import dataclasses
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
from tiny_run import batch_hash, console, last_checkpoint, rows, said, write_corpus

from llm_jax import tree
from llm_jax.data.loader import Loader
from llm_jax.runs.checkpoint import Progress
from llm_jax.runs.data import open_data
from llm_jax.runs.fit import fit, resume
from llm_jax.runs.folder import is_run, load_config
from llm_jax.sharding import MeshConfig
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

Hashes = dict[int, str]


class Killed(Exception):
    """Stands for whatever ends a process between two steps."""


@contextlib.contextmanager
def watched(before_step: Callable[[int], None] = lambda step: None) -> Iterator[Hashes]:
    """Gives the hash of every batch that is trained on, by step; calls `before_step` with the steps done."""
    hashes: Hashes = {}
    original = Program.train_step

    def train_step(self: Program, state: Any, batch: Any) -> Any:
        step = int(state.step)
        before_step(step)
        hashes[step] = batch_hash(batch)
        return original(self, state, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Program, "train_step", train_step)
        yield hashes


def kill_at(step: int) -> Callable[[int], None]:
    def before_step(now: int) -> None:
        if now == step:
            raise Killed

    return before_step


@pytest.fixture(scope="module")
def uninterrupted(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Hashes]:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    with watched() as hashes:
        fit(config, folder, console=console())
    return folder, hashes


def fit_or_resume(config: RunConfig, folder: Path) -> Progress:
    return resume(folder, console=console()) if is_run(folder) else fit(config, folder, console=console())


def assert_equal_runs(folder: Path, hashes: Hashes, config: RunConfig, uninterrupted: tuple[Path, Hashes]):
    expected, expected_hashes = uninterrupted
    assert hashes == expected_hashes
    assert rows(folder) == rows(expected)
    (state, progress), (expected_state, expected_progress) = (
        last_checkpoint(path, config) for path in (folder, expected)
    )
    assert tree.fingerprint(state) == tree.fingerprint(expected_state)
    assert progress == expected_progress


def test_the_tiny_run_meets_an_epoch_edge_inside_a_batch(config: RunConfig, uninterrupted):
    loader = Loader(open_data(config, print).split("train"), config.data)
    assert loader.epochs(config.steps)[0] > 2
    assert loader.epochs(1)[0] * loader.steps_per_epoch != 1
    assert [row["step"] for row in rows(uninterrupted[0])] == list(range(1, config.steps + 1))


@pytest.mark.parametrize("kills", [(2,), (5, 7)], ids=str)
def test_a_run_killed_between_steps_resumes_as_if_uninterrupted(
    kills: tuple[int, ...], config: RunConfig, uninterrupted, tmp_path: Path
):
    folder, seen = tmp_path / "run", {}
    for step in kills:
        with watched(kill_at(step)) as hashes, pytest.raises(Killed):
            fit_or_resume(config, folder)
        seen |= hashes
    with watched() as hashes:
        fit_or_resume(config, folder)
    assert min(hashes) <= kills[-1]  # it does again what no checkpoint holds, on the same batches
    assert all(seen.get(step, batch) == batch for step, batch in hashes.items())
    assert_equal_runs(folder, seen | hashes, config, uninterrupted)


@pytest.mark.slow
def test_a_run_resumes_in_another_layout_and_in_no_other_config(config: RunConfig, tmp_path: Path, uninterrupted):
    with watched(kill_at(5)), pytest.raises(Killed):
        fit(config, tmp_path / "run", console=console())
    with pytest.raises(ValueError, match=r"model.n_layers=3: .* only mesh., pipeline., .* may change"):
        resume(tmp_path / "run", layout={"model.n_layers": 3})
    screen = console()
    with watched() as hashes:
        resume(tmp_path / "run", layout={"mesh.data": 4, "mesh.tensor": -1}, console=screen)
    assert 0 < min(hashes) <= 5
    assert max(hashes) == 7
    assert "not the same bits as without the stop: mesh.tensor is 1 there, -1 here" in said(screen)
    assert load_config(tmp_path / "run").mesh == MeshConfig(data=4, tensor=-1)
    losses = [[row["loss"] for row in rows(folder) if "loss" in row] for folder in (tmp_path / "run", uninterrupted[0])]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


@pytest.mark.slow
def test_a_mixture_killed_and_resumed_equals_the_uninterrupted_one(config: RunConfig, tmp_path: Path, monkeypatch):
    """Under accumulation, from relative addresses, and from another folder."""
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "small", documents=30, seed=1)
    uri = f"{os.path.relpath(config.data.uri)}:0.7,small:0.3"
    mixed = dataclasses.replace(config, data=dataclasses.replace(config.data, uri=uri))
    with watched() as whole:
        fit(mixed, tmp_path / "whole", console=console())
    with watched(kill_at(5)) as before, pytest.raises(Killed):
        fit(mixed, tmp_path / "run", console=console())
    monkeypatch.chdir("/")
    screen = console()
    with watched() as after:
        resume(tmp_path / "run", console=screen)
    assert re.search(r"data position \(epoch \d\.\d\d of \S+, \d\.\d\d of small\) restored", said(screen))
    assert_equal_runs(tmp_path / "run", before | after, mixed, (tmp_path / "whole", whole))
    last = rows(tmp_path / "run")[-1]
    assert last["share/small"] == pytest.approx(0.3, abs=0.05)
    assert sum(share for name, share in last.items() if name.startswith("share/")) == pytest.approx(1)
    assert last["heldout_loss/small"] != last["heldout_loss"]


def test_a_run_does_not_resume_with_another_batch_size(config: RunConfig, uninterrupted):
    """Its step would be another position in the data."""
    with pytest.raises(ValueError, match=r"data.batch_size=8: a run resumes with its own config, .* change"):
        resume(uninterrupted[0], layout={"data.batch_size": 8})


def test_a_run_that_was_asked_to_stop_resumes_as_if_uninterrupted(
    config: RunConfig, uninterrupted, tmp_path: Path, capfd
):
    def ask(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "run"
    with watched(ask) as before:
        assert fit(config, folder, console=console()).progress.step == 5
    assert "stopping after this step, with a checkpoint" in capfd.readouterr().err
    assert last_checkpoint(folder, config)[1].step == 5
    with watched() as after:
        resume(folder, console=console())
    assert min(after) == 5
    assert_equal_runs(folder, before | after, config, uninterrupted)


DRIVER = """
import os, pathlib, sys, time
import jax
from tiny_run import batch_hash, tiny
from llm_jax.runs.fit import fit, resume
from llm_jax.train.program import Program

jax.config.update("jax_num_cpu_devices", 8)  # as conftest.py has them: the bits are those of this process
jax.config.update("jax_default_matmul_precision", "highest")
corpus, folder = map(pathlib.Path, sys.argv[2:])
original, rename = Program.train_step, os.rename

def train_step(self, state, batch):
    with open(folder.parent / "hashes.txt", "a") as file:
        print(int(state.step), batch_hash(batch), file=file)
    return original(self, state, batch)

def slow_rename(source, *rest, **options):
    if "orbax-checkpoint-tmp" in str(source):
        time.sleep(0.3)
    return rename(source, *rest, **options)

Program.train_step, os.rename = train_step, slow_rename
if sys.argv[1] == "train":
    fit(tiny(corpus), folder)
else:
    resume(folder)
"""


def start(verb: str, config: RunConfig, folder: Path) -> subprocess.Popen:
    folder.parent.mkdir(exist_ok=True)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    with open(folder.parent / "console.txt", "a") as output:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, verb, config.data.uri, folder],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            stdout=output,
            stderr=output,
        )


def kill_when(process: subprocess.Popen, reached: Callable[[], bool]) -> None:
    while not reached():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    process.wait()


def lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def test_a_run_killed_in_a_step_and_in_a_save_resumes_as_if_uninterrupted(
    config: RunConfig, uninterrupted, tmp_path: Path
):
    folder = tmp_path / "killed" / "run"
    process = start("train", config, folder)
    kill_when(process, lambda: lines(folder / "metrics.jsonl") >= 2)
    process = start("resume", config, folder)
    kill_when(process, lambda: any(folder.glob("checkpoints/6.orbax-checkpoint-tmp*")))
    assert any(folder.glob("checkpoints/6.orbax-checkpoint-tmp*"))
    assert start("resume", config, folder).wait() == 0

    said = (folder.parent / "console.txt").read_text()
    assert f"removed {folder}/checkpoints/6.orbax-checkpoint-tmp" in said
    assert "the save of step 6 was interrupted" in said
    batches = set((folder.parent / "hashes.txt").read_text().splitlines())
    assert batches == {f"{step} {batch}" for step, batch in uninterrupted[1].items()}
    assert_equal_runs(folder, uninterrupted[1], config, uninterrupted)
