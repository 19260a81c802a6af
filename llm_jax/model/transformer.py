"""The decoder-only transformer: the forward pass on one page.

    model = Transformer(config)
    params = model.init(key, tokens)["params"]
    out = model.apply({"params": params}, tokens)        # out.logits: [B, L, V]

Parameters are stacked over layers (a leading N) and the blocks run in a scan: one layout, and a compile time that
does not grow with depth. `Transformer(config, stacked=False)` reads the same tree split into `layers_0 ...
layers_{N-1}` by `unstack`, which spares a decoder on CPU a copy of every layer for every token.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, PyTree

from llm_jax.model.attention import Attention, Context
from llm_jax.model.cache import KVCache
from llm_jax.model.config import REMAT, ModelConfig
from llm_jax.model.feedforward import FeedForward
from llm_jax.model.init import normal
from llm_jax.model.taps import tap
from llm_jax.ops.attention import Mask
from llm_jax.ops.gradient import lookup, settle
from llm_jax.ops.norm import layer_norm, rms_norm
from llm_jax.ops.position import sinusoidal
from llm_jax.sharding import constrain


@struct.dataclass
class Output:
    """`hidden` is what the head reads; `logits` is None where they were not asked for; `cache` as it came in."""

    hidden: Float[Array, "B L D"]
    logits: Float[Array, "B L V"] | None
    cache: KVCache | None


class Norm(nn.Module):
    """LayerNorm or RMSNorm, with its parameters."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c = self.config
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:]).astype(x.dtype)
        if c.norm == "rmsnorm":
            return rms_norm(x, scale, c.norm_eps)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(x.dtype)
        return layer_norm(x, scale, bias, c.norm_eps)


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        carry: tuple[Float[Array, "B L D"], KVCache | None],
        layer: Int[Array, ""] | int,
        context: Context,
    ) -> tuple[tuple[Float[Array, "B L D"], KVCache | None], None]:
        c, (x, cache) = self.config, carry
        pre = c.norm_position == "pre"
        attention, feedforward = Attention(c, name="attention"), FeedForward(c, name="feedforward")
        attention_norm, feedforward_norm = Norm(c, name="attention_norm"), Norm(c, name="feedforward_norm")

        x = tap(self, "resid_pre", x, c.kept)
        y, cache = attention(attention_norm(x) if pre else x, context, layer, cache)
        x = settle(x + dropout(self, tap(self, "attn_out", y, c.kept), context))
        x = tap(self, "resid_mid", x if pre else attention_norm(x), c.kept)
        y = feedforward(feedforward_norm(x) if pre else x)
        x = settle(x + dropout(self, tap(self, "mlp_out", y, c.kept), context))
        x = tap(self, "resid_post", x if pre else feedforward_norm(x), c.kept)
        return (constrain(x, "BLD"), cache), None


class Transformer(nn.Module):
    """Token ids to logits. `stacked=False` expects `unstack(params)`."""

    config: ModelConfig
    stacked: bool = True

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B L"],
        *,
        segments: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        cache: KVCache | None = None,
        train: bool = False,
        logits: bool = True,
    ) -> Output:
        """`segments` keep packed documents apart, `positions` count within them, `cache` holds what came before.

        `train=True` turns dropout on and needs a `dropout` key. `logits=False` stops at `hidden`, for a loss that
        makes logits chunk by chunk. Raises `ValueError` for more tokens than there are learned positions.
        """
        c, L = self.config, tokens.shape[1]
        if positions is None:
            positions = jnp.arange(L)[None] + (0 if cache is None else cache.length[:, None])
        kv_length = None if cache is None else cache.length + L
        mask = Mask(window=c.window, segments=segments, kv_length=kv_length)
        context = Context(positions=positions, mask=mask, train=train)

        table = self.param("embedding", table_of("embed", c.vocab_size), c)["table"]
        x = lookup(table, tokens).astype(c.dtype)
        if c.positions == "learned":
            if c.max_seq_len < L:
                raise ValueError(f"a row of {L} tokens exceeds model.max_seq_len={c.max_seq_len}, all that was learned")
            places = self.param("positions", table_of("embed", c.max_seq_len), c)["table"]
            x = x + lookup(places, positions).astype(c.dtype)
        elif c.positions == "sinusoidal":
            x = x + sinusoidal(positions, c.d_model).astype(c.dtype)
        x = constrain(dropout(self, tap(self, "embed", x), context), "BLD")

        x, cache = self._layers(x, cache, context)
        x = tap(self, "final", Norm(c, name="final_norm")(x) if c.norm_position == "pre" else x)
        head = table if c.tied else self.param("unembedding", table_of("unembed", c.vocab_size), c)["table"]
        out = None
        if logits:
            out = jnp.einsum("BLD,VD->BLV", x, head.astype(x.dtype), preferred_element_type=jnp.float32)
            out = tap(self, "logits", constrain(out, "BLV"))
        return Output(hidden=x, logits=out, cache=None if cache is None else cache.advance(L))

    def _layers(self, x: Array, cache: KVCache | None, context: Context) -> tuple[Array, KVCache | None]:
        c = self.config
        block = Block if c.remat == "none" else nn.remat(Block, policy=remat_policy(c), prevent_cse=False)
        if not self.stacked:
            for layer in range(c.n_layers):
                (x, cache), _ = block(c, name=f"layers_{layer}")((x, cache), layer, context)
            return x, cache
        layers = nn.scan(
            block,
            variable_axes={"params": 0, "taps": 0, "edits": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  (annotated as an int, takes a tree)
            length=c.n_layers,
            unroll=c.unroll,
        )
        (x, cache), _ = layers(c, name="layers")((x, cache), jnp.arange(c.n_layers), context)
        return x, cache


def forward(model: Transformer, params: PyTree, tokens: Int[Array, "B L"], **inputs: Any) -> Output:
    """`model.apply` on a parameter tree, with the type of what it returns; `inputs` as `Transformer.__call__`."""
    return cast(Output, model.apply({"params": params}, tokens, **inputs))


def table_of(role: str, rows: int) -> Any:
    """An initializer of `{"table": [rows, D]}`."""
    return lambda key, c: {"table": normal(c, role, c.d_model)(key, (rows, c.d_model))}


def head_table(config: ModelConfig, params: Any) -> Float[Array, "V D"]:
    """The table of the output head: the embedding's, where they are tied."""
    return params["embedding" if config.tied else "unembedding"]["table"]


def dropout(module: nn.Module, x: Array, context: Context) -> Array:
    """Zeroes a share `config.dropout` of `x` while training, and scales up the rest (Srivastava et al. 2014)."""
    rate = module.config.dropout
    if rate == 0 or not context.train:
        return x
    keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def remat_policy(config: ModelConfig) -> Any:
    """What the backward pass need not compute again: matrix products, the named taps, or nothing."""
    if config.remat == "dots":
        return jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return None if config.remat in REMAT else jax.checkpoint_policies.save_only_these_names(*config.kept)


def unstack(config: ModelConfig, params: Any) -> Any:
    """The tree that `Transformer(config, stacked=False)` reads: `layers` split into `layers_0 ... layers_{N-1}`."""
    layers = {
        f"layers_{i}": jax.tree.map(lambda stacked, i=i: stacked[i], params["layers"]) for i in range(config.n_layers)
    }
    return {name: tree for name, tree in params.items() if name != "layers"} | layers
