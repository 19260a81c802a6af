"""A checkpoint knows what decided its numbers: whoever reads it under another value is told which one."""

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from arrays import quiet
from tiny_run import console, evaluated, said, tiny

from llm_jax.config import from_dict, to_dict
from llm_jax.data.task import TaskConfig
from llm_jax.data.tokenizer import build
from llm_jax.ops.experts import Experts
from llm_jax.runs import restore
from llm_jax.runs.checkpoint import Checkpoints
from llm_jax.runs.fit import fit, resume
from llm_jax.runs.folder import load_config
from llm_jax.runs.seal import FREE, LAYOUT, changes, moves, seal
from llm_jax.train.config import RunConfig


def flat(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{where}{key}.")
        else:
            yield where + key, value


def another(value: Any) -> Any:
    """A value of the same kind, a digit away."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return f"{value}1" if isinstance(value, str) else [*(value or []), "1"]


def changed(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`values` with what lies at the dotted `key` a digit away."""
    copy: dict[str, Any] = json.loads(json.dumps(values))
    *groups, leaf = key.split(".")
    group = copy
    for name in groups:
        group = group[name]
    group[leaf] = another(group[leaf])
    return copy


def test_every_value_is_sealed_or_known_to_decide_nothing(monkeypatch):
    model = dataclasses.replace(tiny(Path("corpus")).model, layers=("global+moe",), experts=Experts(number=4))
    data = dataclasses.replace(tiny(Path("corpus")).data, task=TaskConfig(kind="translate"))
    config = to_dict(tiny(Path("corpus"), model=model, data=data))
    monkeypatch.setattr("llm_jax.runs.seal._plain", dict)  # a digit away need not be a config that can be
    there = {"config": config, "tokenizer": "a", "machine": {}}
    for key, _ in flat(config):
        here = there | {"config": changed(config, key)}
        free, layout = (f"{key}=".startswith(known) for known in (FREE, LAYOUT))
        assert [phrase.partition(" ")[0] for phrase in changes(there, here)] == [key] * (not free and not layout)
        assert [phrase.partition(" ")[0] for phrase in moves(there, here)] == [key] * layout
    assert changes(there, there | {"tokenizer": "b"}) == ["tokenizer is a there, b here"]


def test_a_config_key_that_is_younger_than_the_checkpoint_has_its_default():
    here = seal(tiny(Path("corpus")), "a", None)
    there = json.loads(json.dumps(here))
    del there["config"]["model"]["rotary"]["theta"]
    assert changes(there, here) == []
    assert changes(there, here | {"config": changed(here["config"], "model.rotary.theta")}) != []


def test_a_key_that_this_version_lacks_is_a_difference_with_a_name(run: Path, monkeypatch):
    here = seal(load_config(run), "a", None)
    there = json.loads(json.dumps(here))
    there["config"]["model"]["later"] = 3
    assert changes(there, here) == ["model.later is 3 there, none here"]
    with Checkpoints(run, read_only=True) as checkpoints:
        record = checkpoints._record(3)
        record["seal"]["config"]["model"]["later"] = 3
        monkeypatch.setattr(checkpoints, "_record", lambda _: record)  # as the checkpoint of another version has it
        with pytest.raises(ValueError, match=r"model.later is 3 there, none here; put back"):
            checkpoints.restore_params(restore.Program.on(load_config(run)).abstract_state.params, quiet)
        assert "stopped" not in record["progress"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dropout": 0.0}, ""),
        ({"dropout": 0.1}, "other dropout noise"),
        ({"dropout": 0.0, "experts": {"balance": "loss", "balance_weight": 0.1}}, "the experts' losses"),
        ({"dropout": 0.0, "experts": {"balance": "bias", "balance_weight": 0.1}}, ""),
    ],
    ids=str,
)
def test_other_microbatches_matter_where_they_draw_or_balance(changes: dict[str, Any], said: str):
    here = seal(tiny(Path("corpus")), "a", None)
    here["config"]["model"] |= changes
    (phrase,) = moves(here | {"config": here["config"] | {"accumulate": 1}}, here)
    assert phrase.startswith("accumulate is 1 there, 2 here")
    assert ("not in its last bits alone" in phrase) == bool(said)
    assert said in phrase


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(dataclasses.replace(config, steps=3), folder, console=console())
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def edit(folder: Path, key: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), key)))


def test_a_changed_digit_of_the_config_is_named_by_whoever_reads_the_run(run: Path, config, tmp_path: Path):
    edit(run, "model.rotary.theta")
    message = f"{run} is no longer what its checkpoint of step 3 was made with: model.rotary.theta is 10000.0 there, 1"
    readers = [
        lambda: evaluated(run),
        lambda: restore.weights(run, restore.on_one_device(load_config(run)), report=quiet),
        lambda: restore.weights(run, restore.on_the_host(load_config(run)), "last", report=quiet),
        lambda: resume(run, steps=4, console=console()),
        lambda: fit(dataclasses.replace(config, init_from=str(run)), tmp_path / "new", console=console()),
    ]
    for read in readers:
        with pytest.raises(ValueError, match=message) as error:
            read()
        assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_another_tokenizer_in_the_folder_is_noticed_with_the_weights(run: Path):
    shutil.rmtree(run / "tokenizer")
    build("char", lambda: ["abcdefgh "]).save(run / "tokenizer")
    with pytest.raises(ValueError, match=r"made with: tokenizer is \w+\.* there, \w+\.* here"):
        restore.weights(run, restore.on_one_device(load_config(run)), report=quiet)


def test_other_data_in_the_folder_is_noticed(run: Path):
    identity = json.loads((run / "data.json").read_text())
    identity["heldout"]["tokens"] += 1
    (run / "data.json").write_text(json.dumps(identity))
    with pytest.raises(ValueError, match=r"made with: heldout.tokens is \d+ there, \d+ here"):
        restore.weights(run, restore.on_one_device(load_config(run)), report=quiet)


def test_what_may_change_is_said_by_what_the_checkpoint_was_made_with(run: Path, monkeypatch):
    """Not by config.json, which says how the next step is laid out."""

    def stop(*_: object) -> None:
        raise RuntimeError("stop here")

    monkeypatch.setattr(restore.Program, "train_step", stop)
    values = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(values | {"accumulate": 1, "steps": 4, "keep": 3}))
    say = console()
    with pytest.raises(RuntimeError, match="stop here"):
        resume(run, console=say)
    assert "steps 3 -> 4: the cosine schedule stretches" in said(say)
    assert "not the same bits as without the stop: accumulate is 2 there, 1 here" in said(say)


def test_a_checkpoint_from_before_there_were_seals_is_still_read(run: Path, config):
    with Checkpoints(run) as checkpoints:
        restored = checkpoints.restore(restore.Program.on(config).abstract_state, print)
        assert restored is not None
        state, progress = restored
    shutil.rmtree(run / "checkpoints")
    moved = run.rename(run.with_name("elsewhere"))
    (run / "checkpoints").mkdir(parents=True)
    with Checkpoints(run) as checkpoints:
        checkpoints.save(state, progress)
        checkpoints.wait()
        assert checkpoints.sealed(3) is None
    (run / "checkpoints").rename(moved / "checkpoints")
    assert resume(moved, steps=4, console=console()).progress.step == 4
    with Checkpoints(moved) as checkpoints:
        assert from_dict(RunConfig, (checkpoints.sealed(4) or {})["config"]).steps == 4
