"""What a run works with is opened and checked before its first step, and nothing is written where it can not work."""

import dataclasses

import pytest
from rich.console import Console
from tiny_run import console

from llm_jax.runs.fit import fit


@pytest.fixture
def say() -> Console:
    return console()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.epochs": 1.0}, "8 steps of 16 rows are .* but data.epochs=1 allows"),
        ({"data.heldout": 0.0}, "data.heldout=0.0 leaves nothing to evaluate on"),
        ({"model.vocab_size": 100}, "has 257 ids, but model.vocab_size=100; use at least model.vocab_size=320"),
        ({"optimizer.warmup_steps": 8}, "optimizer.warmup_steps=8 leaves nothing of steps=8"),
        ({"data.uri": "nowhere"}, "nowhere"),
    ],
)
def test_what_can_not_work_is_refused_with_nothing_written(changes, message, config, tmp_path, say):
    for key, value in changes.items():
        group, name = key.split(".")
        part = dataclasses.replace(getattr(config, group), **{name: value})
        config = dataclasses.replace(config, **{group: part})
    with pytest.raises(ValueError, match=message):
        fit(config, tmp_path / "run", console=say)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("prompts", "end_of_text", "says"),
    [
        (("",), False, r"prompts=\('',\): a prompt without tokens.* or set prompts=\(\)"),
        (("a", "x" * 32), True, r"prompts=.*: a prompt of 33 tokens leaves no room in model.max_seq_len=32"),
    ],
)
def test_prompts_that_can_not_be_sampled_are_refused_before_the_first_step(
    prompts, end_of_text, says, config, tmp_path, say
):
    data = dataclasses.replace(config.data, end_of_text=end_of_text)
    with pytest.raises(ValueError, match=says):
        fit(dataclasses.replace(config, data=data, prompts=prompts), tmp_path / "run", console=say)
    assert not (tmp_path / "run").exists()
