"""Speculative decoding: a draft proposes the next tokens, and the model reads them all in one forward pass."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from llm_jax.infer.decode import Decoding, Request, Tokens, Weights, logits_of, read
from llm_jax.model.cache import Cache
from llm_jax.model.config import ModelConfig
from llm_jax.model.pattern import n_remembering
from llm_jax.ops.sampling import NO_TOKEN, Filters, filtered, finite
from llm_jax.ops.speculative import look_up, verify

DRAFTED = 4  # tokens that a draft proposes at a time


@dataclasses.dataclass(frozen=True)
class Draft:
    """A smaller model with the same vocabulary, as a decoder reads it."""

    config: ModelConfig
    weights: Weights


@struct.dataclass
class Drafting:
    """What proposes tokens: the draft model's cache, or without one the tokens of the text so far."""

    cache: Cache | None
    text: Int[Array, "B S"] | None


def check_rewindable(config: ModelConfig, whose: str) -> None:
    """Raise `ValueError` for a model whose memory can't take back the tokens that are not kept."""
    if kinds := set(n_remembering(config)) - {"keys"}:
        raise ValueError(
            f"a draft proposes tokens that are taken back, and {whose} has layers that keep a state "
            f"({', '.join(sorted(kinds))}) and can't forget; leave draft= out"
        )


def speculations(config: ModelConfig, weights: Weights, request: Request, draft: Draft | None) -> Iterator[Tokens]:
    """Yield the new tokens of all rows: the first of each, then 1 to DRAFTED + 1 of each a time, until all rows have
    `max_tokens`.

    The draft is a model, or without one what followed the last occurrence of the text's end (prompt lookup). Tokens
    have the distribution of `decode.continuations`, not its random numbers; at temperature 0 they are the same.
    """
    state = request.begin(config, weights)
    first = np.asarray(state.token)
    yield first[:, None].tolist()
    lengths = np.array(list(map(len, request.prompts)))
    if draft is None:
        text = np.zeros((len(lengths), request.size(config)), np.int32)
        for row, prompt, token in zip(text, request.prompts, first, strict=True):
            row[: len(prompt)] = prompt
            row[len(prompt) : len(prompt) + 1] = token
        drafting = Drafting(None, jnp.asarray(text))
    else:
        drafting = Drafting(request.begin(draft.config, draft.weights).cache, None)
    made, theirs = np.ones_like(lengths), None if draft is None else draft.config
    while made.min() < request.max_tokens and not np.asarray(state.ended).all():
        state, drafting, tokens, counts = round_of(
            config,
            theirs,
            request.vocab_size,
            weights,
            None if draft is None else draft.weights,
            request.by,
            state,
            drafting,
            request.end_ids,
        )
        made = made + np.asarray(counts)
        yield [row[:count] for row, count in zip(tokens.tolist(), counts.tolist(), strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=(6, 7))
def round_of(
    config: ModelConfig,
    draft_config: ModelConfig | None,
    vocab_size: int,
    weights: Weights,
    draft_weights: Weights | None,
    by: Filters,
    state: Decoding,
    drafting: Drafting,
    ends: Int[Array, " E"],
) -> tuple[Decoding, Drafting, Int[Array, "B T"], Int[Array, " B"]]:
    """Draft tokens, read them, keep some, and sample one more: 1 to DRAFTED + 1 tokens of each row, and how many."""
    rows, length = jnp.arange(len(state.token)), state.cache.length
    at = jnp.arange(DRAFTED + 1)  # of the tokens that are read, from the newest
    keys = jax.vmap(lambda key, n: jax.vmap(functools.partial(jax.random.fold_in, key))(n + 1 + at))(state.keys, length)
    if draft_config is None:
        assert drafting.text is not None
        drafted = look_up(drafting.text, length + 1, DRAFTED)
        q = jax.nn.one_hot(drafted, vocab_size)
    else:
        assert draft_weights is not None
        drafted, q, cache = propose(draft_config, vocab_size, draft_weights, by, state, drafting.cache, keys)
        drafting = Drafting(cache, None)

    inputs = jnp.concatenate([state.token[:, None], drafted], axis=1)
    hidden, cache = read(config, weights, state.cache, inputs)
    logits = logits_of(config, vocab_size, weights, hidden.reshape(-1, hidden.shape[-1]))
    logits = logits.reshape(*inputs.shape, -1)
    read_so_far = (_seen(state.seen, inputs[:, : t + 1]) for t in range(DRAFTED + 1))
    p = jnp.stack([distribution(logits[:, t], seen, by) for t, seen in enumerate(read_so_far)], axis=1)
    verdict = verify(p, q, drafted, keys)
    token = jnp.where(jax.vmap(finite)(logits)[rows, verdict.kept], verdict.token, NO_TOKEN)

    kept = verdict.kept
    new = jnp.where(at[None] < kept[:, None], jnp.pad(drafted, ((0, 0), (0, 1))), token[:, None])
    length = length + 1 + kept
    if drafting.text is not None:
        here = length[:, None] - kept[:, None] + at[None]
        drafting = Drafting(None, drafting.text.at[rows[:, None], here].set(new, mode="drop"))
    if drafting.cache is not None:
        drafting = Drafting(dataclasses.replace(drafting.cache, length=length), None)
    seen = state.seen
    if seen is not None:
        seen = seen.at[rows[:, None], inputs].max(at[None] <= kept[:, None])
    stopped = (new[..., None] == ends[None, None]).any(-1) & (at[None] <= kept[:, None])
    ended = state.ended | (token == NO_TOKEN) | stopped.any(1)
    cache = dataclasses.replace(cache, length=length)
    return Decoding(cache, token, seen, state.keys, ended), drafting, new, kept + 1


def propose(
    config: ModelConfig,
    vocab_size: int,
    weights: Weights,
    by: Filters,
    state: Decoding,
    cache: Cache | None,
    keys: Key[Array, "B T"],
) -> tuple[Int[Array, "B G"], Float[Array, "B G V"], Cache]:
    """Sample DRAFTED tokens of a draft model, and read all of them; return its distributions too."""
    assert cache is not None

    def one(carry: tuple[Cache, Array, Bool[Array, "B V"] | None], keys: Key[Array, " B"]) -> tuple:
        cache, token, seen = carry
        hidden, cache = read(config, weights, cache, token[:, None])
        seen, logits = _seen(seen, token[:, None]), logits_of(config, vocab_size, weights, hidden[:, 0])
        logits = jnp.where(finite(logits)[:, None], logits, 0)  # what a broken draft says is as good as anything
        q = distribution(logits, seen, by)
        draw = jax.vmap(lambda key, weights: jax.random.categorical(jax.random.fold_in(key, 2), jnp.log(weights)))
        token = draw(keys, q)
        return (cache, token, seen), (token, q)

    (cache, _, _), (drafted, q) = jax.lax.scan(one, (cache, state.token, state.seen), jnp.moveaxis(keys, 1, 0))
    return jnp.moveaxis(drafted, 0, 1)[:, :-1], jnp.moveaxis(q, 0, 1)[:, :-1], cache


def distribution(logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, by: Filters) -> Float[Array, "B V"]:
    """Return the probabilities that tokens are drawn with."""
    return jax.nn.softmax(filtered(logits, seen, by), axis=-1)


def _seen(seen: Bool[Array, "B V"] | None, tokens: Int[Array, "B L"]) -> Bool[Array, "B V"] | None:
    """Return `seen` with some more tokens; None stays."""
    return None if seen is None else seen.at[jnp.arange(len(tokens))[:, None], tokens].set(True)
