"""Checkpoints: what is restored is what was saved, or it is passed over by name."""

import dataclasses
import itertools
import logging
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax import tree
from llm_jax.runs import folder as run_files
from llm_jax.runs.checkpoint import Checkpoints, NotFinite, Progress
from llm_jax.runs.checksum import checksums
from llm_jax.train.step import TrainState


def state_of(step: int, width: int = 40) -> TrainState:
    key = jax.random.key(step)
    params = {"layers": {"w": jax.random.normal(key, (2, width, width))}, "scale": jnp.ones(width)}
    moments = jax.tree.map(lambda x: x * 0.1, params)
    return TrainState(jnp.int32(step), params, ({"mu": moments, "count": jnp.int32(step)}, ()))


def abstract(state: TrainState) -> TrainState:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def save(folder: Path, *steps: int, keep: int = 2, losses: dict[int, float] | None = None) -> None:
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step), Progress(step=step, heldout_loss=(losses or {}).get(step)))


def restore(folder: Path) -> tuple[TrainState, Progress, list[str]]:
    told: list[str] = []
    with Checkpoints(folder) as checkpoints:
        restored = checkpoints.restore(abstract(state_of(0)), told.append)
    assert restored is not None
    return *restored, told


def data_files(folder: Path, step: int, item: str = "") -> list[Path]:
    """The files of a checkpoint that hold arrays or the record, the largest first."""
    files = [path for path in (folder / "checkpoints" / str(step) / item).rglob("*") if path.is_file()]
    files = [path for path in files if path.parent.name == "d" or path.name == "metadata"]
    return sorted(files, key=lambda path: path.stat().st_size, reverse=True)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    save(folder, 10, 20)
    return folder


@pytest.fixture
def run(two_checkpoints: Path, tmp_path: Path) -> Path:
    """A folder with checkpoints of steps 10 and 20, to be damaged."""
    return shutil.copytree(two_checkpoints, tmp_path / "run")


@pytest.mark.smoke
def test_a_checkpoint_gives_back_every_bit(run: Path):
    state, progress, told = restore(run)
    assert tree.fingerprint(state) == tree.fingerprint(state_of(20))
    assert progress == Progress(step=20)
    assert not told


def assert_nothing_else_was_said(capfd, caplog) -> None:
    """Orbax has a lot to say of what fails, and says it in tracebacks."""
    assert capfd.readouterr().err == ""
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("item", ["params", "opt_state", "record"])
def test_a_damaged_checkpoint_is_named_and_passed_over(run: Path, item: str, damage, capfd, caplog):
    damage(data_files(run, 20, item)[0])
    state, progress, told = restore(run)
    assert tree.fingerprint(state) == tree.fingerprint(state_of(10))
    assert progress.step == 10
    assert f"step 20, {run}/checkpoints/20" in told[0]
    assert "\n" not in "".join(told)
    assert_nothing_else_was_said(capfd, caplog)


def test_no_flipped_bit_comes_back_as_a_number(run: Path):
    draw = np.random.default_rng(0)
    for path in data_files(run, 20):
        original = path.read_bytes()
        content = bytearray(original)
        content[draw.integers(len(content))] ^= 1 << draw.integers(8)
        path.write_bytes(content)
        with Checkpoints(run, read_only=True) as checkpoints:
            params, step = checkpoints.restore_params(abstract(state_of(0)).params, print)
        assert tree.fingerprint(params) == tree.fingerprint(state_of(step).params)
        path.write_bytes(original)


def test_a_changed_digit_of_the_progress_is_noticed(run: Path):
    path = run / "checkpoints" / "20" / "record" / "metadata"
    text = path.read_text()
    assert text.count('"tokens": 0') == 1
    path.write_text(text.replace('"tokens": 0', '"tokens": 8'))
    _, progress, told = restore(run)
    assert progress == Progress(step=10)
    assert "its record is not what was saved" in told[0]


def test_a_passed_over_step_can_be_saved_again_and_the_damaged_one_stays(run: Path):
    flip_a_bit(data_files(run, 20)[0])
    for name in ("20.damaged", "20.damaged-2"):
        *_, told = restore(run)
        assert f"{run}/checkpoints/{name}" in told[-1]
        assert (run / "checkpoints" / name).is_dir()
        save(run, 20)
        assert restore(run)[1].step == 20
        flip_a_bit(data_files(run, 20)[0])


