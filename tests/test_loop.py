"""The loop meets everything that can happen to a run, and says what it does about it in one line."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from tiny_run import console, last_checkpoint, rows, said, write_corpus

from llm_jax import log, tree
from llm_jax.data.loader import Batch, Loader
from llm_jax.runs import folder as run_folder
from llm_jax.runs import loop, pause, session
from llm_jax.runs.checkpoint import Checkpoints, Progress
from llm_jax.runs.fit import fit, resume
from llm_jax.runs.folder import create, owned
from llm_jax.runs.refusals import Diverged
from llm_jax.runs.session import Session
from llm_jax.runs.signals import Stop
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program
from llm_jax.train.step import TrainState

ROOT = Path(__file__).parents[1]


@pytest.fixture
def say() -> Console:
    return console()


@pytest.fixture(scope="module")
def finished_run(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(config, folder, console=console())
    return folder


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """A run of eight steps, with checkpoints of steps 4, 6 and 8, to be tampered with."""
    return shutil.copytree(finished_run, tmp_path / "finished")


def steps(folder: Path) -> list[int]:
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.steps()


def before_step(monkeypatch: pytest.MonkeyPatch, act: Any) -> None:
    """Call `act(step, state)` before each step: it raises, or returns the state to continue from."""
    original = Program.train_step

    def train_step(self: Program, state: Any, batch: Any) -> Any:
        return original(self, act(int(state.step), state), batch)

    monkeypatch.setattr(Program, "train_step", train_step)


def fail_at(step: int, error: BaseException) -> Any:
    def act(now: int, state: Any) -> Any:
        if now == step:
            raise error
        return state

    return act


# Beginning.


def test_a_finished_run_has_a_row_a_step_checkpoints_and_a_report(finished: Path):
    written = rows(finished)
    assert [row["step"] for row in written] == list(range(1, 9))
    assert [row["step"] for row in written if "heldout_loss" in row] == [4, 8]
    assert steps(finished) == [8, 6]
    assert (finished / "report.html").is_file()


def test_a_folder_that_holds_a_run_is_refused_before_anything_is_computed(finished: Path, config, say):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=f"already holds a run; continue it: llm-jax resume {finished}"):
        fit(config, finished, console=say)
    assert (finished / "metrics.jsonl").read_bytes() == before
    assert said(say) == ""


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_what_fails_before_the_first_step_leaves_nothing(error, config, tmp_path: Path, say, monkeypatch):
    before_step(monkeypatch, fail_at(0, error))
    with pytest.raises(type(error)):
        fit(config, tmp_path / "runs" / "a", console=say)
    assert not (tmp_path / "runs" / "a").exists()


def test_a_disk_that_is_full_at_the_first_file_leaves_nothing(config, tmp_path, say, monkeypatch):
    def full(folder: Path, config: RunConfig) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "save_config", full)
    (tmp_path / "empty").mkdir()
    for name, stays in (("new", False), ("empty", True)):
        with pytest.raises(OSError, match="No space left"):
            fit(config, tmp_path / name, console=say)
        assert (tmp_path / name).exists() == stays
    assert not list((tmp_path / "empty").iterdir())


@pytest.mark.slow
def test_a_run_of_relative_paths_resumes_from_another_folder(config, tmp_path, say, monkeypatch):
    monkeypatch.chdir(Path(config.data.uri).parent)
    data = dataclasses.replace(config.data, uri=Path(config.data.uri).name)
    fit(dataclasses.replace(config, data=data, steps=3), tmp_path / "run", console=say)
    monkeypatch.chdir(tmp_path)
    assert resume("run", steps=4, console=say).progress.step == 4


def test_init_from_takes_the_best_weights_and_nothing_else(finished: Path, config, tmp_path, say, monkeypatch):
    before_step(monkeypatch, fail_at(2, RuntimeError("stop here")))
    with pytest.raises(RuntimeError, match="stop here"):
        fit(dataclasses.replace(config, init_from=str(finished)), tmp_path / "run", console=say)
    state, progress = last_checkpoint(tmp_path / "run", config)
    best, _ = last_checkpoint(finished, config)
    assert progress.step == 0
    assert tree.fingerprint(state.params) == tree.fingerprint(best.params)
    assert tree.fingerprint(state.opt_state) == tree.fingerprint(Program.on(config).init().opt_state)
    assert f"restored from {finished} at step 8: weights, nothing else" in said(say)


def test_init_from_says_in_what_the_models_differ(finished: Path, config, tmp_path, say, monkeypatch):
    before_step(monkeypatch, fail_at(0, RuntimeError("stop here")))
    model = dataclasses.replace(config.model, dropout=0.0)
    with pytest.raises(RuntimeError, match="stop here"):
        fit(dataclasses.replace(config, model=model, init_from=str(finished)), tmp_path / "run", console=say)
    assert "is not quite this one: dropout is 0.1 there, 0.0 here" in said(say)


def test_init_from_a_model_of_another_shape_is_an_error_with_both(finished: Path, config, tmp_path, say):
    model = dataclasses.replace(config.model, d_ff=64)
    message = r"params/layers/feedforward/w_down is float32 \[2, 32, 32\] there, float32 \[2, 64, 32\] here"
    with pytest.raises(ValueError, match=message):
        fit(dataclasses.replace(config, model=model, init_from=str(finished)), tmp_path / "run", console=say)
    assert not (tmp_path / "run").exists()


def test_init_from_a_run_of_another_tokenizer_is_refused_with_its_name(finished, config, tmp_path, say):
    data = dataclasses.replace(config.data, tokenizer="char")
    with pytest.raises(ValueError, match=f"knows the tokens of byte.* set data.tokenizer={finished}/tokenizer"):
        fit(dataclasses.replace(config, data=data, init_from=str(finished)), tmp_path / "run", console=say)


# Reading ahead.


def test_an_error_in_reading_a_batch_comes_at_its_step_as_it_is(config, tmp_path: Path, say, monkeypatch):
    class Unreadable(Exception):
        pass

    original = Loader.batch

    def batch(self: Loader, step: int) -> Batch:
        if step == 4:
            raise Unreadable("row 65 of the table")
        return original(self, step)

    monkeypatch.setattr(Loader, "batch", batch)
    with pytest.raises(Unreadable, match="row 65 of the table"):
        fit(config, tmp_path / "run", console=say)
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]
    assert steps(tmp_path / "run") == [4, 3]
    assert not readers()


def test_a_run_that_ends_leaves_no_reader_and_has_its_waits(config, tmp_path: Path, say):
    fit(dataclasses.replace(config, steps=3), tmp_path / "run", console=say)
    assert not readers()
    assert all(0 <= row["data_wait"] < 60 for row in log.read(tmp_path / "run"))


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


# Resuming.


def test_resume_says_what_it_restores_and_that_the_schedule_stretches(finished: Path, say, monkeypatch):
    before_step(monkeypatch, fail_at(8, RuntimeError("stop here")))
    with pytest.raises(RuntimeError, match="stop here"):
        resume(finished, steps=10, console=say)
    text = said(say)
    assert f"resumed {finished} at step 8 of 10: weights, optimizer, schedule and data position (epoch " in text
    assert re.search(r"steps 8 -> 10: the cosine schedule stretches, .* is 0.000\d+ instead of 0.0001", text)
    assert json.loads((finished / "config.json").read_text())["steps"] == 10


@pytest.mark.parametrize(
    ("rates", "says"),
    [((0.005, 0.005), "\n"), ((0.005, 0.0050001), ", and here the learning rate is 0.0050001 instead of 0.005\n")],
)
def test_rates_that_differ_look_different(rates, says: str, finished: Path, say, monkeypatch):
    before_step(monkeypatch, fail_at(8, RuntimeError("stop here")))
    monkeypatch.setattr(session, "make_schedule", lambda _, total: lambda step: rates[total - 8])
    with pytest.raises(RuntimeError, match="stop here"):
        resume(finished, steps=9, console=say)
    assert f"steps 8 -> 9: the cosine schedule stretches{says}" in said(say)


def test_resume_of_a_finished_run_is_an_error_that_names_steps(finished: Path, say):
    with pytest.raises(ValueError, match="is finished at step 8; train further with more steps: --steps N, or llm_jax"):
        resume(finished, console=say)
    assert said(say) == ""


def test_resume_passes_over_a_damaged_checkpoint_and_saves_its_step_again(finished: Path, config, say):
    expected, _ = last_checkpoint(finished, config)
    for path in (finished / "checkpoints" / "8").rglob("d/*"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    assert resume(finished, console=say).progress.step == 8
    assert f"passed over the checkpoint of step 8, {finished}/checkpoints/8: it is damaged" in said(say)
    assert f"set aside {finished}/checkpoints/8.damaged" in said(say)
    assert f"resumed {finished} at step 6 of 8" in said(say)
    state, _ = last_checkpoint(finished, config)
    assert tree.fingerprint(state) == tree.fingerprint(expected)
    assert [row["step"] for row in rows(finished)] == list(range(1, 9))


def test_rows_that_are_gone_are_named_on_resume(finished: Path, say, monkeypatch):
    before_step(monkeypatch, fail_at(8, RuntimeError("stop here")))
    path = finished / "metrics.jsonl"
    kept = path.read_text().splitlines(keepends=True)
    for left, lost in ((kept[3:5] + kept[6:], "1 to 3, 6"), (kept[:4], "5 to 8"), (None, "1 to 8")):
        path.write_text("".join(left)) if left is not None else path.unlink()
        with pytest.raises(RuntimeError, match="stop here"):
            resume(finished, steps=9, console=say)
        assert f"{path} has no row of step {lost}; report.html lacks them too" in said(say)


def test_what_was_measured_last_is_returned_and_that_nothing_stopped_it(finished: Path, config, say):
    progress = resume(finished, steps=9, console=say).progress
    assert progress.heldout_loss == rows(finished)[-1]["heldout_loss"]
    assert not progress.stopped


def test_the_last_heldout_loss_may_be_that_of_an_earlier_step(finished: Path):
    losses = {row["step"]: row["heldout_loss"] for row in rows(finished) if "heldout_loss" in row}
    here: Any = types.SimpleNamespace(folder=finished)
    found = [Session.last_heldout(here, Progress(step=step)) for step in (3, 4, 7, 8)]
    assert found == [None, losses[4], losses[4], losses[8]]


@pytest.mark.slow
def test_the_best_checkpoint_from_before_a_resume_stays_and_is_read(finished: Path, config, say, monkeypatch):
    original = pause.heldout
    monkeypatch.setattr(pause, "heldout", lambda *a: dataclasses.replace(original(*a), loss=9.0))
    before = Checkpoints(finished, read_only=True).best()
    assert resume(finished, steps=12, console=say).progress.heldout_loss == 9
    assert before == 8
    assert steps(finished) == [12, 9, 8]
    with Checkpoints(finished, read_only=True) as checkpoints:
        assert checkpoints.restore_params(Program.on(config).abstract_state.params, print)[1] == 8


def test_what_killed_writes_left_in_a_folder_is_gone_after_a_resume(finished: Path, say):
    left = [finished / f".{name}.123.part" for name in ("config.json", "report.html", "metrics.jsonl")]
    for path in left:
        path.write_text("half")
        os.utime(path, (0, 0))
    resume(finished, steps=9, console=say)
    assert not [path for path in left if path.exists()]


def test_a_run_whose_folder_is_moved_stops_and_says_where_it_is(config, tmp_path, say, monkeypatch):
    there, moved = tmp_path / "run", tmp_path / "moved"

    def act(now: int, state: Any) -> Any:
        if now == 5:
            while not (there / "checkpoints" / "4").exists():
                time.sleep(0.01)
            there.rename(moved)
            there.mkdir()
            (there / "notes.txt").write_text("somebody else's")
        return state

    before_step(monkeypatch, act)
    message = f"{there} was moved or removed while its run trained; the last good checkpoint is of step 4, "
    with pytest.raises(ValueError, match=f"{message}.* resume {moved}"):
        fit(config, there, console=say)
    assert [path.name for path in there.iterdir()] == ["notes.txt"]
    monkeypatch.undo()
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    assert resume(moved, console=say).progress.step == 8
    assert [row["step"] for row in rows(moved)] == list(range(1, 9))


def forget_shards(folder: Path) -> None:
    """Lets the run in `folder` look for its data as if its token shards had been deleted."""
    identity = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(identity | {"folder": str(folder / "deleted")}))


def test_resume_needs_no_text_while_its_shards_are_there(finished: Path, config, tmp_path, say):
    gone = dataclasses.replace(config.data, uri=str(tmp_path / "deleted.txt"))
    edit_config(finished, dataclasses.replace(config, data=gone, steps=9))
    assert resume(finished, console=say).progress.step == 9


def test_resume_without_its_shards_prepares_them_again(finished: Path, config, say):
    forget_shards(finished)
    assert resume(finished, steps=9, console=say).progress.step == 9


def test_resume_on_changed_data_is_an_error_with_what_changed(finished: Path, config, tmp_path, say):
    forget_shards(finished)
    changed = dataclasses.replace(config.data, uri=str(write_corpus(tmp_path / "corpus", documents=50)))
    edit_config(finished, dataclasses.replace(config, data=changed, steps=9))
    message = r"is not what .* has been trained on: train.documents is \d+ there, \d+ here; restore it, or start"
    with pytest.raises(ValueError, match=message):
        resume(finished, console=say)


def test_resume_with_the_config_of_another_model_names_both_sizes(finished: Path, config, say):
    model = dataclasses.replace(config.model, vocab_size=272)
    edit_config(finished, dataclasses.replace(config, model=model, steps=9))
    message = "made with: model.vocab_size is 264 there, 272 here; put back what was there"
    with pytest.raises(ValueError, match=message):
        resume(finished, console=say)
    assert steps(finished) == [8, 6]


def edit_config(folder: Path, config: RunConfig) -> None:
    run_folder.save_config(folder, config)


# What goes wrong on the way.


def poisoned(state: Any) -> Any:
    params = tree.map_with_path(
        lambda path, x: x.at[1].set(jnp.inf) if path == "layers/feedforward/w_down" else x, state.params
    )
    return state.replace(params=params)


def test_a_run_that_diverges_names_the_step_the_documents_and_the_layer(config, tmp_path, say, monkeypatch):
    before_step(monkeypatch, lambda step, state: poisoned(state) if step == 5 else state)
    with pytest.raises(Diverged) as error:
        fit(dataclasses.replace(config, patience=3), tmp_path / "run", console=say)
    assert re.fullmatch(
        r"loss, gradient or update was not finite in 3 steps in a row; at step 8, on documents .*\.txt.*, \.\.\.: "
        r"the first activation to go bad is mlp_out of layer 1; the last good checkpoint is of step 4; "
        rf"start anew with less learning rate and init_from={tmp_path}/run",
        str(error.value),
    )
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [0, 0, 0, 0, 0, 1, 2, 3]
    assert steps(tmp_path / "run") == [4, 3]  # not the due one of step 6
    assert last_checkpoint(tmp_path / "run", config)[1].skipped == 0


def skip_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    original = Program.train_step

    def train_step(self: Program, state: Any, batch: Any) -> Any:
        if int(state.step) != step:
            return original(self, state, batch)
        kept = jax.tree.map(jnp.copy, state)
        _, metrics = original(self, poisoned(state), batch)
        return kept.replace(step=kept.step + 1), metrics

    monkeypatch.setattr(Program, "train_step", train_step)


@pytest.mark.slow
def test_updates_that_are_not_finite_stop_a_run_whose_checkpoints_all_are(config, tmp_path, say):
    huge = dataclasses.replace(config.optimizer, learning_rate=3e38, name="lion")
    message = r"in 2 steps in a row; .*: loss and gradient are finite; the update makes \S+ NaN, infinite, or too large"
    with pytest.raises(Diverged, match=f"{message} to square; the last good checkpoint is of step 0; start anew"):
        fit(dataclasses.replace(config, optimizer=huge, patience=2), tmp_path / "run", console=say)
    assert [row["skipped"] for row in rows(tmp_path / "run")] == [1, 2]
    state, progress = last_checkpoint(tmp_path / "run", dataclasses.replace(config, optimizer=huge))
    assert progress.step == 0
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_run_whose_last_step_is_skipped_is_finished(config, tmp_path, say, monkeypatch):
    skip_step(monkeypatch, 7)
    assert fit(config, tmp_path / "run", console=say).progress.skipped_in_a_row == 1
    assert steps(tmp_path / "run")[0] == 8
    with pytest.raises(ValueError, match="is finished at step 8"):
        resume(tmp_path / "run", console=say)


def test_a_signal_during_the_last_save_does_not_break_it(config, tmp_path, say, monkeypatch):
    wait = Checkpoints.wait

    def interrupted(self: Checkpoints) -> None:
        if self._saving == 3:
            os.kill(os.getpid(), signal.SIGINT)
        wait(self)

    monkeypatch.setattr(Checkpoints, "wait", interrupted)
    assert not fit(dataclasses.replace(config, steps=3), tmp_path / "run", console=say).progress.stopped
    assert steps(tmp_path / "run")[0] == 3


def test_a_run_that_a_signal_stopped_says_so_and_has_the_last_loss(config, tmp_path, say, monkeypatch):
    def act(now: int, state: Any) -> Any:
        if now == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return state

    before_step(monkeypatch, act)
    progress = fit(config, tmp_path / "run", console=say).progress
    assert (progress.step, progress.stopped) == (6, True)
    assert progress.heldout_loss == rows(tmp_path / "run")[3]["heldout_loss"]
    assert not last_checkpoint(tmp_path / "run", config)[1].stopped


def test_a_bad_step_is_skipped_and_counted_and_the_run_continues(config, tmp_path, say, monkeypatch):
    skip_step(monkeypatch, 2)
    progress = fit(config, tmp_path / "run", console=say).progress
    assert (progress.step, progress.skipped, progress.skipped_in_a_row) == (8, 1, 0)
    bad = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[2]
    assert json.loads(bad)["loss"] is None
    assert 3 not in steps(tmp_path / "run")


def test_a_disk_full_at_the_first_checkpoint_advises_to_start_again(config, tmp_path, say, monkeypatch):
    def save(self: Any, *_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Checkpoints, "save", save)
    message = "No space left on device; there is no checkpoint yet; fix this, then start again"
    with pytest.raises(ValueError, match=message):
        fit(config, tmp_path / "run", console=say)
    assert not (tmp_path / "run").exists()


def test_a_run_that_another_process_trains_is_left_alone(finished: Path, say):
    before = (finished / "metrics.jsonl").read_text()
    with owned(finished), pytest.raises(ValueError, match=f"another process trains in {finished}; stop it"):
        resume(finished, steps=9, console=say)
    assert (finished / "metrics.jsonl").read_text() == before
    assert resume(finished, steps=9, console=say).progress.step == 9


def test_two_starts_in_one_folder_make_one_run(config, tmp_path: Path, say, monkeypatch):
    """The second begins while the first still prepares."""

    def begin(self: Session) -> Any:
        create(tmp_path / "run", config, self.shards, "")
        return original(self)

    original = Session.begin
    monkeypatch.setattr(Session, "begin", begin)
    with pytest.raises(ValueError, match="already holds a run"):
        fit(config, tmp_path / "run", console=say)
    assert (tmp_path / "run" / "config.json").exists()


def test_a_full_disk_is_one_line_with_the_last_good_checkpoint(config, tmp_path, say, monkeypatch):
    def write(self: Any, step: int, values: Any) -> None:
        if step == 6:
            raise OSError(28, "No space left on device")
        original(self, step, values)

    original = log.MetricsLog.write
    monkeypatch.setattr(log.MetricsLog, "write", write)
    folder = tmp_path / "run"
    message = f"^{folder}: No space left on device; the last good checkpoint is of step 4; .* llm-jax resume"
    with pytest.raises(ValueError, match=message) as error:
        fit(config, folder, console=say)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    assert resume(folder, console=say).progress.step == 8


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_cleanly_with_the_line_that_resumes(config, tmp_path: Path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"import pathlib, sys\nsys.path.append({str(Path(__file__).parent)!r})\nfrom tiny_run import tiny\n"
        f"config = tiny(pathlib.Path({config.data.uri!r}), steps=100_000)\n"
    )
    folder, output = tmp_path / "run", tmp_path / "output.txt"
    with open(output, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "llm_jax", "train", recipe, "--run", folder], cwd=ROOT, stdout=file, stderr=file
        )
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").stat().st_size:
        assert process.poll() is None, output.read_text()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    step = steps(folder)[0]
    assert f"stopped at step {step:,} of 100,000; resume with: llm-jax resume {folder}" in output.read_text()
    assert len(rows(folder)) == step


def called(*callbacks: Any) -> tuple[Any, Any]:
    state = TrainState(step=jnp.ones((), jnp.int32), params={}, opt_state={})
    metrics = {"loss": jnp.ones(())}
    found = loop.call_back(callbacks, 7, state, metrics)
    assert metrics == {"loss": 1}
    return found


def test_what_callbacks_return_is_copied_and_a_stop_loses_nothing():
    def stop(*_: Any) -> None:
        raise Stop("enough")

    def silent(*_: Any) -> None: ...

    added, reason = called(lambda step, state, _: {"step_of_state": state.step}, stop, silent, lambda *_: {"half": 0.5})
    assert {name: float(x) for name, x in added.items()} == {"step_of_state": 1.0, "half": 0.5}
    assert str(reason) == "enough"
    with pytest.raises(ValueError, match="a callback returned a metric 'half', and there is one so called; rename"):
        called(lambda *_: {"half": 0.5}, lambda *_: {"half": 0.5})
    added, _ = called(lambda *_: {"time": 1764520071.5, "ns": np.int64(2**40 + 1)}, lambda s, t, m: m.update(loss=0))
    assert added == {"time": 1764520071.5, "ns": 2**40 + 1}
    kept: list[jax.Array] = []
    added, _ = called(lambda step, state, _: kept.append(state.step) or {"copy": state.step})
    kept[0].delete()  # as the next step does
    assert float(added["copy"]) == 1


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (3, "a callback returned int; return {name: scalar} or None"),
        ({"loss": 1}, "a callback returned a metric 'loss', and metrics.jsonl has one so called; rename yours"),
        ({"step": 1}, "a callback returned a metric 'step', and metrics.jsonl has one"),
        ({"heldout_loss": 1}, "a callback returned a metric 'heldout_loss', and metrics.jsonl has one"),
        ({"a/b": 1}, "a callback returned a metric 'a/b'; write it without a slash"),
        ({3: 1}, "a callback returned a metric with the name 3; a name is a text"),
        ({"rates": np.zeros(3)}, r"metric 'rates' of a callback has shape \(3,\); return a scalar"),
        ({"name": "a"}, "metric 'name' of a callback is of type str; return a number"),
        ({"name": np.str_("a")}, "metric 'name' of a callback is of type str_; return a number"),
        ({"name": jax.random.key(0)}, "metric 'name' of a callback is of type .*; return a number"),
        ({"name": 1j}, "metric 'name' of a callback is of type complex; return a number"),
    ],
    ids=["number", "loss", "step", "heldout", "slash", "no name", "vector", "text", "numpy text", "key", "complex"],
)
def test_what_a_callback_may_not_return_is_refused_at_once(returned: Any, message: str):
    with pytest.raises(ValueError, match=message):
        called(lambda *_: returned)
