"""Cached decode equals the full forward pass, at every position of every row, however the tokens arrive."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import TINY, tiny, tokens, weights

from llm_jax.model.cache import Cache, init_cache
from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.model.stack import unstack
from llm_jax.model.transformer import Output, Transformer
from llm_jax.ops.experts import Experts
from llm_jax.ops.mask import Sparse
from llm_jax.ops.position import Rotary

B, L = 3, TINY.max_seq_len
TOKENS = tokens(B, L)
# Prompts of three lengths in one batch, padded on the right.
LENGTHS = jnp.array([4, 1, 3])


def runner(config: ModelConfig, stacked: bool = True) -> Any:
    """The jitted forward pass over a cache: (tokens, cache) -> Output."""
    params = weights(config) if stacked else unstack(config, weights(config))
    model = Transformer(config, stacked=stacked)
    return jax.jit(lambda tokens, cache, **inputs: model.apply({"params": params}, tokens, cache=cache, **inputs))


def full(config: ModelConfig) -> jax.Array:
    return jax.jit(lambda: Transformer(config).apply({"params": weights(config)}, TOKENS).logits)()


def windowed(window: int) -> dict[str, Any]:
    return {"layers": ("local",), "attention": AttentionConfig(window=window)}


LONGROPE = {"scaling": "longrope", "original_len": 6, "short_factors": (1.0, 2.0), "long_factors": (3.0, 5.0)}
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "rotary": ({}, True),
    "learned positions in a window": ({"positions": "learned", **windowed(3), "n_kv_heads": None}, True),
    "linear attention among softmax": ({"layers": ("linear", "global"), "n_layers": 3}, True),
    "the delta rule, experts and a remainder, unstacked": (
        {"layers": ("delta+moe", "nope"), "n_layers": 3, "experts": Experts(number=4, d_ff=8)},
        False,
    ),
    "the delta rule alone": ({"layers": ("delta",)}, True),
    "sinks and sparse blocks": (
        {
            "layers": ("local", "sparse"),
            "attention": AttentionConfig(window=2, sinks=1, sparse=Sparse("fixed", block=2, stride=2)),
            "positions": "alibi",
        },
        True,
    ),
    "unstacked sinusoidal in a window": ({"positions": "sinusoidal", **windowed(2), "n_kv_heads": 1}, False),
    "longrope, whose keys of the start go by the length of the end": ({"rotary": Rotary(**LONGROPE)}, True),
    "dynamic": ({"rotary": Rotary(scaling="dynamic", factor=3.0, original_len=6, pairs="interleaved")}, True),
}


SLOW = ("dynamic", "linear attention among softmax", "unstacked sinusoidal in a window", "the delta rule alone")


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES])
def test_ragged_decode_equals_the_full_forward_at_every_position(case: str):
    changes, stacked = CASES[case]
    config = tiny(**changes)
    expected, run = full(config), runner(config, stacked)

    prompt = jnp.where(jnp.arange(4)[None] < LENGTHS[:, None], TOKENS[:, :4], 0)
    out: Output = run(prompt, init_cache(config, B, L), lengths=LENGTHS)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(out.logits[row, :length], expected[row, :length], rtol=1e-5, atol=1e-5)

    cache = out.cache
    assert (cache.length == LENGTHS).all()
    for step in range(L - int(LENGTHS.max())):
        position = LENGTHS + step
        out = run(TOKENS[jnp.arange(B), position][:, None], cache)
        cache = out.cache
        assert (cache.length == position + 1).all()
        np.testing.assert_allclose(
            out.logits[:, 0], expected[jnp.arange(B), position], rtol=1e-5, atol=1e-5, err_msg=f"step {step}"
        )


@pytest.mark.parametrize("layers", [("global",), ("linear", "delta")], ids=str)
def test_a_prompt_may_arrive_in_pieces(layers: tuple[str, ...]):
    config = tiny(layers=layers)
    run, cache, found = runner(config), init_cache(config, B, L), []
    for start, stop in ((0, 4), (4, 8), (8, 9), (9, 10)):
        out = run(TOKENS[:, start:stop], cache)
        cache = out.cache
        found.append(out.logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), full(config), rtol=1e-5, atol=3e-5)


def test_a_prefix_sees_itself_both_ways_and_what_comes_after_it_the_past():
    """As in one pass over the row, whose first tokens are its prefix."""
    prefix = jnp.arange(L)[None] < LENGTHS[:, None]
    whole = jax.jit(lambda p: Transformer(TINY).apply({"params": p}, TOKENS, prefix=prefix))(weights(TINY))
    assert jnp.abs(whole.logits - full(TINY)).max() > 0.01
    run = runner(TINY)
    out = run(TOKENS[:, :4], init_cache(TINY, B, L), prefix=prefix[:, :4])
    np.testing.assert_allclose(out.logits, whole.logits[:, :4], rtol=1e-5, atol=1e-5)
    out = run(TOKENS[:, 4:], out.cache)
    np.testing.assert_allclose(out.logits, whole.logits[:, 4:], rtol=1e-5, atol=1e-5)


def test_what_the_padding_wrote_is_never_seen():
    """Whatever stands after `length` in the cache, the logits are the same bit for bit."""
    run, cache = runner(TINY), init_cache(TINY, B, L).replace(length=LENGTHS)
    padding = (jnp.arange(L)[None] >= LENGTHS[:, None])[None, :, None, :, None]
    dirty = cache.replace(k=jnp.where(padding, 100.0, cache.k), v=jnp.where(padding, 100.0, cache.v))
    assert (run(TOKENS[:, :1], dirty).logits == run(TOKENS[:, :1], cache).logits).all()


def test_writing_leaves_other_layers_and_earlier_tokens_alone():
    cache = init_cache(TINY, B, L).replace(length=LENGTHS)
    new = jnp.ones((B, 2, TINY.K, TINY.H))
    written = cache.write(1, new, 2 * new)
    expected = np.zeros((B, L))
    for row, length in enumerate(LENGTHS):
        expected[row, length : length + 2] = 1
    for layer in range(TINY.n_layers):
        k, v = written.keys_values(layer)
        np.testing.assert_array_equal(k[:, :, 0, 0], expected * layer)
        np.testing.assert_array_equal(v[:, :, 0, 0], 2 * expected * layer)
    assert (written.length == LENGTHS).all()
    assert (written.advance(2).length == LENGTHS + 2).all()


def test_tokens_beyond_the_end_of_the_cache_are_dropped():
    cache = init_cache(TINY, B, L).replace(length=jnp.full(B, L - 1))
    new = jnp.ones((B, 3, TINY.K, TINY.H)) * jnp.arange(1.0, 4.0)[None, :, None, None]
    k, _ = cache.write(0, new, new).keys_values(0)
    np.testing.assert_array_equal(k[0, :, 0, 0], [0.0] * (L - 1) + [1.0])


def test_a_cache_holds_the_dtype_of_the_computation():
    cache: Cache = jax.eval_shape(lambda: init_cache(tiny(dtype="bfloat16"), 2, 7))
    assert cache.k.shape == cache.v.shape == (TINY.n_layers, 2, TINY.K, 7, TINY.H)
    assert cache.k.dtype == jnp.bfloat16
    assert cache.length.shape == (2,)


def test_a_forward_pass_without_a_cache_returns_none():
    out = jax.eval_shape(lambda: Transformer(TINY).apply({"params": weights(TINY)}, TOKENS))
    assert out.cache is None
