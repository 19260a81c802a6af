"""A run that trains on from another one has its model, tokenizer and weights, and needs no key of the user's."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from arrays import quiet
from grid import tiny

from llm_jax.cli.main import main, parser
from llm_jax.data.config import DataConfig
from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.model.config import AttentionConfig
from llm_jax.runs import folder as run_folder
from llm_jax.runs.start import config_from, load_recipe
from llm_jax.train.config import RunConfig

RECIPE = """
import dataclasses

from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.data.config import DataConfig
from llm_jax.train.config import RunConfig

model = ModelConfig(vocab_size=300, d_model=64, n_layers=3, n_heads=4, max_seq_len=16, dropout=0.1, remat="full")
model = dataclasses.replace(model, attention=AttentionConfig(dropout=0.05))
config = RunConfig(model, DataConfig(tokenizer="train:300", seq_len=16, batch_size=4), steps=7)
"""


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run folder, as far as its config goes."""
    attention = AttentionConfig(window=5, dropout=0.2)
    model = tiny(vocab_size=257, max_seq_len=64, layers=("local", "global"), attention=attention)
    folder = tmp_path / "run"
    folder.mkdir()
    run_folder.save_config(folder, RunConfig(model, DataConfig(tokenizer="byte", seq_len=64, batch_size=2)))
    ByteTokenizer().save(folder / "tokenizer")
    return folder


@pytest.fixture
def recipe(tmp_path: Path) -> RunConfig:
    (tmp_path / "recipe.py").write_text(RECIPE)
    return load_recipe(str(tmp_path / "recipe.py"))


def test_model_and_tokenizer_are_the_runs_and_all_else_is_the_recipes(trained: Path, recipe: RunConfig):
    said: list[str] = []
    config = config_from(trained, recipe, {"data.seq_len": 32}, "steps=9", report=said.append)
    theirs = run_folder.load_config(trained).model
    attention = dataclasses.replace(theirs.attention, dropout=0.05)
    assert config.model == dataclasses.replace(theirs, attention=attention, dropout=0.1, remat="full")
    assert (config.init_from, config.data.tokenizer) == (str(trained), str(trained / "tokenizer"))
    assert (config.data.batch_size, config.data.seq_len, config.steps) == (4, 32, 9)
    [line] = said
    differ = "model.vocab_size is 257 there, 300 here; .*; and [0-9]+ more"
    assert re.fullmatch(f"the model is that of {trained}, in place of the recipe's: {differ}", line)


def test_a_model_without_softmax_takes_no_dropout_of_a_pattern(trained: Path, recipe: RunConfig):
    theirs = run_folder.load_config(trained)
    run_folder.save_config(
        trained, dataclasses.replace(theirs, model=tiny(vocab_size=257, max_seq_len=64, layers=("linear",)))
    )
    config = config_from(trained, recipe, report=quiet)
    assert (config.model.attention.dropout, config.model.dropout) == (0.0, 0.1)


@pytest.mark.parametrize("spec", ["byte", "{run}/tokenizer", "{elsewhere}"])
def test_the_runs_own_tokenizer_may_be_named(spec: str, trained: Path, recipe: RunConfig, tmp_path: Path):
    ByteTokenizer().save(tmp_path / "elsewhere")
    spec = spec.format(run=trained, elsewhere=tmp_path / "elsewhere")
    assert config_from(trained, recipe, f"data.tokenizer={spec}", report=quiet).data.tokenizer == spec


def test_what_is_changed_by_the_user_is_said(trained: Path, recipe: RunConfig):
    said: list[str] = []
    config = config_from(trained, recipe, "model.max_seq_len=128", "data.seq_len=128", report=said.append)
    assert (config.model.max_seq_len, config.data.seq_len) == (128, 128)
    assert said[1] == f"the model of {trained} is changed: model.max_seq_len is 64 there, 128 here"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["init_from=runs/other"], "the weights are those of .*/run .* and init_from=runs/other says others; keep one"),
        (
            ["data.tokenizer=train:300"],
            "a run from .*/run reads the tokens of .*/run: leave out data.tokenizer=train:300$",
        ),
        (["data.tokenizer=char"], "leave out data.tokenizer=char$"),
        (["data.tokenizer=bite"], "unknown tokenizer 'bite'.*did you mean 'byte'"),
        (["data.seq_len=65"], "data.seq_len=65 exceeds model.max_seq_len=64"),
        (["model.n_heds=3"], r"unknown config key 'model.n_heds'; did you mean model.n_heads=3\?"),
    ],
)
def test_what_contradicts_the_run_is_refused(words: list[str], says: str, trained: Path, recipe: RunConfig):
    with pytest.raises(ValueError, match=says):
        config_from(trained, recipe, *words, report=quiet)


def test_the_command_line_takes_a_run_to_train_on_from(trained: Path, recipe: RunConfig, capsys: Any):
    args = parser().parse_args(["train", "recipe.py", "--from", str(trained), "steps=3"])
    assert (args.source_run, args.assignments) == (str(trained), ["steps=3"])
    assert main(["train", str(trained.parent / "recipe.py"), "--from", str(trained.parent / "none")]) == 2
    assert "none holds no run" in capsys.readouterr().err


@pytest.mark.slow
def test_an_imported_model_trains_on_with_two_words(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    from architectures import config_json
    from test_huggingface import save_model
    from tiny_run import write_corpus

    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "recipe.py").write_text(RECIPE.replace('remat="full"', ""))
    there, a_run, again = save_model(tmp_path / "theirs", config_json("qwen3")), tmp_path / "run", tmp_path / "again"
    assert main(["import", str(there), "--run", str(a_run), "--tokenizer", "byte"]) == 0
    words = [f"data.uri={write_corpus(tmp_path / 'corpus')}", "data.heldout=0.2", "steps=1", "prompts="]
    words += ["optimizer.warmup_steps=0", "evaluate_batches=1", "data.batch_size=8"]
    assert main(["train", str(tmp_path / "recipe.py"), "--from", str(a_run), "--run", str(again), *words]) == 0
    assert f"restored from {a_run} at step 0: weights, nothing else" in capsys.readouterr().out
    assert json.loads((again / "huggingface.json").read_text())["model_type"] == "qwen3"
    assert run_folder.load_config(again).model.attention.qk_norm == "head"
