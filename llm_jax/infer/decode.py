"""The compiled programs of generation: prefill the prompts in one forward pass, then decode, some tokens a dispatch."""

import dataclasses
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from llm_jax.data.task import Task
from llm_jax.model.cache import Cache, init_cache
from llm_jax.model.config import ModelConfig
from llm_jax.model.precision import in_dtype
from llm_jax.model.stack import unstack
from llm_jax.model.transformer import Transformer, forward, head_table
from llm_jax.ops.attention import platform, soft_cap
from llm_jax.ops.few_rows import few_rows
from llm_jax.ops.int8 import Quantized, quantize
from llm_jax.ops.loss import unembed
from llm_jax.ops.sampling import NO_TOKEN, Filters, sample
from llm_jax.paths import first_match
from llm_jax.tree import map_with_path

Tokens = list[list[int]]  # the new tokens of each row

BLOCK = 32  # tokens of a row that one dispatch decodes, at most
LIVE = 0.1  # seconds that a reader may wait for the tokens of one dispatch

# Which weights `int8` quantizes, and how many of their first axes are summed over: those that `linear` multiplies by.
MATRICES = (
    (r"^layers_\d+/attention/w_[qkv]$", 1),
    (r"^layers_\d+/attention/w_o$", 3),
    (r"^layers_\d+/feedforward/w_(up|gate|down)$", 1),
    ("", 0),
)


@struct.dataclass
class Weights:
    """Weights as a decoder reads them.

    Attributes:
      params: those of `Transformer(config, stacked=False)`, in `config.dtype` or quantized.
      head: the table of the output head transposed, if that is faster to read here or quantized; None: as in `params`.
    """

    params: PyTree
    head: Float[Array, "D V"] | Quantized | None = None


@struct.dataclass
class Decoding:
    """The state between tokens.

    Attributes:
      cache: of all tokens that were read.
      token: the newest of each row, sampled and not read yet.
      seen: which tokens each row has read, if a repetition penalty asks for it.
      keys: the randomness of each row.
      ended: which rows have no more to say.
    """

    cache: Cache
    token: Int[Array, " B"]
    seen: Bool[Array, "B V"] | None
    keys: Key[Array, " B"]
    ended: Bool[Array, " B"]


def prepare(config: ModelConfig, params: PyTree, weights: str | None = None) -> Weights:
    """Cast, unstack and lay out the weights of `Transformer(config)`, once a model.

    With `int8` the matrices of dense layers and the head are quantized by output channel; the embedding, of which a
    token reads one row, norms and biases are not. Raise `ValueError` for other names, and for int8 of a model with
    experts.
    """
    if weights not in (None, "int8"):
        raise ValueError(f"weights={weights!r} is no way to hold weights; use 'int8', or None for model.dtype")
    flat, head = in_dtype(unstack(config, params), config.dtype), None
    if weights == "int8":
        if config.experts is not None and any("moe" in kind for kind in config.layers):
            raise ValueError("weights=int8 takes no experts, which hold most weights of this model; leave it out")
        head = quantize(head_table(config, params).T, 1)
        flat = map_with_path(lambda path, w: quantize(w, n) if (n := first_match(MATRICES, path)) else w, flat)
    elif platform() == "cpu":
        head = head_table(config, flat).T  # XLA packs a transposed factor anew for every product with it
    if platform() == "cpu":  # where XLA widens a whole table of bfloat16 to read one row
        flat |= {name: in_dtype(flat[name], jnp.float32) for name in ("embedding", "positions") if name in flat}
    return Weights(flat, head)


def read(
    config: ModelConfig, weights: Weights, cache: Cache, tokens: Int[Array, "B L"], **inputs: Any
) -> tuple[Float[Array, "B L D"], Cache]:
    """Run the model over new tokens of each row, up to its last hidden states."""
    model = Transformer(config, stacked=False)
    out = forward(model, weights.params, tokens, cache=cache, logits=False, **inputs)
    assert out.cache is not None
    return out.hidden, out.cache


