"""With a draft texts come in fewer passes, and are those of the model."""

import dataclasses

import jax
import numpy as np
import pytest
from test_generate import CONFIG, GREEDY, PROMPTS, TEXT, weights
from tiny_run import generate

from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.infer.generate import Sampler
from llm_jax.ops.sampling import Sampling

SMALL = dataclasses.replace(CONFIG, d_model=8, n_layers=1, n_heads=2, n_kv_heads=1)


class Other(ByteTokenizer):
    """One that means other bytes by the same tokens."""

    @property
    def fingerprint(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "another"


def drafts() -> list:
    return ["lookup", Sampler(SMALL, weights(SMALL), TEXT), Sampler(CONFIG, weights(), TEXT)]


@pytest.mark.parametrize("stop", [(), ("e", "x")])
def test_greedy_texts_are_the_same_with_any_draft(stop: tuple[str, ...]):
    """Rows of several lengths, which keep different numbers of tokens at a time."""
    sampler = Sampler(CONFIG, weights(), TEXT)
    options = {"max_tokens": 30, "stop": stop}
    alone = sampler.texts(PROMPTS, GREEDY, **options)
    found = [sampler.texts(PROMPTS, GREEDY, draft=draft, **options) for draft in drafts()]
    for texts in found:
        assert [(text.text, text.finish) for text in texts] == [(text.text, text.finish) for text in alone]
    assert all(text.kept == text.drafted > 0 for text in found[-1])  # the model is its own best draft
    assert all(text.drafted == 0 for text in alone)


def test_a_repetition_penalty_counts_the_tokens_that_were_kept():
    sampling = Sampling(temperature=0, repetition_penalty=1.5)
    alone = generate(CONFIG, weights(), TEXT, PROMPTS, sampling=sampling, max_tokens=20)
    for draft in drafts()[::2]:
        assert generate(CONFIG, weights(), TEXT, PROMPTS, sampling=sampling, max_tokens=20, draft=draft) == alone


def test_a_row_draws_the_same_with_a_draft_whatever_its_neighbours():
    options = {"max_tokens": 12, "draft": drafts()[1], "sampling": Sampling(0.9, top_k=40, top_p=0.95)}
    one, other = (generate(CONFIG, weights(), TEXT, ["a", *more], **options)[0] for more in ([], ["import os, sys"]))
    assert one == other


@pytest.mark.slow
def test_sampled_texts_with_a_draft_have_the_distribution_of_those_without():
    """The first two tokens of many samples, by a filter that leaves few: shares differ by their error at most."""
    n, sampling = 4000, Sampling(temperature=1.0, top_k=3)
    sampler = Sampler(CONFIG, weights(), TEXT)

    def shares(**options) -> dict[str, float]:
        texts = sampler.generate(["a"] * n, sampling, max_tokens=3, **options)
        return {text: texts.count(text) / n for text in set(texts)}

    plain = shares(seed=1)
    for draft in drafts()[:2]:
        found = shares(seed=2, draft=draft)
        for text in plain | found:
            share = max(plain.get(text, 0), found.get(text, 0))
            assert abs(plain.get(text, 0) - found.get(text, 0)) < 5 * np.sqrt(2 * share / n) + 2 / n


def test_a_draft_that_does_not_fit_is_refused():
    sampler = Sampler(CONFIG, weights(), TEXT)
    short = dataclasses.replace(CONFIG, max_seq_len=16)
    state = dataclasses.replace(CONFIG, layers=("delta",))
    for draft, says in (
        ("lokup", "draft='lokup' is neither a Sampler nor 'lookup'"),
        (Sampler(CONFIG, weights(), Other()), "have another tokenizer"),
        (Sampler(short, weights(), TEXT), "the draft reads 16 tokens and the model 48"),
        (Sampler(state, weights(state), TEXT), "the draft has layers that keep a state"),
    ):
        with pytest.raises(ValueError, match=says):
            sampler.generate(["a"], draft=draft)
    with pytest.raises(ValueError, match="the model has layers that keep a state"):
        Sampler(state, weights(state), TEXT).generate(["a"], draft="lookup")


def test_a_draft_whose_weights_are_broken_costs_time_and_nothing_else():
    broken = jax.tree.map(lambda leaf: leaf * np.nan, weights(SMALL))
    draft = Sampler(SMALL, broken, TEXT)
    alone = generate(CONFIG, weights(), TEXT, ["a"], sampling=GREEDY, max_tokens=12)
    assert generate(CONFIG, weights(), TEXT, ["a"], sampling=GREEDY, max_tokens=12, draft=draft) == alone
