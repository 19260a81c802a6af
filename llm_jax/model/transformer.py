"""The decoder-only transformer: the forward pass on one page.

    model = Transformer(config)
    params = model.init(key, tokens)["params"]
    out = model.apply({"params": params}, tokens)        # out.logits: [B, L, V]

Parameters are stacked over layers (a leading N) and the blocks run in a scan, whose compile time does not grow
with depth. `Transformer(config, stacked=False)` reads the same tree split into `layers_0 ... layers_{N-1}` by
`stack.unstack`, which spares a decoder on CPU a copy of every layer for every token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from llm_jax.model.attention import Attention, Context
from llm_jax.model.cache import Cache
from llm_jax.model.config import SOFTMAX, ModelConfig, is_own, own_layers, own_mixer
from llm_jax.model.feedforward import FeedForward, MixtureOfExperts, Utilisation
from llm_jax.model.init import normal
from llm_jax.model.linear_attention import LinearAttention
from llm_jax.model.norm import Norm
from llm_jax.model.pattern import n_scanned
from llm_jax.model.stack import Index, gather, slot_of
from llm_jax.model.taps import tap
from llm_jax.ops import native
from llm_jax.ops.collectives import all_gather_tokens, auto_axis_size
from llm_jax.ops.gradient import embed, lookup, settle
from llm_jax.ops.loss import unembed
from llm_jax.ops.mask import Mask
from llm_jax.ops.position import sinusoidal
from llm_jax.ops.ring import zigzag_order
from llm_jax.sharding import constrain


@struct.dataclass
class Output:
    """The result of a forward pass.

    Attributes:
      hidden: what the head reads.
      logits: None if they were not asked for.
      cache: the cache with the new tokens; None if none was given.
      use: of the experts, with a leading N of the layers that have some; None if no layer has.
    """

    hidden: Float[Array, "B L D"]
    logits: Float[Array, "B L V"] | None
    cache: Cache | None
    use: Utilisation | None


Carry = tuple[Float[Array, "B L D"], Cache | None]  # from layer to layer: the residual stream and the cache
Map = Callable[[Array], Array]


class Block(nn.Module):
    """One layer: `x + attention(norm(x))`, then `x + feedforward(norm(x))`, or another form of residual.

    `offset` is its index in the layer pattern, which says what kind of layer it is.
    """

    config: ModelConfig
    offset: int = 0

    @nn.compact
    def __call__(self, carry: Carry, layer: Index, context: Context) -> tuple[Carry, Utilisation | None]:
        c, (x, cache), use = self.config, carry, None
        kind, slot = c.period[self.offset], slot_of(c, self.offset, layer)
        # Each form of residual calls some of these norms; one that is not called has no parameters.
        attention_norm, feedforward_norm = Norm(c, name="attention_norm"), Norm(c, name="feedforward_norm")
        attention_out, feedforward_out = Norm(c, name="attention_out_norm"), Norm(c, name="feedforward_out_norm")

        def attention(x: Array, norm: Map = no_norm) -> Array:
            nonlocal cache
            x = all_gather_tokens(x)
            if is_own(kind.mixer):
                state = None if cache is None else cache.own_state(kind.mixer, slot)
                y, state = own_mixer(kind.mixer)(c, name="mixer")(x, context, state)
                cache = None if cache is None else cache.keep_own(kind.mixer, slot, state)
            else:
                mixer = Attention if kind.mixer in SOFTMAX else LinearAttention
                y, cache = mixer(c, kind.mixer, name="attention")(x, context, slot, cache)
            return output("attn_out", norm(y))

        def feedforward(x: Array, norm: Map = no_norm) -> Array:
            nonlocal use
            x = all_gather_tokens(x)
            if kind.moe:
                segments = context.mask.segments
                y, use = MixtureOfExperts(c, name="experts")(x, None if segments is None else segments != 0)
            else:
                y = FeedForward(c, name="feedforward")(x)
            return output("mlp_out", norm(y))

        def output(name: str, y: Array) -> Array:
            y = y if c.residual_scale == 1 else y * jnp.asarray(c.residual_scale, y.dtype)
            return dropout(self, tapped(name, y), context, layer)

        def tapped(name: str, x: Array) -> Array:
            return tap(self, name, x, c.kept)

        x = tapped("resid_pre", x)
        match c.residual:
            case "pre":
                x = tapped("resid_mid", settle(x + attention(attention_norm(x))))
                x = tapped("resid_post", settle(x + feedforward(feedforward_norm(x))))
            case "post":
                x = tapped("resid_mid", attention_norm(settle(x + attention(x))))
                x = tapped("resid_post", feedforward_norm(settle(x + feedforward(x))))
            case "sandwich":
                x = tapped("resid_mid", settle(x + attention(attention_norm(x), attention_out)))
                x = tapped("resid_post", settle(x + feedforward(feedforward_norm(x), feedforward_out)))
            case "output":
                x = tapped("resid_mid", settle(x + attention(x, attention_out)))
                x = tapped("resid_post", settle(x + feedforward(x, feedforward_out)))
            case "parallel":
                mid = tapped("resid_mid", settle(x + attention(attention_norm(x))))
                x = tapped("resid_post", settle(mid + feedforward(feedforward_norm(x))))
        return (constrain(x, "BLD"), cache), use


class Period(nn.Module):
    """The layers of one period of the pattern, in order, each with its own parameters."""

    config: ModelConfig

    @nn.compact
    def __call__(self, carry: Carry, layer: Index, context: Context) -> tuple[Carry, list[Utilisation | None]]:
        uses: list[Utilisation | None] = []
        for offset in range(len(self.config.layers)):
            carry, use = remat(self.config)(self.config, offset, name=str(offset))(carry, layer + offset, context)
            uses.append(use)
        return carry, uses


class Transformer(nn.Module):
    """Token ids to logits: `embed`, `layers`, `head`. A pipeline calls the three separately.

    `stacked=False` expects `unstack(params)`.
    """

    config: ModelConfig
    stacked: bool = True

    def setup(self) -> None:
        """Create what is outside of layers: the tables and the final norm. Flax calls it."""
        c = self.config
        self.embedding = self.param("embedding", table_of("embed", c.vocab_size), c)
        if c.positions == "learned":
            self.positions = self.param("positions", table_of("embed", c.max_seq_len), c)
        if c.residual != "post":
            self.final_norm = Norm(c)
        if c.head != "embedding":
            setattr(self, c.head, self.param(c.head, table_of("unembed", c.n_classes or c.vocab_size), c))

    def __call__(
        self,
        tokens: Int[Array, "B L"],
        *,
        segments: Int[Array, "B L"] | None = None,
        positions: Int[Array, "B L"] | None = None,
        prefix: Bool[Array, "B L"] | None = None,
        lengths: Int[Array, " B"] | None = None,
        cache: Cache | None = None,
        train: bool = False,
        logits: bool = True,
    ) -> Output:
        """Run the model. `segments` separate packed documents, `positions` count within them, `cache` is the past.

        All tokens of a document see those of its `prefix`. `lengths` says how many tokens of each row count, if not
        all. `train=True` turns dropout on and needs a `dropout` key. `logits=False` stops at `hidden`, for a loss that
        computes logits chunk by chunk. An id outside 0 to `vocab_size - 1` can't raise inside jit: it reads the nearest
        row of the table, so check ids where they come from. Raise `ValueError` for more tokens than learned positions,
        and for tokens that are no rows of ids.
        """
        check_rows(tokens)
        L = tokens.shape[1]
        if positions is None:
            positions = jnp.arange(L)[None] + (0 if cache is None else cache.length[:, None])
        mask = Mask(segments=segments, prefix=prefix)
        if cache is not None:
            spread = None if prefix is None else cache.spread(prefix)
            mask = dataclasses.replace(mask, kv_length=cache.length + L, prefix=spread)
        reach = lengths if cache is None else cache.reach
        context = Context(positions=positions, mask=mask, lengths=lengths, reach=reach, train=train)

        x, cache, use = self.layers(self.embed(tokens, context), cache, context)
        x, out = self.head(x, logits)
        return Output(x, out, None if cache is None else cache.advance(L if lengths is None else lengths), use)

    def embed(self, tokens: Int[Array, "B L"], context: Context) -> Float[Array, "B L D"]:
        """Return what the first layer reads. Raise `ValueError` for more tokens than learned positions."""
        c, L = self.config, tokens.shape[1]
        x = embed(self.embedding["table"], tokens).astype(c.dtype) * jnp.asarray(c.embedding_scale, c.dtype)
        if c.positions == "learned":
            if c.max_seq_len < L:
                raise ValueError(f"a row of {L} tokens exceeds model.max_seq_len={c.max_seq_len}, all that was learned")
            x = x + lookup(self.positions["table"], context.positions).astype(c.dtype)
        elif c.positions == "sinusoidal":
            x = x + sinusoidal(context.positions, c.d_model).astype(c.dtype)
        return constrain(dropout(self, tap(self, "embed", x), context), "BLD")

    def head(
        self, x: Float[Array, "B L D"], logits: bool
    ) -> tuple[Float[Array, "B L D"], Float[Array, "B L V"] | None]:
        """Return what the output table reads, given the result `x` of the last layer; and, if asked for, the logits."""
        c = self.config
        x = tap(self, "final", x if c.residual == "post" else self.final_norm(x))
        if c.logit_scale != 1:  # on `hidden`, as the loss and the sampler compute logits of their own from it
            x = x * jnp.asarray(c.logit_scale, x.dtype)
        if not logits:
            return x, None
        out = unembed(x, getattr(self, c.head)["table"].astype(x.dtype), c.logit_softcap)
        return x, tap(self, "logits", constrain(out, "BLV" if c.n_classes is None else "BLC"))

    @nn.compact
    def layers(
        self, x: Float[Array, "B L D"], cache: Cache | None, context: Context, start: Index = 0
    ) -> tuple[Float[Array, "B L D"], Cache | None, Utilisation | None]:
        """Run all blocks: whole periods in a scan, then the layers left over. Unstacked: one by one.

        The first is layer `start` of the model, where a pipeline stage holds only some.
        """
        c, period = self.config, len(self.config.layers)
        scanned = n_scanned(c) if self.stacked else 0
        carry: Carry = (x, cache)
        uses: list[tuple[Utilisation | None, Sequence[int]]] = []  # of the experts, and in which layers
        if self.stacked:
            scan: Any = nn.scan(
                Period if period > 1 else remat(c),
                variable_axes={"params": 0, "taps": 0, "edits": 0},
                split_rngs={"params": True, "dropout": bool(own_layers(c))},  # ours fold the layer in
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  (annotated as an int, takes a tree)
                length=scanned // period,
                unroll=c.unroll,
                # This check traces the layers once more, and so moves random numbers: it stays where any are drawn.
                check_constancy_invariants=self.is_initializing() or draws(c),
            )
            carry, found = scan(c, name="layers")(carry, start + jnp.arange(0, scanned, period), context)
            uses = [(use, range(i, scanned, period)) for i, use in enumerate(found if period > 1 else [found])]
        for layer in range(scanned, c.n_layers):
            carry, use = remat(c)(c, layer % period, name=f"layers_{layer}")(carry, layer, context)
            uses.append((jax.tree.map(lambda a: a[None], use), [layer]))
        known = [(use, layers) for use, layers in uses if use is not None]
        return *carry, gather(*zip(*known, strict=True)) if known else None


def forward(model: Transformer, params: PyTree, tokens: Int[Array, "B L"], **inputs: Any) -> Output:
    """Call `model.apply` on a parameter tree, with a typed result; `inputs` as in `Transformer.__call__`.

    Nothing is raised for an id outside the vocabulary, or a position outside a learned table: it reads the nearest row.
    `train/batch.py` refuses such batches.
    """
    return cast(Output, model.apply({"params": params}, tokens, **inputs))


def check_rows(tokens: Any) -> None:
    """Raise `ValueError` for anything but an array `[B, L]` of ids: a text, a list of lists, one row by itself."""
    if not hasattr(tokens, "ndim"):
        way = "an array, or run.tokens(text) of a text"
    elif tokens.ndim != 2:
        way = "tokens[None] for a single row" if tokens.ndim == 1 else "a row for each text"
    elif not jnp.issubdtype(tokens.dtype, jnp.integer):
        way = "whole numbers"
    else:
        return
    got = f"shape {tokens.shape} of {tokens.dtype}" if hasattr(tokens, "ndim") else type(tokens).__name__
    raise ValueError(f"tokens are rows of ids, [B, L]; got {got}; give {way}")


def table_of(role: str, rows: int) -> Any:
    """Return an initializer of `{"table": [rows, D]}`."""
    return lambda key, c: {"table": normal(c, role, c.d_model)(key, (rows, c.d_model))}


def head_table(config: ModelConfig, params: Any) -> Float[Array, "V D"]:
    """Return the table of the output head: the embedding's, if they are tied."""
    return params[config.head]["table"]