def logits_of(
    config: ModelConfig, vocab_size: int, weights: Weights, hidden: Float[Array, "T D"]
) -> Float[Array, "T V"]:
    """Return the float32 logits of the first `vocab_size` ids."""
    if weights.head is None:
        table = head_table(config, weights.params).astype(hidden.dtype)
        return unembed(hidden, table, config.logit_softcap)[:, :vocab_size]
    return soft_cap(few_rows(hidden, weights.head), config.logit_softcap)[:, :vocab_size]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def prefill(
    config: ModelConfig,
    vocab_size: int,
    size: int,
    weights: Weights,
    by: Filters,
    keys: Key[Array, " B"],
    tokens: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    *,
    ends: Int[Array, " E"],
    prefix: Bool[Array, "B L"] | None = None,
    uncounted: Int[Array, ""] | int = 0,
    room: Int[Array, ""] | int = 0,
) -> Decoding:
    """Read the first `lengths` tokens of each row, all of which see the `prefix`, and sample the next one.

    The cache has room for `size` tokens; while the prompts are read, it is no longer than they are. Padding fills slots
    after a row's end, which are masked, and overwritten as the row grows. A repetition penalty ignores the first
    `uncounted` tokens of a row. Rotary angles that depend on the length of a text expect `room` more tokens.
    """
    rows, L = tokens.shape
    cache = init_cache(config, rows, size)
    if cache.reach is not None:  # of each row, independent of padding and of other rows
        cache = dataclasses.replace(cache, reach=jnp.minimum(lengths + room, config.max_seq_len))
    hidden, cache = read(config, weights, cache.resized(L), tokens, lengths=lengths, prefix=prefix)
    seen = None
    if by.repetition_penalty is not None:
        index = jnp.arange(L)[None]
        counted = (index >= uncounted) & (index < lengths[:, None])
        seen = jnp.zeros((rows, vocab_size), bool).at[jnp.arange(rows)[:, None], tokens].max(counted)
    state = Decoding(cache.resized(size), lengths, seen, keys, jnp.zeros(rows, bool))
    return _sampled(config, vocab_size, weights, by, state, hidden[jnp.arange(rows), lengths - 1], ends)


def _sampled(
    config: ModelConfig,
    vocab_size: int,
    weights: Weights,
    by: Filters,
    state: Decoding,
    last: Float[Array, "B D"],
    ends: Int[Array, " E"],
) -> Decoding:
    """Return the state with the next token of each row, given the hidden state of what it read last."""
    keys = jax.vmap(jax.random.fold_in)(state.keys, state.cache.length)
    token = sample(logits_of(config, vocab_size, weights, last), keys, state.seen, by)
    ended = state.ended | (token == NO_TOKEN) | (token[:, None] == ends[None]).any(1)
    return dataclasses.replace(state, token=token, ended=ended)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def decode(
    config: ModelConfig,
    vocab_size: int,
    weights: Weights,
    by: Filters,
    state: Decoding,
    ends: Int[Array, " E"],
    most: Int[Array, ""] | int,
) -> tuple[Decoding, Int[Array, "B block"], Int[Array, ""]]:
    """Decode `most` tokens of each row, or fewer if all rows end; return the state, the tokens, and how many they are.

    One program for every `most` up to BLOCK.
    """
    rows = jnp.arange(len(state.token))

    def unfinished(carry: tuple[Array, Decoding, Array]) -> Bool[Array, ""]:
        made, state, _ = carry
        return (made < most) & ~state.ended.all()

    def step(carry: tuple[Array, Decoding, Array]) -> tuple[Array, Decoding, Array]:
        made, state, tokens = carry
        hidden, cache = read(config, weights, state.cache, state.token[:, None])
        seen = None if state.seen is None else state.seen.at[rows, state.token].set(True)
        state = dataclasses.replace(state, cache=cache, seen=seen)
        state = _sampled(config, vocab_size, weights, by, state, hidden[:, 0], ends)
        return made + 1, state, tokens.at[:, made].set(state.token)

    start = (jnp.zeros((), jnp.int32), state, jnp.zeros((len(rows), BLOCK), jnp.int32))
    made, state, tokens = jax.lax.while_loop(unfinished, step, start)
    return state, tokens, made


