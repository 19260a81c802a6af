"""What a decoder reads of a model's weights, and what it refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_generate import CONFIG, PROMPTS, TEXT, weights

from llm_jax.infer.decode import logits_of, prepare, read
from llm_jax.infer.generate import Sampler
from llm_jax.model.cache import init_cache
from llm_jax.model.transformer import Transformer, forward
from llm_jax.ops.experts import Experts
from llm_jax.ops.int8 import Quantized
from llm_jax.tree import leaves

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 264, (2, 12), np.int32))


def logits(how: str | None) -> jax.Array:
    """Of all tokens but the last in one pass, and of the last by itself."""
    prepared, cache = prepare(CONFIG, weights(), how), init_cache(CONFIG, 2, 16)

    @jax.jit
    def run(prepared, cache):
        first, cache = read(CONFIG, prepared, cache, TOKENS[:, :-1])
        last, _ = read(CONFIG, prepared, cache, TOKENS[:, -1:])
        hidden = jnp.concatenate([first, last], axis=1).reshape(-1, CONFIG.d_model)
        return logits_of(CONFIG, 264, prepared, hidden)

    return run(prepared, cache)


def test_prepared_weights_give_the_logits_of_the_model():
    full = jax.jit(lambda p: forward(Transformer(CONFIG), p, TOKENS).logits)(weights())
    np.testing.assert_allclose(logits(None).reshape(2, 12, -1), full[..., :264], atol=3e-5)


def test_int8_logits_are_near_those_of_the_model():
    exact, found = logits(None), logits("int8")
    assert 0 < jnp.abs(found - exact).max() < 0.1 * jnp.abs(exact).max()
    assert jnp.sqrt(jnp.square(found - exact).mean() / jnp.square(exact).mean()) < 0.03


def test_int8_holds_matrices_and_no_norms_biases_or_embeddings():
    prepared = prepare(CONFIG, weights(), "int8")
    kinds = {path.split("/", 1)[-1]: leaf.dtype for path, leaf in leaves(prepared.params).items()}
    int8 = {path.removesuffix("/values") for path, dtype in kinds.items() if dtype == jnp.int8}
    matrices = {f"attention/w_{name}" for name in "qkvo"} | {f"feedforward/w_{name}" for name in ("up", "gate", "down")}
    assert {path.strip(".") for path in int8} == matrices
    assert isinstance(prepared.head, Quantized)


def test_int8_is_refused_for_experts_and_other_names_for_all():
    moe = dataclasses.replace(CONFIG, layers=("global+moe",), experts=Experts(number=4, d_ff=8))
    with pytest.raises(ValueError, match="weights=int8 takes no experts"):
        Sampler(moe, weights(moe), TEXT, weights="int8")
    with pytest.raises(ValueError, match="weights='int4' is no way to hold weights; use 'int8'"):
        Sampler(CONFIG, weights(), TEXT, weights="int4")


def test_int8_generates_whole_texts():
    assert all(Sampler(CONFIG, weights(), TEXT, weights="int8").generate(PROMPTS[:2], max_tokens=6, seed=1))
