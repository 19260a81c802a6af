"""The filters keep what they promise, and draws follow what is left."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from llm_jax.config import override
from llm_jax.ops import sampling as ops
from llm_jax.ops.sampling import NO_TOKEN, Sampling, filters

top_k, top_p, min_p = (jax.jit(keep, static_argnums=1) for keep in (ops.top_k, ops.top_p, ops.min_p))
repetition_penalty = jax.jit(ops.repetition_penalty, static_argnums=2)
compiled = jax.jit(ops.sample)

B, V = 3, 17
NONE_SEEN = jnp.zeros((B, V), bool)

# Steps of 1/8: sums and ties are exact, and no two logits differ by less than rounding does.
logits = arrays(np.float32, (B, V), elements=st.integers(-64, 64).map(lambda n: n / 8))
share = st.sampled_from([0.01, 0.2, 0.5, 0.9, 0.999, 1.0])


def sample(x, keys, seen, sampling: Sampling):
    return compiled(x, keys, seen, filters(sampling))


def keys(seed: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), B)


def kept(x: jax.Array) -> np.ndarray:
    return np.isfinite(np.asarray(x))


def probabilities(x: np.ndarray) -> np.ndarray:
    e = np.exp(x.astype(np.float64) - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@given(logits, st.sampled_from([1, 2, 5, V - 1, V, 2 * V]))
def test_top_k_keeps_the_k_largest_and_those_equal_to_the_last(x: np.ndarray, k: int):
    of = np.sort(x, axis=-1)[:, ::-1][:, min(k, V) - 1]
    out = top_k(jnp.asarray(x), k)
    np.testing.assert_array_equal(kept(out), x >= of[:, None])
    np.testing.assert_array_equal(np.asarray(out)[kept(out)], x[kept(out)])


@given(logits, share)
def test_top_p_keeps_mass_p_and_would_not_without_its_least_likely_tokens(x: np.ndarray, p: float):
    of, mine = probabilities(x), kept(top_p(jnp.asarray(x), p))
    for row, probability, keep in zip(x, of, mine, strict=True):
        assert probability[keep].sum() >= p - 1e-5
        least = row[keep].min()
        assert probability[row > least].sum() < p + 1e-5
        assert set(row[keep]).isdisjoint(row[~keep])
        assert row[~keep].max(initial=-np.inf) < least


def test_top_p_distinguishes_probabilities_by_their_last_bits():
    x = np.random.default_rng(0).permuted(np.tile(np.arange(V, dtype=np.float32) / 2**17, (B, 1)), axis=-1)
    for p, least in ((0.5, 9), (0.9, 16), (0.02, 1)):  # all but even: one in 17 each
        assert (kept(top_p(jnp.asarray(x), p)).sum(-1) == least).all()


@given(logits, share)
def test_min_p_keeps_what_is_p_times_as_likely_as_the_likeliest(x: np.ndarray, p: float):
    ratio = probabilities(x) / probabilities(x).max(-1, keepdims=True)
    mine = kept(min_p(jnp.asarray(x), p))
    assert mine[ratio > p * (1 + 1e-5)].all()
    assert not mine[ratio < p * (1 - 1e-5)].any()


@given(logits, arrays(bool, (B, V)), st.sampled_from([1.01, 1.5, 4.0]))
def test_a_repetition_penalty_lowers_seen_tokens_and_no_others(x: np.ndarray, seen: np.ndarray, penalty):
    out = np.asarray(repetition_penalty(jnp.asarray(x), jnp.asarray(seen), penalty))
    assert (out[seen & (x != 0)] < x[seen & (x != 0)]).all()
    np.testing.assert_array_equal(out[~seen], x[~seen])


@given(logits, st.integers(0, 99))
def test_temperature_zero_and_near_zero_and_top_k_one_take_the_largest(x: np.ndarray, seed: int):
    x = 1000 * (x + np.arange(V, dtype=np.float32) / 256)  # no ties
    for sampling in (Sampling(temperature=0), Sampling(top_k=1), Sampling(temperature=1e-37)):
        np.testing.assert_array_equal(sample(jnp.asarray(x), keys(seed), NONE_SEEN, sampling), x.argmax(-1))


def test_other_numbers_of_the_same_filters_need_no_other_program():
    x, before = jnp.zeros((B, V)), compiled._cache_size()
    for number in (0.2, 0.5, 0.9):
        sample(x, keys(0), NONE_SEEN, Sampling(number, int(10 * number), number, number, 1 + number))
    assert compiled._cache_size() == before + 1


@given(logits, st.integers(0, 99))
def test_only_kept_tokens_are_drawn(x: np.ndarray, seed: int):
    for name, value, keep in (("top_k", 3, top_k), ("top_p", 0.7, top_p), ("min_p", 0.2, min_p)):
        drawn = sample(jnp.asarray(x), keys(seed), NONE_SEEN, Sampling(**{name: value}))
        assert kept(keep(jnp.asarray(x), value))[np.arange(B), drawn].all()


@given(logits, st.integers(0, 99))
def test_a_draw_does_not_depend_on_the_other_rows(x: np.ndarray, seed: int):
    sampling = Sampling(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01, repetition_penalty=1.3)
    together = sample(jnp.asarray(x), keys(seed), NONE_SEEN, sampling)
    for row in (slice(i, i + 1) for i in range(B)):
        alone = sample(jnp.asarray(x[row]), keys(seed)[row], NONE_SEEN[row], sampling)
        np.testing.assert_array_equal(together[row], alone)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_come_as_often_as_the_tempered_softmax_says(temperature: float):
    n, row = 20_000, np.array([0.0, 1.0, 2.0, -1.0], np.float32)
    many, unseen = jax.random.split(jax.random.key(0), n), jnp.zeros((n, 4), bool)
    drawn = sample(np.tile(row, (n, 1)), many, unseen, Sampling(temperature=temperature))
    expected = probabilities(row / np.float32(temperature))
    tolerance = 4 * np.sqrt(expected * (1 - expected) / n)  # four standard errors of a share
    assert (np.abs(np.bincount(np.asarray(drawn), minlength=4) / n - expected) < tolerance).all()


@pytest.mark.parametrize(
    "setting",
    ["temperature=-0.1", "top_k=0", "top_p=0.0", "top_p=1.1", "min_p=-0.5", "repetition_penalty=0.0"],
)
def test_a_setting_that_cannot_be_is_refused_with_its_value(setting: str):
    with pytest.raises(ValueError, match=setting):
        override(Sampling(), [setting])


NO_NUMBERS = [float("nan"), float("inf"), -float("inf"), -1.0, 1e-320, 1e39, "0.5", True]


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Sampling)])
def test_no_field_takes_what_float32_cannot_draw_with(name: str):
    for value in NO_NUMBERS:
        if (name, value) in (("top_p", 1e-320), ("min_p", 1e-320)):  # the likeliest alone, and all: what they say
            continue
        with pytest.raises(ValueError, match=rf"^{name}={re.escape(str(value))} .*; "):
            Sampling(**{name: value})
    Sampling(**{name: np.float32(1) if name != "top_k" else np.int64(1)})


@given(logits, st.sampled_from([1e-6, 1e6]), st.sampled_from([1e-37, 1e37]))
def test_at_the_ends_of_their_ranges_settings_still_draw_tokens(x: np.ndarray, penalty: float, temperature: float):
    seen = jnp.asarray(np.arange(B * V).reshape(B, V) % 2 == 0)
    drawn = sample(jnp.asarray(x), keys(0), seen, Sampling(temperature, None, 1e-30, 1e-30, penalty))
    assert (drawn >= 0).all()


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=3, top_p=0.9), Sampling(min_p=0.1)])
def test_a_row_whose_logits_are_no_numbers_draws_no_token(sampling: Sampling):
    x = np.zeros((B, V), np.float32)
    x[0, 3], x[1] = np.nan, -np.inf
    assert sample(jnp.asarray(x), keys(0), NONE_SEEN, sampling).tolist()[:2] == [NO_TOKEN] * 2
    assert sample(jnp.asarray(x), keys(0), NONE_SEEN, sampling)[2] >= 0
