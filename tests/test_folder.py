"""A run's config, and its folder: never overwritten, never half of one, known by its data."""

import contextlib
import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny, write_corpus

from llm_jax.config import differences, override
from llm_jax.data import tokenizer_interface
from llm_jax.data.loader import DataConfig
from llm_jax.data.mixture import open_folders
from llm_jax.data.prepare import prepare
from llm_jax.data.shards import Shards, open_shards
from llm_jax.files import write_whole
from llm_jax.recipes import recipe_docstring, recipes
from llm_jax.runs import folder as run_folder
from llm_jax.runs.seal import seal_of
from llm_jax.runs.start import load_recipe
from llm_jax.train.config import RunConfig


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("data")
    prepare(str(write_corpus(folder / "corpus")), folder / "shards", tokenizer="byte", heldout=0.2)
    return open_shards(folder / "shards")


CONFIG = tiny(Path("corpus"))


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_loads_and_says_what_it_is(name: str):
    assert isinstance(load_recipe(name), RunConfig)
    assert recipe_docstring(recipes()[name])


def test_an_unknown_recipe_is_an_error_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'shakespear_char'; did you mean 'shakespeare_char'\?"):
        load_recipe("shakespear_char")


def test_a_recipe_without_a_config_is_an_error_that_says_what_to_set(tmp_path: Path):
    (tmp_path / "recipe.py").write_text("config = 3\n")
    with pytest.raises(ValueError, match=r"must set `config = RunConfig\(...\)`; got int"):
        load_recipe(str(tmp_path / "recipe.py"))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("steps=0", "steps=0 must be at least 1"),
        ("sample_every=0", "sample_every=0 must be at least 1"),
        ("accumulate=5", "accumulate=5 does not divide data.batch_size=16; use data.batch_size=20"),
        (
            "model.rotary.scaling=dynamic model.rotary.factor=2 model.rotary.original_len=16",
            r"depends on the length of a text, .* of data.seq_len=32; use data.seq_len=16, .* or data.packing=windows",
        ),
        ("data.seq_len=64", "data.seq_len=64 exceeds model.max_seq_len=32; set data.seq_len=32, or"),
        ("loss.chunk=5", "loss.chunk=5 does not divide data.seq_len=32"),
    ],
)
def test_fields_that_do_not_go_together_are_an_error_with_the_numbers(assignment: str, message: str):
    with pytest.raises(ValueError, match=message):
        override(CONFIG, assignment.split())


def test_a_config_comes_back_from_its_folder(shards: Shards, tmp_path: Path):
    run_folder.create(tmp_path / "a" / "run", CONFIG, shards, "llm-jax train tiny")
    assert run_folder.load_config(tmp_path / "a" / "run") == CONFIG
    assert run_folder.tokenizer_of_run(tmp_path / "a" / "run").fingerprint == shards.tokenizer.fingerprint
    assert json.loads((tmp_path / "a" / "run" / "environment.json").read_text())["command"] == "llm-jax train tiny"


def test_a_path_that_takes_no_checkpoint_is_refused_before_the_first_step(tmp_path: Path):
    with pytest.raises(ValueError, match=r"run.* is no path in UTF-8, which checkpoints need; choose another folder"):
        run_folder.check_free(tmp_path / "run\udcff", CONFIG)


def test_a_folder_that_holds_a_run_is_refused_by_what_differs(shards: Shards, tmp_path: Path):
    run_folder.check_free(tmp_path, CONFIG)
    run_folder.create(tmp_path, CONFIG, shards, "")
    with pytest.raises(ValueError, match=f"already holds a run; continue it: llm-jax resume {tmp_path}"):
        run_folder.check_free(tmp_path, CONFIG)
    other = dataclasses.replace(CONFIG, steps=9)
    with pytest.raises(ValueError, match=r"a run of another config \(steps is 8 there, 9 here\)"):
        run_folder.check_free(tmp_path, other)


def test_a_file_of_a_user_that_is_called_as_one_of_a_run_stays(tmp_path: Path):
    (tmp_path / "environment.json").write_text('{"name": "conda"}')
    with pytest.raises(ValueError, match="is not empty"):
        run_folder.check_free(tmp_path, CONFIG)


@pytest.mark.parametrize("killed_at", range(3))
def test_a_process_killed_while_it_clears_a_folder_blocks_nobody(
    killed_at: int, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_folder.create(tmp_path, CONFIG, shards, "")
    (tmp_path / "config.json").unlink()
    removals = iter(range(killed_at))

    def killed(remove: Any, path: Path) -> None:
        if next(removals, None) is None:
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Path, "unlink", functools.partialmethod(lambda path, *_, to=Path.unlink: killed(to, path)))
        patch.setattr(run_folder.shutil, "rmtree", functools.partial(killed, shutil.rmtree))
        run_folder.create(tmp_path, CONFIG, shards, "again")
    run_folder.check_free(tmp_path, CONFIG)
    run_folder.create(tmp_path, CONFIG, shards, "again")