@dataclasses.dataclass(frozen=True)
class Request:
    """Prompts as rows of tokens, and what is asked of them: how to sample, and `max_tokens` more tokens of each.

    The question of a `task` is read as its prefix; what follows it is causal. Ids from `vocab_size` on are never
    sampled, and `ends` end a row. A repetition penalty ignores the first `uncounted` tokens of a prompt. With `look`
    the caller looks at every token before it asks for the next.
    """

    prompts: Sequence[Int[np.ndarray, " _"]]
    keys: Key[Array, " B"]
    by: Filters
    max_tokens: int
    vocab_size: int
    ends: Sequence[int] = ()
    task: Task | None = None
    uncounted: int = 0
    look: bool = False

    def begin(self, config: ModelConfig, weights: Weights) -> Decoding:
        """Read the prompts and sample the first token of each. Raise `ValueError` for ids that the model lacks."""
        for prompt in self.prompts:
            if len(wrong := prompt[(prompt < 0) | (prompt >= config.vocab_size)]):
                raise ValueError(
                    f"token {wrong[0]} of a prompt is not an id of the model, which has 0 to {config.vocab_size - 1}; "
                    "encode the prompt with the run's own tokenizer"
                )
        tokens, lengths = padded(self.prompts, config.max_seq_len)
        there = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
        return prefill(
            config,
            self.vocab_size,
            self.size(config),
            weights,
            self.by,
            self.keys,
            tokens,
            lengths,
            ends=self.end_ids,
            prefix=None if self.task is None else self.task.question(tokens, there),
            uncounted=self.uncounted,
            room=self.max_tokens,
        )

    def size(self, config: ModelConfig) -> int:
        """Return how many tokens of a row the cache has room for."""
        longest = max(map(len, self.prompts))
        return step_up(step_up(longest, config.max_seq_len) + self.max_tokens, config.max_seq_len)

    @property
    def end_ids(self) -> Int[np.ndarray, " E"]:
        """What ends a row."""
        return np.array(self.ends, np.int32)


def continuations(config: ModelConfig, weights: Weights, request: Request) -> Iterator[Tokens]:
    """Yield the new tokens of all rows, as many a time as come in a tenth of a second, `max_tokens` in all.

    It ends before if all rows have ended. A row depends on its own prompt and key only. Beyond `max_seq_len` a row's
    tokens mean nothing. A row whose logits are not finite gets `NO_TOKEN`.
    """
    state = request.begin(config, weights)
    # The next tokens are asked for before the first is given, so that nothing compiles in the middle of a text.
    running: Any = np.asarray(state.token)[:, None], 1
    made, number, begun = 1, 1, time.perf_counter()
    while made < request.max_tokens or running is not None:
        following = None
        if made < request.max_tokens:
            number = min(number, request.max_tokens - made)
            state, *following = decode(
                config, request.vocab_size, weights, request.by, state, request.end_ids, np.int32(number)
            )
            made += number
        if running is not None:
            tokens, count = map(np.asarray, running)  # while the device computes what follows
            if not count:
                return
            took, begun = (time.perf_counter() - begun) / int(count), time.perf_counter()
            number = 1 if request.look else max(1, min(BLOCK, 2 * number, int(LIVE / took)))
            yield tokens[:, : int(count)].tolist()
        running = following


def padded(prompts: Sequence[Int[np.ndarray, " _"]], most: int) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
    """Return the prompts as rows, padded on the right, and their lengths.

    Widths are powers of two, at most `most`, so that other prompts seldom need another compile.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), step_up(int(lengths.max()), most)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def step_up(length: int, most: int) -> int:
    """Return the next power of two, at least 16 and at most `most`."""
    return min(max(16, 1 << (length - 1).bit_length()), most)


def forget(*jitted: Any) -> None:
    """Trace jitted functions anew when they are called next."""
    for one in jitted:
        one.clear_cache()
