"""What a language model must be: causal, blind to other documents, the same in every way of running it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from grid import GRID, TINY, local, shapes, tiny, tokens, weights
from jaxprs import equations

from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.model.stack import unstack
from llm_jax.model.taps import capture, edit
from llm_jax.model.transformer import Transformer, head_table
from llm_jax.ops.loss import cross_entropy

B, L = 2, 8
TOKENS = tokens(B, L)
# Two documents and padding; positions restart.
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 2, 2, 0], [1, 1, 1, 1, 1, 2, 2, 2]])
POSITIONS = jnp.array([[0, 1, 2, 0, 1, 2, 3, 0], [0, 1, 2, 3, 4, 0, 1, 2]])
PACKED = {"segments": SEGMENTS, "positions": POSITIONS}


def logits(config: ModelConfig, params: Any, tokens: jax.Array, **inputs: Any) -> jax.Array:
    return jax.jit(lambda p, t, i: Transformer(config).apply({"params": p}, t, **i).logits)(params, tokens, inputs)


def embedding_gradient(config: ModelConfig, position: int, **inputs: Any) -> jax.Array:
    """How the logits at `position` depend on each input embedding: B L D."""

    def read(embeddings: jax.Array) -> jax.Array:
        out = edit(Transformer(config), weights(config), TOKENS, {"embed": embeddings}, **inputs)
        return (out[:, position] * jnp.arange(1.0, config.vocab_size + 1)[None]).sum()

    return jax.jit(jax.grad(read))(normal(B, L, config.d_model, seed=2))


@pytest.mark.parametrize("residual", ["pre", "post", "sandwich", "output", "parallel"])
@pytest.mark.parametrize("positions", ["rotary", "learned", "sinusoidal", "none"])
def test_future_tokens_get_no_gradient_and_past_ones_do(positions: str, residual: str):
    norm = "layernorm" if positions in ("learned", "none") else "rmsnorm"
    config = tiny(positions=positions, residual=residual, norm=norm)
    touched = (embedding_gradient(config, 4) != 0).any(-1)
    assert touched.tolist() == [[True] * 5 + [False] * 3] * B


def test_a_window_ends_the_gradient_in_the_past_too():
    """Two layers of window 3 reach four positions back."""
    touched = (embedding_gradient(local(3), 6) != 0).any(-1)
    assert touched.tolist() == [[False] * 2 + [True] * 5 + [False]] * B


def test_packed_documents_give_each_other_no_gradient():
    touched = (embedding_gradient(TINY, 5, **PACKED) != 0).any(-1)
    assert touched.tolist() == [
        [False, False, False, True, True, True, False, False],
        [False, False, False, False, False, True, False, False],
    ]


def test_another_document_in_the_row_changes_no_bit():
    before = logits(TINY, weights(TINY), TOKENS, **PACKED)
    for document in (1, 2):
        mine = document == SEGMENTS
        after = logits(TINY, weights(TINY), jnp.where(mine, TOKENS, (TOKENS + 1) % TINY.vocab_size), **PACKED)
        same = (before == after).all(-1)
        assert same[mine].all()
        assert not same[~mine].any()


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_packed_row_gives_each_document_what_it_gets_alone(positions: str):
    config = tiny(positions=positions)
    packed = logits(config, weights(config), TOKENS, **PACKED)
    for row, start, stop in ((0, 0, 3), (0, 3, 7), (1, 0, 5), (1, 5, 8)):
        alone = logits(config, weights(config), TOKENS[row : row + 1, start:stop])
        np.testing.assert_allclose(packed[row, start:stop], alone[0], rtol=1e-5, atol=1e-5)


def test_multi_head_attention_is_grouped_attention_with_every_key_repeated():
    grouped, c = weights(TINY), TINY
    attention = dict(grouped["layers"]["attention"])
    attention["w_q"] = attention["w_q"].reshape(c.n_layers, c.d_model, c.n_heads, 1, c.H)
    attention["w_o"] = attention["w_o"].reshape(c.n_layers, c.n_heads, 1, c.H, c.d_model)
    attention |= {name: jnp.repeat(attention[name], c.G, axis=2) for name in ("w_k", "w_v")}
    multi = grouped | {"layers": grouped["layers"] | {"attention": attention}}
    np.testing.assert_allclose(
        logits(tiny(n_kv_heads=None), multi, TOKENS), logits(c, grouped, TOKENS), rtol=1e-5, atol=1e-5
    )


def test_hidden_states_times_the_head_are_the_logits():
    for config in (TINY, tiny(tied=False)):
        model = Transformer(config)
        both = jax.jit(lambda p, m=model: [m.apply({"params": p}, TOKENS, logits=logits) for logits in (True, False)])
        out, bare = both(weights(config))
        assert bare.logits is None
        np.testing.assert_allclose(bare.hidden, out.hidden, rtol=1e-6, atol=1e-6)
        product = bare.hidden @ head_table(config, weights(config)).T
        np.testing.assert_allclose(product, out.logits, rtol=1e-5, atol=1e-5)


def gradients(config: ModelConfig, stacked: bool = True) -> Any:
    """The gradient of a loss by the stacked parameters, whichever way the layers run."""

    def loss(params: Any) -> jax.Array:
        params = params if stacked else unstack(config, params)
        out = Transformer(config, stacked=stacked).apply({"params": params}, TOKENS, **PACKED)
        return cross_entropy(out.logits, jnp.roll(TOKENS, -1, axis=1))[0].mean()

    return jax.jit(jax.grad(loss))(weights(TINY))


@functools.cache
def plain_gradients() -> Any:
    return gradients(TINY)


WAYS: dict[str, Callable[[], Any]] = {
    "layers unstacked": lambda: gradients(TINY, stacked=False),
    "two layers a step of the scan": lambda: gradients(tiny(unroll=2)),
    "all of a block computed again": lambda: gradients(tiny(remat="full")),
    "all but matrix products computed again": lambda: gradients(tiny(remat="dots")),
    "all but two taps computed again": lambda: gradients(tiny(remat="resid_mid,mlp_post")),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_running_the_layers_gives_the_same_gradient(way: str):
    for mine, theirs in zip(*map(jax.tree.leaves, (WAYS[way](), plain_gradients())), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)


def residuals(remat: str) -> list[str]:
    """Activations that the forward scan hands to the backward scan, by their letters, a layer each."""
    letters = {(B, L, TINY.d_model): "BLD", (B, L, TINY.F): "BLF"}
    letters |= {(B, L, TINY.K, TINY.G, TINY.H): "BLKGH", (B, L, TINY.K, TINY.H): "BLKH"}
    letters |= {(B, TINY.K, TINY.G, L, L): "BKGLS"}

    def loss(params: Any) -> jax.Array:
        return Transformer(tiny(remat=remat)).apply({"params": params}, TOKENS).logits.sum()

    scans = [e for _, e in equations(jax.grad(loss), weights(TINY)) if e.primitive.name == "scan"]
    handed = [array.aval.shape[1:] for array in scans[0].outvars]
    return sorted(letters[shape] for shape in handed if shape in letters)


def test_rematerialization_keeps_what_it_names_and_the_block_input():
    assert residuals("full") == ["BLD"]
    assert residuals("mlp_post") == ["BLD", "BLF"]
    assert residuals("q,k,resid_mid") == ["BLD", "BLD", "BLKGH", "BLKH"]
    assert "BKGLS" in residuals("none")
    assert "BKGLS" not in residuals("dots")


@functools.cache
def captured(config: ModelConfig) -> Callable[[jax.Array], dict[str, jax.Array]]:
    """The activations of a forward pass in training, by the key of its noise."""
    run = functools.partial(capture, Transformer(config), tokens=TOKENS, train=True)
    return jax.jit(lambda key: run(weights(config), rngs={"dropout": key}))


def training(key: int, dropout: float = 0.25) -> dict[str, jax.Array]:
    """What dropout does to a forward pass: activations, and the logits."""
    return captured(tiny(dropout=dropout, d_model=96))(jax.random.key(key))


def test_dropout_is_off_outside_of_training():
    without = logits(tiny(), weights(TINY), TOKENS)
    assert (logits(tiny(dropout=0.5), weights(TINY), TOKENS) == without).all()


def test_dropout_zeroes_its_share_and_scales_the_rest():
    taps = training(0)
    before = jnp.concatenate([taps["embed"][None], taps["attn_out"], taps["mlp_out"]])
    written = (taps["resid_mid"] - taps["resid_pre"], taps["resid_post"] - taps["resid_mid"])
    after = jnp.concatenate([taps["resid_pre"][:1], *written])
    dropped = jnp.abs(after) < 1e-6
    np.testing.assert_allclose(dropped.mean(axis=(1, 2, 3)), 0.25, atol=0.05)
    np.testing.assert_allclose(after, jnp.where(dropped, 0, before / 0.75), rtol=1e-3, atol=1e-4)
    flat = {tuple(mask.ravel().tolist()) for mask in dropped}
    assert len(flat) == len(dropped), "two positions share a mask"


def test_dropout_depends_on_its_key_only():
    first, again, other = (training(key)["logits"] for key in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_dropout_of_attention_is_in_training_only_and_differs_by_layer():
    """There are fewer keys than numbers in a head, no two alike, so what was mixed of the values says how."""
    tokens = jnp.arange(2 * L).reshape(2, L) % 14
    changes = {"head_dim": 12, "n_kv_heads": None}
    config = tiny(attention=AttentionConfig(dropout=0.25), **changes)
    params, model = weights(tiny(**changes)), Transformer(config)
    assert (logits(config, params, tokens) == logits(tiny(**changes), params, tokens)).all()
    run = jax.jit(lambda key: capture(model, params, tokens, train=True, rngs={"dropout": key}))
    taps = run(jax.random.key(0))
    z, v = jnp.moveaxis(taps["z"][..., 0, :], 3, 2), jnp.moveaxis(taps["v"], 3, 2)  # N B K L H
    pattern, used = taps["pattern"][:, :, :, 0], z @ jnp.linalg.pinv(v)
    seen = pattern > 1e-3
    dropped = seen & (jnp.abs(used) < 1e-4)
    np.testing.assert_allclose(used, jnp.where(dropped, 0, pattern / 0.75), atol=2e-3)
    np.testing.assert_allclose(dropped.sum() / seen.sum(), 0.25, atol=0.05)
    assert (dropped[0] != dropped[1])[(seen[0] & seen[1])].any()


def dtypes(program: list, *primitives: str) -> set[str]:
    """The dtypes that equations of this kind read."""
    found = [equation for _, equation in program if equation.primitive.name in primitives]
    assert found, primitives
    return {str(array.aval.dtype) for equation in found for array in equation.invars}


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "layernorm", "bias": "all", "positions": "learned", "gated": False}], ids=str
)
def test_bfloat16_multiplies_matrices_and_float32_does_the_delicate_rest(changes: dict):
    config = tiny(dtype="bfloat16", activation="relu", **changes)

    def loss(params: Any) -> jax.Array:
        params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return cross_entropy(Transformer(config).apply({"params": params}, TOKENS).logits, TOKENS)[0].sum()

    program = equations(loss, weights(config))
    assert dtypes(program, "dot_general") == {"bfloat16"}
    for delicate in (("rsqrt",), ("exp",), ("log",), ("reduce_max",)):
        assert dtypes(program, *delicate) == {"float32"}
    taps = jax.eval_shape(lambda p: capture(Transformer(config), p, TOKENS), weights(config))
    assert {taps[name].dtype for name in ("attn_scores", "pattern", "logits")} == {jnp.dtype("float32")}
    assert {taps[name].dtype for name in ("embed", "q", "z", "resid_post", "mlp_post", "final")} == {
        jnp.dtype("bfloat16")
    }


@pytest.mark.parametrize("config", GRID, ids=range(len(GRID)))
def test_every_pair_of_options_has_a_forward_pass_and_a_gradient(config: ModelConfig):
    def loss(params: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(0)}
        out = Transformer(config).apply({"params": params}, TOKENS, train=True, rngs=rngs, **PACKED)
        return out.logits.mean()

    gradient = jax.eval_shape(jax.grad(loss), shapes(config))
    same = jax.tree.map(lambda g, p: (g.shape, g.dtype) == (p.shape, p.dtype), gradient, shapes(config))
    assert all(jax.tree.leaves(same))


def test_a_row_longer_than_the_learned_positions_is_refused():
    with pytest.raises(ValueError, match=r"a row of 9 tokens exceeds model.max_seq_len=8"):
        jax.eval_shape(Transformer(tiny(positions="learned", max_seq_len=8)).init, jax.random.key(0), tokens(1, 9))