@pytest.mark.parametrize("name", ["checkpoints", "tokenizer", "notes.txt"])
def test_a_folder_that_holds_anything_else_is_refused_too(name: str, tmp_path: Path):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=f"{tmp_path} is not empty.*choose another \\(--run"):
        run_folder.check_free(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=f"{__file__} is not empty"):
        run_folder.check_free(Path(__file__), CONFIG)


@pytest.mark.parametrize("killed_at", range(8))
def test_a_run_begins_where_a_process_was_killed_as_it_began_one(
    killed_at: int, shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whatever was written by then; else the line of a scheduler, train --resume, would fail for ever."""
    writes = iter(range(killed_at))

    def killed(path: Path, content: Any) -> None:
        if next(writes, None) is None:
            (path.parent / f".{path.name}.77.part").write_text("half")
            raise KeyboardInterrupt
        write_whole(path, content)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        for module in (run_folder, tokenizer_interface):
            patch.setattr(module, "write_whole", killed)
            patch.setattr(module, "write_json", lambda path, values: killed(path, json.dumps(values)))
        (tmp_path / "source").mkdir()
        (tmp_path / "source" / run_folder.ORIGIN).write_text("{}")
        run_folder.create(tmp_path / "run", dataclasses.replace(CONFIG, init_from=str(tmp_path / "source")), shards, "")
    if killed_at < 6:
        run_folder.check_free(tmp_path / "run", CONFIG)
        run_folder.create(tmp_path / "run", CONFIG, shards, "again")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left - {run_folder.ORIGIN} == {"config.json", "data.json", "environment.json", "tokenizer"}
    assert (run_folder.ORIGIN in left) == (killed_at >= 6)
    assert sorted(path.name for path in (tmp_path / "run/tokenizer").iterdir()) == ["encoding.json", "ranks.tiktoken"]


@pytest.mark.parametrize("there_before", [False, True])
def test_all_of_a_run_is_removed_but_no_folder_that_existed_before(there_before: bool, shards: Shards, tmp_path: Path):
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    run_folder.create(tmp_path / "link", CONFIG, shards, "")
    (tmp_path / "run" / "checkpoints" / "0").mkdir(parents=True)
    run_folder.remove(tmp_path / "link", keep_folder=there_before)
    assert (tmp_path / "run").exists() == there_before
    assert not there_before or files(tmp_path / "run") == []


def test_a_config_is_stored_with_absolute_paths_and_unchanged_names(
    shards: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    shards.tokenizer.save(tmp_path / "byte")
    names = ["data.uri=builtin:python", "data.tokenizer=byte"]
    for number, (given, kept) in enumerate(
        [
            (names, names),
            (["data.uri=hf://datasets/a/b"], ["data.uri=hf://datasets/a/b"]),
            (["data.uri=corpus/*.txt"], [f"data.uri={tmp_path}/corpus/*.txt"]),
            (["data.uri=corpus:.7,hf://a/b:3"], [f"data.uri={tmp_path}/corpus:.7,hf://a/b:3"]),
            (["data.tokenizer=./byte"], [f"data.tokenizer={tmp_path}/byte"]),
            (["init_from=run0"], [f"init_from={tmp_path}/run0"]),
        ]
    ):
        run_folder.create(tmp_path / f"run{number}", override(CONFIG, given), shards, "")
        expected = override(override(CONFIG, [f"data.uri={tmp_path}/corpus"]), kept)
        assert run_folder.load_config(tmp_path / f"run{number}") == expected


@pytest.mark.parametrize("changes", [{"seed": 2**32}, {"data": DataConfig(seed=-1)}], ids=str)
def test_a_seed_beyond_32_bits_is_an_error(changes: dict[str, Any]):
    with pytest.raises(ValueError, match=r"seed=.* must lie between 0 and 4294967295"):
        dataclasses.replace(CONFIG, **changes)


def test_a_folder_without_a_run_is_an_error_that_says_how_to_start_one(tmp_path: Path):
    with pytest.raises(ValueError, match=f"holds no run .*; start one with: llm-jax train quickstart --run {tmp_path}"):
        run_folder.load_config(tmp_path)


def test_a_damaged_config_is_an_error_that_names_the_file(shards: Shards, tmp_path: Path):
    run_folder.create(tmp_path, CONFIG, shards, "")
    (tmp_path / "config.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json is not JSON"):
        run_folder.load_config(tmp_path)


def test_the_data_of_a_run_is_known_by_its_content_and_not_by_its_path(shards: Shards, tmp_path: Path):
    run_folder.create(tmp_path / "run", CONFIG, shards, "")
    corpus = write_corpus(tmp_path / "moved")
    prepare(str(corpus), tmp_path / "same", tokenizer="byte", heldout=0.2)
    run_folder.check_data(tmp_path / "run", open_shards(tmp_path / "same"))

    text = (corpus / "00.txt").read_text()
    (corpus / "00.txt").write_text(text[::-1])
    prepare(str(corpus), tmp_path / "changed", tokenizer="byte", heldout=0.2)
    with pytest.raises(ValueError, match=r"is not what .*run has been trained on: .*sha256 is .* there, .* here"):
        run_folder.check_data(tmp_path / "run", open_shards(tmp_path / "changed"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds a list, expected an object"),
        ("{", "is not JSON"),
        ("{}", "has no 'tokenizer'"),
        ('{"tokenizer": "x", "vocab_size": 3}', "has no 'folder'"),
        ('{"tokenizer": "x", "vocab_size": 3, "folder": 7}', "'folder' is an integer, expected a string"),
        ('{"tokenizer": "x", "vocab_size": 3, "sources": []}', "'sources' is a list, expected an object"),
        ('{"tokenizer": "x", "vocab_size": 3, "sources": {"a": 1}}', "sources.a holds an integer, expected an object"),
    ],
)
def test_a_damaged_data_json_is_an_error_in_a_line(content: str, message: str, shards: Shards, tmp_path: Path):
    run_folder.create(tmp_path, CONFIG, shards, "")
    (tmp_path / "data.json").write_text(content)
    for read in (lambda: run_folder.shards_folders(tmp_path, CONFIG), lambda: run_folder.check_data(tmp_path, shards)):
        with pytest.raises(ValueError, match=f"data.json.*{re.escape(message)}.*; restore it, or start a new run$"):
            read()


def test_the_data_of_a_mixture_names_the_source_that_changed(tmp_path: Path):
    folders, addresses = [], []
    for name in "ab":
        corpus = write_corpus(tmp_path / name, seed=ord(name))
        prepare(str(corpus), tmp_path / f"{name}.shards", tokenizer="byte", heldout=0.2)
        folders.append(tmp_path / f"{name}.shards")
        addresses.append(f"{corpus}:1")
    config = override(CONFIG, [f"data.uri={','.join(addresses)}"])
    mixture = open_folders(config.data, folders)
    run_folder.create(tmp_path / "run", config, mixture, "")
    assert run_folder.shards_folders(tmp_path / "run", config) == folders
    run_folder.check_data(tmp_path / "run", mixture)
    (tmp_path / "b" / "00.txt").write_text("another")
    prepare(f"{tmp_path}/b", tmp_path / "changed", tokenizer="byte", heldout=0.2)
    with pytest.raises(ValueError, match=r"not what .* has been trained on: sources.b.*is .* there, .* here"):
        run_folder.check_data(tmp_path / "run", open_folders(config.data, [folders[0], tmp_path / "changed"]))
    other = override(CONFIG, [f"data.uri={addresses[0]},{addresses[1].replace(':1', ':3')}"])
    with pytest.raises(ValueError, match=r"sources.a.share is 1/2 there, 1/4 here"):
        run_folder.check_data(tmp_path / "run", open_folders(other.data, folders))
    shutil.copytree(folders[1], tmp_path / "moved")
    moved = open_folders(config.data, [folders[0], tmp_path / "moved"])
    run_folder.check_data(tmp_path / "run", moved)
    assert seal_of(config, moved) == seal_of(config, mixture)
    with pytest.raises(ValueError, match=r"data.json has the sources a, b, and config.json corpus; restore it"):
        run_folder.shards_folders(tmp_path / "run", CONFIG)


def test_a_damaged_environment_is_an_error_in_a_line(shards: Shards, tmp_path: Path):
    run_folder.create(tmp_path, CONFIG, shards, "")
    for content in ("[]", "{}", '{"jax": 3, "devices": []}'):
        (tmp_path / "environment.json").write_text(content)
        with pytest.raises(ValueError, match=r"environment.json.*; restore it, or start a new run$"):
            run_folder.first_machine(tmp_path)


def test_another_tokenizer_is_an_error_with_both(shards: Shards, tmp_path: Path):
    run_folder.create(tmp_path / "run", CONFIG, shards, "")
    prepare(shards.manifest.source, tmp_path / "data", tokenizer="char", heldout=0.2)
    with pytest.raises(ValueError, match=r"tokenizer is \w+.* there, \w+.* here; .*init_from="):
        run_folder.check_data(tmp_path / "run", open_shards(tmp_path / "data"))


def test_differences_name_every_leaf_that_differs_on_either_side():
    there = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": "x"}
    here = {"a": 1, "b": {"c": [1, 3], "d": 0.5}, "f": True}
    assert differences(there, here) == [
        "b.c is 1,2 there, 1,3 here",
        "b.d is none there, 0.5 here",
        "e is x there, none here",
        "f is none there, true here",
    ]
    assert differences(there, there) == []
    long = list(range(20))
    assert differences({"a": [*long, 3]}, {"a": [*long, 4]}) == [
        f"a is {','.join(map(str, long))},3... there, {','.join(map(str, long))},4... here"
    ]


def test_an_environment_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert run_folder.environment("")["commit"] is None


def test_the_machine_of_a_run_is_that_on_which_it_began(shards: Shards, tmp_path: Path):
    run_folder.create(tmp_path, CONFIG, shards, "llm-jax train tiny")
    assert run_folder.first_machine(tmp_path) == run_folder.machine()
    path = tmp_path / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"jax": "0.0.1"}))
    assert run_folder.first_machine(tmp_path)["jax"] == "0.0.1"
