"""The decoder-only transformer: the forward pass on one page.

    model = Transformer(config)
    params = model.init(key, tokens)["params"]
    out = model.apply({"params": params}, tokens)        # out.logits: [B, L, V]

Parameters are stacked over layers (a leading N) and the blocks run in a scan: one layout, and a compile time that
does not grow with depth. `Transformer(config, stacked=False)` reads the same tree split into `layers_0 ...
layers_{N-1}` by `unstack`, which spares a decoder on CPU a copy of every layer for every token.
"""

import dataclasses
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PyTree

from llm_jax.model.attention import Attention, Context
from llm_jax.model.cache import Cache
from llm_jax.model.config import SOFTMAX, ModelConfig
from llm_jax.model.feedforward import FeedForward, MixtureOfExperts, Utilisation
from llm_jax.model.init import normal
from llm_jax.model.linear_attention import LinearAttention
from llm_jax.model.norm import Norm
from llm_jax.model.taps import in_order, tap
from llm_jax.ops.attention import Mask
from llm_jax.ops.gradient import embed, lookup, settle
from llm_jax.ops.loss import unembed
from llm_jax.ops.position import sinusoidal
from llm_jax.ops.ring import zigzag_order
from llm_jax.sharding import all_tokens, constrain, size_of


@struct.dataclass
class Output:
    """What a forward pass gives.

    Attributes:
      hidden: what the head reads.
      logits: None where they were not asked for.
      cache: with the new tokens; None where none came in.
      use: of the experts, with a leading N of the layers that have some; None where none has.
    """

    hidden: Float[Array, "B L D"]
    logits: Float[Array, "B L V"] | None
    cache: Cache | None
    use: Utilisation | None


class Block(nn.Module):
    """One layer: attention, then feed-forward, each added to the residual stream. Its kind is that of its place."""

    config: ModelConfig
    place: int = 0

    @nn.compact
    def __call__(
        self, carry: tuple[Float[Array, "B L D"], Cache | None], layer: Int[Array, ""] | int, context: Context
    ) -> tuple[tuple[Float[Array, "B L D"], Cache | None], Utilisation | None]:
        c, (x, cache) = self.config, carry
        kind, slot = c.period[self.place], slot_of(c, self.place, layer)
        mixer = (Attention if kind.mixer in SOFTMAX else LinearAttention)(c, kind.mixer, name="attention")

        x = tap(self, "resid_pre", x, c.kept)
        y, cache = mixer(self._before("attention", x), context, slot, cache)
        mid = tap(self, "resid_mid", self._join("attention", x, y, context, layer), c.kept)
        read = self._before("feedforward", x if c.residual == "parallel" else mid)
        if kind.moe:
            segments = context.mask.segments
            y, use = MixtureOfExperts(c, name="experts")(read, None if segments is None else segments != 0)
        else:
            y, use = FeedForward(c, name="feedforward")(read), None
        x = tap(self, "resid_post", self._join("feedforward", mid, y, context, layer), c.kept)
        return (constrain(x, "BLD"), cache), use

    def _before(self, sublayer: str, x: Array) -> Array:
        """What a sublayer reads of the stream."""
        c = self.config
        return all_tokens(x if c.residual in ("post", "output") else Norm(c, name=f"{sublayer}_norm")(x))

    def _join(self, sublayer: str, x: Array, y: Array, context: Context, layer: Int[Array, ""] | int) -> Array:
        """The stream `x` with what a sublayer adds to it."""
        c = self.config
        if c.residual in ("sandwich", "output"):
            y = Norm(c, name=f"{sublayer}_out_norm")(y)
        if c.residual_scale != 1:
            y = y * jnp.asarray(c.residual_scale, y.dtype)
        y = tap(self, {"attention": "attn_out", "feedforward": "mlp_out"}[sublayer], y, c.kept)
        x = settle(x + dropout(self, y, context, layer))
        return Norm(c, name=f"{sublayer}_norm")(x) if c.residual == "post" else x


