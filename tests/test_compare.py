"""`llm-jax compare` takes the same steps on every side, and tells what came of it, or what is in the way."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from arrays import quiet

from llm_jax.compat import compare as module
from llm_jax.compat.compare import Comparison, Gap, check_comparable, compare, facts_as_text, write
from llm_jax.compat.sides import Side, Stretch
from llm_jax.model.config import AttentionConfig
from llm_jax.train.config import RunConfig
from llm_jax.train.optimizer import OptimizerConfig


def comparable(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0), steps=30, **changes)


@pytest.mark.parametrize(
    ("change", "steps", "says"),
    [
        ({}, 2, "steps=2 .--steps. must lie between 3 and the run's own steps=30"),
        ({}, 31, "steps=31 .--steps. must lie between 3 and"),
        ({"optimizer": OptimizerConfig(name="lion")}, 20, "optimizer.name=lion has no twin.*set optimizer.name=adamw"),
        ({"init_from": "runs/x"}, 20, "init_from=runs/x: .*set init_from=none"),
    ],
)
def test_what_can_not_be_compared_says_what_to_change(config: RunConfig, change: dict[str, Any], steps: int, says: str):
    with pytest.raises(ValueError, match=says):
        check_comparable(comparable(config, **change), steps)


def test_dropout_is_refused(config: RunConfig):
    with pytest.raises(ValueError, match=r"model.dropout=0.1: .*set model.dropout=0"):
        check_comparable(config, 4)
    quiet = comparable(config)
    model = dataclasses.replace(quiet.model, attention=AttentionConfig(dropout=0.2))
    with pytest.raises(ValueError, match=r"model.attention.dropout=0.2: .*set model.attention.dropout=0"):
        check_comparable(dataclasses.replace(quiet, model=model), 4)


def test_without_pytorch_it_says_how_to_get_it(config: RunConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llm-jax\[torch\]'"):
        check_comparable(comparable(config), 20)


class Played(Side):
    """A side without a process: its loss is the number of its step, and PyTorch's a little more from step 5 on."""

    asked: list[tuple[str, int]] = []  # noqa: RUF012  (of all sides, in turn)

    def __init__(self, name: str) -> None:
        self.name, self.taken = name, 0

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, *job: Any) -> None:
        pass

    def train(self, steps: int) -> Stretch:
        if self.name == "compiled":
            raise ValueError("the compiler is not well")
        self.asked.append((self.name, steps))
        numbers = [float(step) for step in range(self.taken + 1, self.taken + steps + 1)]
        self.taken += steps
        off = 0.5 if self.name == "eager" else 0.0
        loss = [number + off * (number == 5) for number in numbers]
        norm = [number * (1 + off * (number == 7)) for number in numbers]
        return Stretch(loss, norm, seconds=steps * (1 + 2 * off), imports=100, peak=300)


@pytest.fixture(scope="module")
def played(config: RunConfig) -> Comparison:
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Side", Played)
        patch.setattr(module, "why_not_compiled", lambda: None)
        return compare(comparable(config), 25, quiet, command="llm-jax compare <tiny>")


def test_the_sides_take_all_their_steps_in_turn(played: Comparison):
    assert [name for name, _ in Played.asked] == ["jax", "eager"] * 11
    assert {name: sum(steps for of, steps in Played.asked if of == name) for name in ("jax", "eager")} == {
        "jax": 25,
        "eager": 25,
    }
    assert played.sides["jax"].loss == [float(step) for step in range(1, 26)]


def test_gaps_and_speeds_are_those_of_the_steps(played: Comparison):
    assert played.gaps["eager"] == Gap(loss=0.5, loss_step=5, grad_norm=0.5, grad_norm_step=7, speed=(2.0, 2.0, 2.0))
    assert played.sides["eager"].tokens_per_second == [16 * 32 / 2] * 10


def test_a_compiler_that_fails_costs_only_its_own_side(played: Comparison):
    assert list(played.sides) == ["jax", "eager"]
    assert played.missing == {"compiled": "the compiler is not well"}
    assert "without compiled PyTorch: the compiler is not well" in facts_as_text(played)


def test_the_page_is_whole_and_says_what_the_file_says(played: Comparison, tmp_path: Path):
    write(played, tmp_path, "<tiny>")
    html = (tmp_path / "compare.html").read_text()
    assert json.loads((tmp_path / "compare.json").read_text())["gaps"]["eager"]["loss_step"] == 5
    assert "5.0e-01 nats at step 5" in html
    assert "llm-jax compare &lt;tiny&gt;" in html
    assert "optimizer.weight_decay=0.1" in html
    assert "the compiler is not well" in html
    assert not re.search(r"<script|\b(src|href)=|https?://(?!www\.w3\.org/2000/svg)", html)


def test_what_is_not_a_number_is_null_in_the_file(played: Comparison):
    lost = dataclasses.replace(played.sides["jax"], loss=[float("nan")] * 25)
    found = dataclasses.replace(played, sides=played.sides | {"jax": lost}).to_json()
    assert found["sides"]["jax"]["loss"] == [None] * 25


RECIPE = '''"""A model of one layer."""

from llm_jax.data.loader import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.model.config import AttentionConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.config import RunConfig

config = RunConfig(
    model=ModelConfig(vocab_size=264, d_model=16, n_layers=1, n_heads=2, max_seq_len=32, d_ff=16),
    data=DataConfig(uri="text.txt", tokenizer="byte", separator="\\n", heldout=0.2, seq_len=32, batch_size=8),
    optimizer=OptimizerConfig(warmup_steps=1),
    steps={steps},
    accumulate=2,
)
'''


def start(folder: Path, *words: str, steps: int) -> subprocess.Popen:
    (folder / "tiny.py").write_text(RECIPE.format(steps=steps))
    (folder / "text.txt").write_text("\n".join(f"line {n} says {n * n}" for n in range(400)) + "\n")
    return subprocess.Popen(
        [sys.executable, "-m", "llm_jax", "compare", "tiny.py", *words],
        cwd=folder,
        env=os.environ | {"LLM_JAX_CACHE": str(folder / "cache"), "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
def test_jax_and_pytorch_train_alike(tmp_path: Path):
    pytest.importorskip("torch")
    process = start(tmp_path, "--steps", "30", "--json", steps=30)
    out, err = process.communicate()
    assert process.returncode == 0, err
    found = json.loads(out)
    assert found == json.loads((tmp_path / "compare" / "tiny" / "compare.json").read_text())
    assert {name: len(side["loss"]) for name, side in found["sides"].items()}.items() >= {
        "jax": 30,
        "eager": 30,
    }.items()
    assert found["sides"]["jax"]["loss"][-1] < found["sides"]["jax"]["loss"][0] - 0.1
    assert max(gap["loss"] for gap in found["gaps"].values()) < 1e-5
    assert max(gap["grad_norm"] for gap in found["gaps"].values()) < 1e-4
