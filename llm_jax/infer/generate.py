"""Text from a model: one prefill over all prompts, then a token a row a step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, Key, PyTree

from llm_jax.data.tokenizer import Tokenizer
from llm_jax.model.cache import KVCache, init_cache
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Transformer, unstack
from llm_jax.ops.sampling import Sampling, sample


@struct.dataclass
class Decoding:
    """The state between two tokens: the cache, each row's newest token and what each row has seen."""

    cache: KVCache
    token: Int[Array, " B"]
    seen: Bool[Array, "B V"]


@functools.partial(jax.jit, static_argnums=(0, 5))
def prefill(
    config: ModelConfig,
    params: PyTree,
    tokens: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    keys: Key[Array, " B"],
    sampling: Sampling,
) -> Decoding:
    """Reads all prompts at once, right-padded to L, and draws the first token of each.

    What the padding writes to the cache lies behind `lengths`, is masked, and is overwritten as the row grows.
    """
    cache = init_cache(config, tokens.shape[0], config.max_seq_len)
    model = Transformer(config, stacked=False)
    out = model.apply({"params": params}, tokens, cache=cache)
    rows = jnp.arange(tokens.shape[0])
    real = jnp.arange(tokens.shape[1]) < lengths[:, None]
    seen = jnp.zeros((len(rows), config.vocab_size), bool).at[rows[:, None], tokens].max(real)
    token = sample(out.logits[rows, lengths - 1], keys, seen, sampling)
    return Decoding(out.cache.replace(length=lengths), token, seen.at[rows, token].set(True))


@functools.partial(jax.jit, static_argnums=(0, 4), donate_argnums=2)
def decode(
    config: ModelConfig, params: PyTree, state: Decoding, keys: Key[Array, " B"], sampling: Sampling
) -> Decoding:
    """One more token for every row."""
    model = Transformer(config, stacked=False)
    out = model.apply({"params": params}, state.token[:, None], cache=state.cache)
    token = sample(out.logits[:, 0], keys, state.seen, sampling)
    return Decoding(out.cache, token, state.seen.at[jnp.arange(len(token)), token].set(True))


def stream(
    config: ModelConfig,
    params: PyTree,
    prompts: Sequence[Int[np.ndarray, " L"]],
    sampling: Sampling,
    *,
    max_tokens: int,
    seed: int = 0,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yields one new token for every prompt, at most `max_tokens` times, and no further than `max_seq_len`.

    A row's tokens depend on its own prompt, its place in `prompts` and `seed`, not on the other prompts.
    Raises `ValueError` for an empty prompt or one that leaves no room for a token.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    if lengths.min() < 1:
        raise ValueError("a prompt without tokens; start from the end-of-text token instead")
    if longest >= config.max_seq_len:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room in max_seq_len={config.max_seq_len}; "
            f"use at most {config.max_seq_len - 1}"
        )
    # A few lengths, so that prompts of other sizes don't compile anew.
    width = min(config.max_seq_len, 1 << (longest - 1).bit_length())
    tokens = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    params = unstack(config, params)
    row_keys = jax.random.split(jax.random.key(seed), len(prompts))
    keys = jax.vmap(jax.random.fold_in, (0, None))
    state = prefill(config, params, tokens, lengths, keys(row_keys, 0), sampling)
    yield np.asarray(state.token)
    for step in range(1, min(max_tokens, config.max_seq_len - longest)):
        state = decode(config, params, state, keys(row_keys, step), sampling)
        yield np.asarray(state.token)


@dataclasses.dataclass
class Row:
    """One text as it grows."""

    tokens: list[int]
    done: bool = False


def generate(
    config: ModelConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    sampling: Sampling = Sampling(),
    max_tokens: int = 200,
    stop: Sequence[str] = (),
    seed: int = 0,
    begin: bool = True,
    show: Callable[[int, str], None] = lambda row, text: None,
) -> list[str]:
    """What the model writes behind each prompt, until end of text, a `stop` string or `max_tokens`.

    `begin` puts the end-of-text token before each prompt, as a document began in training. `show(row, text)` gets
    each row's new text as it comes; characters of several tokens come whole.
    """
    start = [tokenizer.end_of_text] if begin else []
    ids = [np.array([*start, *tokenizer.encode(prompt)], np.int32) for prompt in prompts]
    rows, shown = [Row([]) for _ in prompts], [""] * len(prompts)
    for tokens in stream(config, params, ids, sampling, max_tokens=max_tokens, seed=seed):
        for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            if row.done:
                continue
            row.done = token == tokenizer.end_of_text
            if not row.done:
                row.tokens.append(token)
            text, row.done = cut(tokenizer.decode(row.tokens), stop, row.done)
            if text.startswith(shown[i]):
                show(i, text[len(shown[i]) :])
                shown[i] = text
        if all(row.done for row in rows):
            break
    for i, row in enumerate(rows):
        text, _ = cut(tokenizer.decode(row.tokens), stop, True)
        show(i, text[len(shown[i]) :])
        shown[i] = text
    return shown


def cut(text: str, stop: Sequence[str], done: bool) -> tuple[str, bool]:
    """The part of `text` that is certain, and whether it is finished.

    Ends before the first `stop` string. Until it is done, a last character that may be half of one, and an end that
    may be the start of a `stop` string, are held back.
    """
    found = [at for at in (text.find(end) for end in stop) if at >= 0]
    if found:
        return text[: min(found)], True
    if done:
        return text, True
    held = max((n for end in stop for n in range(1, len(end)) if text.endswith(end[:n])), default=0)
    text = text[: len(text) - held]
    return text.rstrip("\N{REPLACEMENT CHARACTER}"), False
