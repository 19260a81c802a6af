"""Named activations: all of them, in order; an edit replaces what it names; unused they leave no trace."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from grid import TINY, tiny, tokens, weights
from jaxprs import equations

from llm_jax.model.cache import init_cache
from llm_jax.model.config import TAPS, AttentionConfig, ModelConfig
from llm_jax.model.pattern import locate
from llm_jax.model.stack import unstack
from llm_jax.model.taps import capture, edit
from llm_jax.model.transformer import Transformer
from llm_jax.ops.experts import Experts

B, L = 2, 5
TOKENS = tokens(B, L)
MODEL, N, D = Transformer(TINY), TINY.n_layers, TINY.d_model
K, G, H, F = TINY.K, TINY.G, TINY.H, TINY.F


@pytest.fixture(scope="module")
def taps() -> dict[str, jax.Array]:
    return jax.jit(lambda params: capture(MODEL, params, TOKENS))(weights(TINY))


@pytest.fixture(scope="module")
def logits() -> jax.Array:
    return jax.jit(lambda params: MODEL.apply({"params": params}, TOKENS).logits)(weights(TINY))


def edited(edits: dict[str, Any]) -> jax.Array:
    return jax.jit(lambda params, edits: edit(MODEL, params, TOKENS, edits))(weights(TINY), edits)


def test_every_activation_is_captured_in_the_order_of_the_forward_pass():
    found: dict[str, tuple[int, ...]] = {}  # filled while tracing: what a traced function returns is sorted by name
    model = Transformer(TINY)
    jax.eval_shape(lambda p: found.update({n: x.shape for n, x in capture(model, p, TOKENS).items()}), weights(TINY))
    stream, scores = (N, B, L, D), (N, B, K, G, L, L)
    heads, queries = (N, B, L, K, H), (N, B, L, K, G, H)
    assert list(found.items()) == [
        ("embed", (B, L, D)),
        ("resid_pre", stream),
        ("q", queries),
        ("k", heads),
        ("v", heads),
        ("attn_scores", scores),
        ("pattern", scores),
        ("z", queries),
        ("attn_out", stream),
        ("resid_mid", stream),
        ("mlp_pre", (N, B, L, F)),
        ("mlp_post", (N, B, L, F)),
        ("mlp_out", stream),
        ("resid_post", stream),
        ("final", (B, L, D)),
        ("logits", (B, L, TINY.vocab_size)),
    ]


def test_what_is_captured_is_what_the_names_say(taps: dict[str, jax.Array], logits: jax.Array):
    def equal(mine: jax.Array, theirs: jax.Array) -> None:
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5)

    equal(taps["logits"], logits)
    equal(taps["resid_pre"][0], taps["embed"])
    equal(taps["resid_pre"][1:], taps["resid_post"][:-1])
    equal(taps["resid_mid"], taps["resid_pre"] + taps["attn_out"])
    equal(taps["resid_post"], taps["resid_mid"] + taps["mlp_out"])
    equal(taps["pattern"].sum(-1), jnp.ones((N, B, K, G, L)))
    equal(taps["z"], jnp.einsum("NBKGLS,NBSKH->NBLKGH", taps["pattern"], taps["v"]))
    equal(taps["attn_out"], jnp.einsum("NBLKGH,NKGHD->NBLD", taps["z"], weights(TINY)["layers"]["attention"]["w_o"]))
    equal(
        taps["mlp_out"],
        jnp.einsum("NBLF,NFD->NBLD", taps["mlp_post"], weights(TINY)["layers"]["feedforward"]["w_down"]),
    )


@pytest.mark.parametrize("name", [name for name in TAPS if locate(TINY, 0).kind.has(name)])
def test_an_edit_with_what_was_captured_changes_nothing_any_other_does(
    name: str, taps: dict[str, jax.Array], logits: jax.Array
):
    run = jax.jit(lambda x: edit(MODEL, weights(TINY), TOKENS, {name: x}))
    np.testing.assert_allclose(run(taps[name]), logits, rtol=1e-5, atol=1e-5)
    noise = normal(*taps[name].shape)
    assert jnp.abs(run(taps[name] + noise) - logits).max() > 1e-2


def test_without_what_the_layers_write_the_embedding_reaches_the_end(taps: dict[str, jax.Array]):
    silent = edited({name: jnp.zeros((N, B, L, D)) for name in ("attn_out", "mlp_out")})
    direct = edited({"resid_post": jnp.broadcast_to(taps["embed"], (N, B, L, D))})
    np.testing.assert_allclose(silent, direct, rtol=1e-5, atol=1e-5)


def test_a_pattern_that_looks_at_itself_hands_each_token_its_own_value(taps: dict[str, jax.Array], logits: jax.Array):
    """In the last layer, by three paths that meet: through the scores, the pattern and z."""
    itself = jnp.broadcast_to(jnp.eye(L), (B, K, G, L, L))
    values = jnp.broadcast_to(taps["v"][-1][:, :, :, None], (B, L, K, G, H))
    by_scores = edited({"attn_scores": taps["attn_scores"].at[-1].set(jnp.where(itself == 1, 0.0, -1e9))})
    by_pattern = edited({"pattern": taps["pattern"].at[-1].set(itself)})
    by_z = edited({"z": taps["z"].at[-1].set(values)})
    np.testing.assert_allclose(by_scores, by_pattern, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_z, by_pattern, rtol=1e-5, atol=1e-5)
    assert jnp.abs(by_pattern - logits).max() > 1e-2


MIXED = tiny(
    layers=("delta", "local+moe", "global"),
    n_layers=5,
    attention=AttentionConfig(window=3),
    experts=Experts(number=4, d_ff=8),
)


def test_layers_of_several_kinds_are_captured_and_edited_in_their_order():
    """Five layers of a period of three: every activation has a row for each layer that has it, and only for those."""
    model, params = Transformer(MIXED), weights(MIXED)
    taps = jax.jit(lambda params: capture(model, params, TOKENS))(params)
    np.testing.assert_allclose(taps["resid_pre"][1:], taps["resid_post"][:-1], rtol=1e-6)
    counts = {name: len(taps[name]) for name in ("q", "pattern", "router", "mlp_post", "resid_mid")}
    assert counts == {"q": 5, "pattern": 3, "router": 2, "mlp_post": 3, "resid_mid": 5}
    assert taps["router"].shape == (2, B, L, 4)
    inside = {name: x for name, x in taps.items() if name != "logits"}
    run = jax.jit(lambda edits: edit(model, params, TOKENS, edits))
    np.testing.assert_allclose(run(inside), taps["logits"], rtol=1e-5, atol=1e-5)
    flat = jax.jit(lambda params: Transformer(MIXED, stacked=False).apply({"params": params}, TOKENS).logits)
    np.testing.assert_allclose(flat(unstack(MIXED, params)), taps["logits"], rtol=1e-5, atol=1e-5)
    for row in range(5):  # each row is that of its layer: what the last layers read is what was put there
        noise = jnp.zeros_like(taps["attn_out"]).at[row].set(1.0)
        moved = run({"attn_out": taps["attn_out"] + noise})
        assert jnp.abs(moved - taps["logits"]).max() > 1e-3


def test_an_activation_that_no_layer_has_is_refused():
    with pytest.raises(ValueError, match=r"no layer of model.layers=global has the activation 'router'"):
        edit(MODEL, weights(TINY), TOKENS, {"router": jnp.zeros((N, B, L, 4))})


def test_an_edit_takes_the_dtype_of_the_activation():
    config = tiny(dtype="bfloat16")
    zeros = {"attn_out": jnp.zeros((N, B, L, D), jnp.float32)}
    taps = jax.eval_shape(lambda p: capture(Transformer(config), p, TOKENS), weights(config))
    assert taps["attn_out"].dtype == jnp.bfloat16
    out = jax.eval_shape(lambda p: edit(Transformer(config), p, TOKENS, zeros), weights(config))
    assert out.shape == (B, L, TINY.vocab_size)


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="no activation is called 'atn_out'; did you mean 'attn_out'"):
        edit(MODEL, weights(TINY), TOKENS, {"atn_out": jnp.zeros((N, B, L, D))})


def test_an_edit_of_another_shape_is_refused_with_both():
    with pytest.raises(ValueError, match=r"the edit of 'attn_out' has shape \(5, 24\) where the activation has \(2, 5"):
        edit(MODEL, weights(TINY), TOKENS, {"attn_out": jnp.zeros((B, L, D))})


def test_unstacked_layers_are_refused():
    flat = unstack(TINY, weights(TINY))
    with pytest.raises(ValueError, match="activations are read from stacked layers"):
        capture(Transformer(TINY, stacked=False), flat, TOKENS)
    with pytest.raises(ValueError, match="activations are read from stacked layers"):
        edit(Transformer(TINY, stacked=False), flat, TOKENS, {"embed": jnp.zeros((B, L, D))})


def untapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `tap` the identity everywhere."""
    for module in ("transformer", "attention", "feedforward"):
        monkeypatch.setattr(f"llm_jax.model.{module}.tap", lambda module, name, x, kept=(): x)


def training(config: ModelConfig) -> Callable:
    model = Transformer(config)
    return jax.grad(lambda params: model.apply({"params": params}, TOKENS).logits.sum())


def decoding(config: ModelConfig) -> Callable:
    return lambda params: Transformer(config).apply({"params": params}, TOKENS, cache=init_cache(config, B, 8))


@pytest.mark.parametrize("program", [training, decoding])
def test_unused_taps_leave_no_trace_in_the_program(program: Callable, monkeypatch: pytest.MonkeyPatch):
    tapped = str(jax.make_jaxpr(program(TINY))(weights(TINY)))
    untapped(monkeypatch)
    assert str(jax.make_jaxpr(program(TINY))(weights(TINY))) == tapped


def test_only_taps_that_rematerialization_keeps_are_named_in_the_program():
    program = equations(training(tiny(remat="mlp_post,resid_mid")), weights(TINY))
    assert {e.params["name"] for _, e in program if e.primitive.name == "name"} == {"mlp_post", "resid_mid"}