def test_where_no_checkpoint_can_be_read_all_stay_where_they_are(run: Path):
    for step in (10, 20):
        truncate(data_files(run, step)[0])
    with pytest.raises(ValueError, match=r"tried \[20, 10\]"):
        restore(run)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["10", "20"]


def test_what_an_interrupted_save_left_is_named_and_removed(run: Path):
    left = run / "checkpoints" / "30.orbax-checkpoint-tmp"
    shutil.copytree(run / "checkpoints" / "20", left)
    _, progress, told = restore(run)
    assert progress.step == 20
    assert told == [f"removed {left}: the save of step 30 was interrupted"]
    assert not left.exists()


def test_a_reader_changes_nothing(run: Path):
    flip_a_bit(data_files(run, 20, "params")[0])
    shutil.copytree(run / "checkpoints" / "10", run / "checkpoints" / "30.orbax-checkpoint-tmp")
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    with Checkpoints(run, keep=1, read_only=True) as checkpoints:
        assert checkpoints.restore_params(abstract(state_of(0)).params, print)[1] == 10
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_the_last_and_best_checkpoint_stay_and_a_resume_knows_the_best(tmp_path: Path):
    save(tmp_path, 1, 2, 3, 4, losses={1: 3.0, 2: 2.0, 3: 2.5})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [4, 3, 2]
        assert checkpoints.best() == 2
        assert checkpoints.is_best(1.9)
        assert not checkpoints.is_best(2.1)
        assert not checkpoints.is_best(None)
        assert checkpoints.restore_params(abstract(state_of(0)).params, print)[1] == 2
    save(tmp_path, 5, 6, losses={6: 2.1})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.steps() == [6, 5, 2]


def test_a_folder_is_known_again_where_numbers_of_files_change_unless_held(tmp_path: Path, monkeypatch):
    """As on some network and FUSE stores. One that was moved is not cleared, and that is said."""
    ours, held = run_files.identity, []
    real_open, real_close = os.open, os.close
    monkeypatch.setattr(os, "open", lambda *given, **more: held.append(real_open(*given, **more)) or held[-1])
    monkeypatch.setattr(
        os, "close", lambda opened: (held.remove(opened) if opened in held else None, real_close(opened))
    )
    numbers = itertools.count()
    monkeypatch.setattr(run_files, "identity", lambda folder: ours(folder) if held else (0, next(numbers)))
    said: list[str] = []
    with Checkpoints(tmp_path, keep=1, say=said.append) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(state_of(step), Progress(step=step))
        checkpoints.wait()
        assert checkpoints.steps() == [3]
        checkpoints.save(state_of(4), Progress(step=4))
        checkpoints._orbax.wait_until_finished()
        shutil.copytree(tmp_path / "checkpoints", tmp_path / "other")
        (tmp_path / "checkpoints").rename(tmp_path / "moved")
        (tmp_path / "other").rename(tmp_path / "checkpoints")
        checkpoints.wait()
        assert checkpoints.steps() == [4, 3]
    assert len(said) == 1
    assert "is not where step 4 was saved: older checkpoints are not deleted" in said[0]


@pytest.mark.parametrize("losses", [{1: float("nan"), 2: 5.0}, {1: 5.0, 2: float("nan")}], ids=str)
def test_a_loss_that_is_no_number_is_never_the_best(losses: dict[int, float], tmp_path: Path):
    save(tmp_path, 1, 2, losses=losses)
    with Checkpoints(tmp_path) as checkpoints:
        assert losses[checkpoints.best() or 0] == 5
        assert not checkpoints.is_best(float("nan"))


def test_a_checkpoint_of_another_model_is_an_error_with_both_shapes(run: Path):
    message = r"step 20 .* params/layers/w is float32 \[2, 40, 40\] there, float32 \[2, 48, 48\] here; use"
    with Checkpoints(run) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(abstract(state_of(0, width=48)), print)


def test_a_checkpoint_of_another_optimizer_is_an_error_that_names_the_leaf(run: Path):
    state = abstract(state_of(0))
    plain = dataclasses.replace(state, opt_state=({"count": state.opt_state[0]["count"]}, ()))
    message = r"opt_state/0/mu/layers/w is float32 \[2, 40, 40\] there, absent here"
    with Checkpoints(run) as checkpoints, pytest.raises(ValueError, match=message):
        checkpoints.restore(plain, print)


def test_a_checkpoint_of_another_optimizer_advises_to_keep_its_weights(run: Path):
    state = abstract(state_of(0))
    with Checkpoints(run) as checkpoints, pytest.raises(ValueError, match=f"start a new run with init_from={run}"):
        checkpoints.restore(dataclasses.replace(state, opt_state=()), print)


