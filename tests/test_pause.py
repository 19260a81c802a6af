"""What is due between two steps, each by itself: nothing is compiled, and the model is a stand-in."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arrays import quiet
from tiny_run import console, said

from llm_jax.data.task import TaskConfig
from llm_jax.ops.sampling import Sampling
from llm_jax.runs import pause
from llm_jax.runs.checkpoint import Progress
from llm_jax.runs.data import open_data
from llm_jax.runs.session import Session
from llm_jax.train.config import RunConfig
from llm_jax.train.custom import Custom
from llm_jax.train.step import Scored, TrainState

STATE = TrainState(np.array(3), {}, {})


def opened(config: RunConfig, folder: Path, custom: Custom = Custom()) -> Session:
    return Session.open(config, folder / "run", console(), open_data(config, quiet), custom)


@pytest.fixture
def session(config: RunConfig, tmp_path: Path) -> Session:
    return opened(dataclasses.replace(config, prompts=("ab", "c")), tmp_path)


def test_a_step_pauses_where_any_of_three_is_due(config: RunConfig):
    c = dataclasses.replace(config, evaluate_every=4, checkpoint_every=6, sample_every=5)
    assert [step for step in range(1, 13) if pause.is_due(c, step)] == [4, 5, 6, 8, 10, 12]


def own_loss(model: Any, params: Any, batch: Any, key: Any) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("custom", "loss", "warns"),
    [
        (Custom(own_loss), 0.02, True),  # 2 nats over 100 targets: a mean, which the step divides once more
        (Custom(own_loss), 0.1, False),
        (Custom(own_loss), 2.0, False),
        (Custom(), 0.02, False),
    ],
)
def test_a_mean_in_place_of_a_sum_is_noticed_in_an_own_loss(custom, loss, warns, config: RunConfig, tmp_path: Path):
    session = opened(config, tmp_path, custom)
    pause.warn_of_own_loss(session, {"loss": loss, "grad_norm": 1.0}, Progress(step=3, tokens=300, heldout_loss=2.0))
    line = "your own loss is 0.02 a target where held-out loss is 2: return its sum over the targets, not the mean\n"
    assert said(session.console) == line * warns


@pytest.mark.parametrize("custom", [Custom(own_loss), Custom()])
def test_an_own_loss_without_a_gradient_is_named(custom: Custom, config: RunConfig, tmp_path: Path):
    session = opened(config, tmp_path, custom)
    pause.warn_of_own_loss(session, {"loss": 1.0, "grad_norm": 0.0}, Progress(step=3, tokens=300, heldout_loss=2.0))
    assert ("the gradient of your own loss is 0: nothing is learned" in said(session.console)) == bool(custom.loss)


@pytest.mark.parametrize("limit", [1, 2])
def test_an_evaluation_scores_the_first_batches_of_held_out_text(limit: int, session: Session, monkeypatch):
    counts: list[int] = []

    def score(params: Any, batch: Any) -> Scored:
        """One nat a target of the first batch, two of the second."""
        counts.append(int((batch.targets >= 0).sum()))
        return Scored(np.full(batch.targets.shape, len(counts), np.float32), np.zeros(batch.targets.shape, bool))

    monkeypatch.setitem(vars(session.program), "score", score)
    data = dataclasses.replace(session.config.data, batch_size=2)
    session.config = dataclasses.replace(session.config, data=data, evaluate_batches=limit)
    result = pause.heldout(session, STATE)
    assert len(counts) == limit
    assert result.loss == pytest.approx(np.average(range(1, limit + 1), weights=counts))
    assert result.documents < session.shards.split("heldout").n_documents


@pytest.fixture
def samplings(monkeypatch: pytest.MonkeyPatch) -> list[Sampling]:
    """How texts were asked for, of a sampler that shouts its prompts and can't continue `error`."""
    asked: list[Sampling] = []

    class Shout:
        def __init__(self, *args: Any, **options: Any) -> None:
            pass

        def generate(self, prompts: list[str], sampling: Sampling, max_tokens: int) -> list[str]:
            asked.append(sampling)
            if "error" in prompts:
                raise ValueError("the logits are not finite")
            return [prompt.upper() for prompt in prompts]

    monkeypatch.setattr(pause, "Sampler", Shout)
    return asked


def test_each_prompt_has_a_sample_and_a_question_the_likeliest(session: Session, samplings: list[Sampling]):
    assert pause.samples(session, STATE) == [{"prompt": "ab", "text": "AB"}, {"prompt": "c", "text": "C"}]
    data = dataclasses.replace(session.config.data, task=TaskConfig("translate", separator="="))
    session.config = dataclasses.replace(session.config, data=data)
    assert [sample["text"] for sample in pause.samples(session, STATE)] == ["AB=", "C="]
    assert [sampling.temperature for sampling in samplings] == [0.8, 0]


def test_weights_that_can_not_be_sampled_are_said_and_stop_no_run(session: Session, samplings: list[Sampling]):
    session.config = dataclasses.replace(session.config, prompts=("error",))
    assert pause.samples(session, STATE) == []
    assert said(session.console) == "no samples: the logits are not finite\n"


def test_only_the_first_process_samples(session: Session, samplings: list[Sampling], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pause.processes, "is_first", lambda: False)
    assert pause.samples(session, STATE) == []
    assert not samplings


def test_a_page_that_can_not_be_written_stops_no_run(session: Session, monkeypatch: pytest.MonkeyPatch):
    def full(folder: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pause, "write_report", full)
    pause.update_report(session)