def dropout(module: nn.Module, x: Array, context: Context, layer: Index = 0) -> Array:
    """Zero a share `config.dropout` of `x` in training, and scale up the rest (Srivastava et al. 2014).

    Each `layer` of the model has its own key, whether all run in one scan or some on a pipeline stage, and each token
    its own noise, at whatever index of the row the zigzag puts it.
    """
    rate = module.config.dropout
    if rate == 0 or not context.train:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(module.make_rng("dropout"), layer), 1 - rate, x.shape)
    if module.config.attention.implementation == "zigzag" and (devices := auto_axis_size("context")) > 1:
        keep = keep[:, zigzag_order(x.shape[1], devices)]
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def draws(c: ModelConfig) -> bool:
    """Return whether layers may draw random numbers in training."""
    return bool(c.dropout or c.attention.dropout or own_layers(c))


def remat(config: ModelConfig) -> Any:
    """Return `Block`, with a backward pass that recomputes it, except for what `config.remat` keeps.

    The input of the block is always kept, in the device's memory or in the host's.
    """
    if config.remat == "none":
        return Block
    policies = jax.checkpoint_policies
    offload = {"names_which_can_be_saved": [], "names_which_can_be_offloaded": list(config.kept)}
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.save_from_both_policies(policies.dots_with_no_batch_dims_saveable, native.products),
        "offload": policies.save_and_offload_only_these_names(
            **offload, offload_src="device", offload_dst="pinned_host"
        ),
    }.get(config.remat, policies.save_only_these_names(*config.kept))
    return nn.remat(Block, policy=policy, prevent_cse=False)


def no_norm(x: Array) -> Array:
    """Return `x`."""
    return x