@pytest.mark.parametrize("empty", [(), (optax.EmptyState(), {}), optax.sgd(0.1).init({})], ids=str)
def test_an_optimizer_state_without_an_array_comes_back(empty, tmp_path: Path):
    state = dataclasses.replace(state_of(3), opt_state=empty)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(state, Progress(step=3))
        checkpoints.wait()
        restored = checkpoints.restore(abstract(state), print)
    assert restored is not None
    assert restored[0].opt_state == empty
    assert tree.fingerprint(restored[0]) == tree.fingerprint(state)


def test_a_state_with_empty_items_among_others_comes_back(tmp_path: Path):
    masked = optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1)}, {"layers": {"w": "a"}, "scale": "b"})
    state = dataclasses.replace(state_of(3), opt_state=masked.init(state_of(3).params))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, Progress(step=3))
        checkpoints.wait()
        restored = checkpoints.restore(abstract(state), print)
    assert restored is not None
    assert tree.fingerprint(restored[0]) == tree.fingerprint(state)


@pytest.mark.parametrize("where", ["params", "opt_state"])
def test_a_state_that_is_not_finite_is_never_saved(where: str, run: Path):
    state = state_of(30)
    bad = tree.map_with_path(
        lambda path, x: x.at[0].set(jnp.nan) if path.endswith("scale") else x, getattr(state, where)
    )
    with (
        Checkpoints(run) as checkpoints,
        pytest.raises(NotFinite, match=rf"{where}/.*scale is not finite after step 30"),
    ):
        checkpoints.save(dataclasses.replace(state, **{where: bad}), Progress(step=30))
    assert restore(run)[1].step == 20


def test_a_folder_that_is_not_there_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(ValueError, match=f"{tmp_path}/run holds no checkpoints .*; name the folder of a run"):
        Checkpoints(tmp_path / "run", read_only=True)
    with Checkpoints(tmp_path / "run") as checkpoints, pytest.raises(OSError, match="no such folder; make it first"):
        checkpoints.save(state_of(1), Progress(step=1))


@pytest.mark.parametrize(
    "error",
    [MemoryError(), PermissionError(13, "Permission denied"), RuntimeError("RESOURCE_EXHAUSTED: 9 GB")],
    ids=repr,
)
def test_what_is_not_the_fault_of_the_bytes_is_not_taken_for_damage(error: Exception, run: Path, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    with Checkpoints(run) as checkpoints:
        for method in ("_read", "_record"):
            monkeypatch.setattr(Checkpoints, method, fail)
            with pytest.raises(type(error)):
                checkpoints.restore(abstract(state_of(0)), print)
        assert checkpoints.steps() == [20, 10]
    with pytest.raises(type(error)):
        Checkpoints(run)


def test_a_step_without_a_checkpoint_is_an_error_with_those_that_have_one(run: Path):
    with Checkpoints(run) as checkpoints, pytest.raises(ValueError, match=r"step 15; use one of \[10, 20\]"):
        checkpoints.restore_params(abstract(state_of(0)).params, print, "15")


@contextmanager
def no_file_over(size: int) -> Iterator[None]:
    """A disk that takes no more than `size` bytes in a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_is_one_line_and_leaves_the_last_good_checkpoint(run: Path, capfd, caplog):
    caplog.set_level(logging.CRITICAL, logger="absl")  # as the command line does
    state, message = state_of(30, width=200), "the checkpoint of step 30 could not be written \\(File too large\\)"
    checksums({"params": state.params, "opt_state": state.opt_state})  # a compiled program is a file too
    with Checkpoints(run) as checkpoints, no_file_over(8000):
        checkpoints.save(state, Progress(step=30))
        with pytest.raises(OSError, match=message):
            checkpoints.wait()
    assert restore(run)[1].step == 20
    assert_nothing_else_was_said(capfd, caplog)


def test_a_checkpoint_that_the_disk_has_no_room_for_is_not_begun(run: Path, monkeypatch: pytest.MonkeyPatch):
    before = sorted(run.rglob("*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    message = "the checkpoint of step 30 takes 25,924 bytes, but the disk of .* has 5 left"
    with Checkpoints(run) as checkpoints, pytest.raises(OSError, match=message):
        checkpoints.save(state_of(30), Progress(step=30))
    assert sorted(run.rglob("*")) == before