class Period(nn.Module):
    """The layers of a pattern, one after the other, each with parameters of its own."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, carry: tuple[Float[Array, "B L D"], Cache | None], layer: Int[Array, ""] | int, context: Context
    ) -> tuple[tuple[Float[Array, "B L D"], Cache | None], list[Utilisation | None]]:
        uses = []
        for place in range(len(self.config.layers)):
            carry, use = remat(self.config)(self.config, place, name=str(place))(carry, layer + place, context)
            uses.append(use)
        return carry, uses


class Transformer(nn.Module):
    """Token ids to logits: `embed`, `layers`, `head`, which a pipeline runs on devices of their own.

    `stacked=False` expects `unstack(params)`.
    """

    config: ModelConfig
    stacked: bool = True

    def setup(self) -> None:
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
        """`segments` keep packed documents apart, `positions` count within them, `cache` holds what came before.

        Tokens of a `prefix` are seen by all of their document. `lengths` says how many tokens of each row are there,
        where it is not all. `train=True` turns dropout on and needs a `dropout` key. `logits=False` stops at `hidden`,
        for a loss that makes logits chunk by chunk. An id outside of 0 to `vocab_size - 1` can't raise inside jit: it
        reads the nearest row of the table, so check ids where they come from. Raises `ValueError` for more tokens than
        learned positions.
        """
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
        """What the first layer reads."""
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
        """What the output table reads, of what the last layer gave; and where they are asked for the logits."""
        c = self.config
        x = tap(self, "final", x if c.residual == "post" else self.final_norm(x))
        if c.logit_scale != 1:  # here, for whoever makes the logits, chunk by chunk or of the last token alone
            x = x * jnp.asarray(c.logit_scale, x.dtype)
        if not logits:
            return x, None
        out = unembed(x, getattr(self, c.head)["table"].astype(x.dtype), c.logit_softcap)
        return x, tap(self, "logits", constrain(out, "BLV" if c.n_classes is None else "BLC"))

    @nn.compact
    def layers(
        self, x: Float[Array, "B L D"], cache: Cache | None, context: Context, start: Int[Array, ""] | int = 0
    ) -> tuple[Float[Array, "B L D"], Cache | None, Utilisation | None]:
        """All blocks: whole periods in a scan, what is left of the last one behind it. Unstacked: one by one.

        The first of them is layer `start` of the model, where a stage of a pipeline holds only some.
        """
        c, carry, period = self.config, (x, cache), len(self.config.layers)
        first = c.scanned if self.stacked else 0
        uses, rows = [], []  # of the experts, and in which layers
        if self.stacked:
            scan = nn.scan(
                Period if period > 1 else remat(c),
                variable_axes={"params": 0, "taps": 0, "edits": 0},
                split_rngs={"params": True, "dropout": False},
                in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType]  (annotated as an int, takes a tree)
                length=first // period,
                unroll=c.unroll,
            )
            carry, uses = scan(c, name="layers")(carry, start + jnp.arange(0, first, period), context)
            uses = uses if period > 1 else [uses]
            rows = [range(place, first, period) for place in range(period)]
        for layer in range(first, c.n_layers):
            carry, use = remat(c)(c, layer % period, name=f"layers_{layer}")(carry, layer, context)
            uses, rows = [*uses, jax.tree.map(lambda a: a[None], use)], [*rows, [layer]]
        known = [(use, layers) for use, layers in zip(uses, rows, strict=True) if use is not None]
        use = None
        if known:
            use = jax.tree.map(lambda *parts: in_order(parts, [layers for _, layers in known]), *(u for u, _ in known))
        x, cache = carry
        return x, cache, use


def forward(model: Transformer, params: PyTree, tokens: Int[Array, "B L"], **inputs: Any) -> Output:
    """`model.apply` on a parameter tree, with the type of what it returns; `inputs` as `Transformer.__call__`.

    Nothing is raised for an id outside the vocabulary, or a position beyond a learned table: it reads the nearest row.
    `train/batch.py` refuses such batches.
    """
    return cast(Output, model.apply({"params": params}, tokens, **inputs))


def table_of(role: str, rows: int) -> Any:
    """An initializer of `{"table": [rows, D]}`."""
    return lambda key, c: {"table": normal(c, role, c.d_model)(key, (rows, c.d_model))}


def head_table(config: ModelConfig, params: Any) -> Float[Array, "V D"]:
    """The table of the output head: the embedding's, where they are tied."""
    return params[config.head]["table"]


def dropout(module: nn.Module, x: Array, context: Context, layer: Int[Array, ""] | int = 0) -> Array:
    """Zeroes a share `config.dropout` of `x` while training, and scales up the rest (Srivastava et al. 2014).

    Each `layer` of the model has a key of its own, whether all run in one scan or some on a stage of a pipeline, and
    each token its own noise, wherever it stands.
    """
    rate = module.config.dropout
    if rate == 0 or not context.train:
        return x
    keep = jax.random.bernoulli(jax.random.fold_in(module.make_rng("dropout"), layer), 1 - rate, x.shape)
    if module.config.attention.implementation == "zigzag" and (devices := size_of("context")) > 1:
        keep = keep[:, zigzag_order(x.shape[1], devices)]
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


def slot_of(config: ModelConfig, place: int, layer: Int[Array, ""] | int) -> Int[Array, ""] | int:
    """Which slot of the cache is that of `layer`, at `place` of its period: softmax and linear layers count apart."""
    like = [(kind.mixer in SOFTMAX) == (config.period[place].mixer in SOFTMAX) for kind in config.period]
    return layer // len(like) * sum(like) + sum(like[:place])


def remat(config: ModelConfig) -> Any:
    """The block, whose backward pass computes again all but matrix products, the named taps, or nothing of it.

    What it finds is always kept, in the device's memory or in the host's.
    """
    if config.remat == "none":
        return Block
    policies = jax.checkpoint_policies
    away = {"names_which_can_be_saved": [], "names_which_can_be_offloaded": list(config.kept)}
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "offload": policies.save_and_offload_only_these_names(**away, offload_src="device", offload_dst="pinned_host"),
    }.get(config.remat, policies.save_only_these_names(*config.kept))
    return nn.remat(Block, policy=policy, prevent_cse=False)


def unstack(config: ModelConfig, params: Any) -> Any:
    """The tree that `Transformer(config, stacked=False)` reads: every layer by itself, `layers_0 ... layers_{N-1}`."""
    apart = {name: tree for name, tree in params.items() if name != "layers"}
    for layer in range(config.scanned):
        path, row = config.home(layer)
        *_, place = path.split("/")
        stack = params["layers"] if place == "layers" else params["layers"][place]
        apart[f"layers_{layer}"] = jax.tree.map(lambda stacked, row=row: stacked[row], stack)
    return apart
