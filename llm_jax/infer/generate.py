"""Generate text: prefill the prompts in one forward pass, then decode one token a row a step."""

import codecs
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int, Key, PyTree

from llm_jax.config import nearest, replace
from llm_jax.data.task import Task, TaskConfig, resolve
from llm_jax.data.tokenizer import Tokenizer, open_tokenizer
from llm_jax.keys import options_meant
from llm_jax.model.cache import Cache, init_cache
from llm_jax.model.config import ModelConfig, own_layers
from llm_jax.model.precision import in_dtype
from llm_jax.model.stack import unstack
from llm_jax.model.transformer import Transformer, forward, head_table
from llm_jax.ops.loss import unembed
from llm_jax.ops.sampling import NO_TOKEN, Sampling, sample

Finish = Literal["end_of_text", "stop", "length"]
BATCH = 32  # rows decoded together; further prompts wait


@struct.dataclass
class Decoding:
    """The state between tokens: the cache, which tokens each row has seen, and a key a row."""

    cache: Cache
    seen: Bool[Array, "B V"]
    keys: Key[Array, " B"]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def begin_rows(config: ModelConfig, size: int, vocab_size: int, keys: Key[Array, " B"]) -> Decoding:
    """Return rows that have read nothing, with room for `size` tokens each."""
    rows = keys.shape[0]
    return Decoding(init_cache(config, rows, size), jnp.zeros((rows, vocab_size), bool), keys)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def next_token(
    config: ModelConfig,
    sampling: Sampling,
    params: PyTree,
    state: Decoding,
    tokens: Int[Array, "B L"],
    lengths: Int[Array, " B"],
    prefix: Bool[Array, "B L"] | None = None,
    uncounted: Int[Array, ""] | int = 0,
) -> tuple[Decoding, Int[Array, " B"]]:
    """Read the first `lengths` tokens of each row, all of which see the `prefix`, and sample the next one.

    A repetition penalty ignores the first `uncounted` tokens of a row. Whole prompts, padded on the right, and single
    tokens take the same code path. Padding fills cache slots after the row's end, which are masked, and overwritten as
    the row grows.
    """
    model = Transformer(config, stacked=False)
    out = forward(model, params, tokens, prefix=prefix, lengths=lengths, cache=state.cache, logits=False)
    assert out.cache is not None
    rows = jnp.arange(tokens.shape[0])
    index = jnp.arange(tokens.shape[1])[None]
    read = (index >= uncounted) & (index < lengths[:, None])
    seen = state.seen.at[rows[:, None], tokens].max(read)

    head = head_table(config, params)[: seen.shape[-1]]
    last = out.hidden[rows, lengths - 1]
    logits = unembed(last, head.astype(last.dtype), config.logit_softcap)
    keys = jax.vmap(jax.random.fold_in)(state.keys, out.cache.length)
    return Decoding(out.cache, seen, state.keys), sample(logits, keys, seen, sampling)


def continuations(
    config: ModelConfig,
    params: PyTree,
    prompts: Sequence[Int[np.ndarray, " _"]],
    keys: Key[Array, " B"],
    *,
    vocab_size: int,
    sampling: Sampling,
    max_tokens: int,
    task: Task | None = None,
    uncounted: int = 0,
) -> Iterator[Int[np.ndarray, " B"]]:
    """Yield one new token a row, `max_tokens` times. Beyond `max_seq_len` a row's tokens mean nothing.

    `params` are `unstack`ed; ids from `vocab_size` on are never sampled. A row depends on its own prompt and key only.
    The question of a `task` is read as its prefix; what follows it is causal. A repetition penalty ignores the first
    `uncounted` tokens of a prompt. A row whose logits are not finite gets `NO_TOKEN`. Raise `ValueError` for a prompt
    with an id outside the vocabulary: the forward pass would take the nearest one.
    """
    for prompt in prompts:
        if len(wrong := prompt[(prompt < 0) | (prompt >= config.vocab_size)]):
            raise ValueError(
                f"token {wrong[0]} of a prompt is not an id of the model, which has 0 to {config.vocab_size - 1}; "
                "encode the prompt with the run's own tokenizer"
            )
    tokens, lengths = padded(prompts, config.max_seq_len)
    size = _step_up(tokens.shape[1] + max_tokens, config.max_seq_len)
    there = (np.arange(tokens.shape[1]) < lengths[:, None]).astype(np.int32)
    prefix = None if task is None else task.question(tokens, there)
    state, ones = begin_rows(config, size, vocab_size, keys), np.ones_like(lengths)
    if state.cache.reach is not None:  # of each row, independent of padding and of other rows
        reach = jnp.asarray(np.minimum(lengths + max_tokens, config.max_seq_len))
        state = dataclasses.replace(state, cache=dataclasses.replace(state.cache, reach=reach))
    state, token = next_token(config, sampling, params, state, tokens, lengths, prefix, uncounted)
    for _ in range(max_tokens - 1):
        newest = token
        state, token = next_token(config, sampling, params, state, newest[:, None], ones)
        yield np.asarray(newest)  # read while the device computes the next one
    yield np.asarray(token)


def padded(prompts: Sequence[Int[np.ndarray, " _"]], most: int) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, " B"]]:
    """Return the prompts as rows, padded on the right, and their lengths.

    Widths are powers of two, at most `most`, so that other prompts seldom need another compile.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), _step_up(int(lengths.max()), most)), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _step_up(length: int, most: int) -> int:
    """Return the next power of two, at least 16 and at most `most`."""
    return min(max(16, 1 << (length - 1).bit_length()), most)


@dataclasses.dataclass(frozen=True)
class Piece:
    """New text of one row. `finish`, in a row's last piece, says why it ends."""

    row: int
    text: str
    finish: Finish | None


def prompt_ids(
    config: ModelConfig, tokenizer: Tokenizer, prompts: Sequence[str], begin: bool, special: bool = False
) -> list[Int[np.ndarray, " _"]]:
    """Return the tokens of each prompt, with the begin-of-text token first if `begin`.

    `special` reads special tokens in a prompt. Raise `ValueError` for a prompt that has no tokens, or that leaves no
    room in `max_seq_len`.
    """
    start = [tokenizer.begin_of_text] if begin else []
    ids = [np.array([*start, *tokenizer.encode(prompt, special=special)], np.int32) for prompt in prompts]
    if not all(map(len, ids)):
        raise ValueError(
            "a prompt without tokens leaves nothing to continue; give it some text, if only a line break, or --begin "
            "(from Python run.new_sampler(begin=True))"
        )
    longest = max(map(len, ids), default=0)
    if longest >= config.max_seq_len:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room in model.max_seq_len={config.max_seq_len}; "
            f"use at most {config.max_seq_len - 1}"
        )
    return ids


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt, its continuation, and why that ends."""

    prompt: str
    text: str
    finish: Finish | None


def as_texts(given: str | Iterable[str], what: str) -> list[str]:
    """Return some texts as a list; one text is a list of one. Raise `ValueError` for what is no text."""
    if isinstance(given, str):
        return [given]
    try:
        texts = list(given)
    except TypeError:
        raise ValueError(f"{what} takes a text, or a list of them; got {given!r}") from None
    if texts and not isinstance(given, bytes) and all(isinstance(each, int | np.integer) for each in texts):
        raise ValueError(f"{what} takes a text, or a list of them; got token ids: give tokenizer.decode(ids)")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"{what} takes a text, or a list of them; got {text!r} among them")
    return texts


OPTIONS = (*(field.name for field in dataclasses.fields(Sampling)), "max_tokens", "stop", "seed")


def forget(jitted: Any) -> None:
    """Trace a jitted function anew when it is called next."""
    jitted.clear_cache()


def chosen_sampling(sampling: Sampling | None, filters: Mapping[str, Any]) -> Sampling:
    """Return how to sample, given as a whole or by the fields of `Sampling`; the model's own distribution if neither.

    Raise `ValueError` for both, and for a name that no option has, with the nearest that one has.
    """
    if sampling is not None and not isinstance(sampling, Sampling):
        raise ValueError(
            f"sampling= takes a Sampling, got {sampling!r}; write temperature={sampling!r}, or such a field"
        )
    for name in [name for name in filters if name not in OPTIONS]:
        shell = [
            f"--{known.replace('_', '-')}" for known in OPTIONS
        ]  # synonyms are listed as the command line has them
        words = options_meant(name, shell)
        meant = [word.removeprefix("--").replace(" ", "=").replace("-", "_") for word in words]
        say = f"did you mean {' or '.join(meant)}?" if meant else nearest(name, OPTIONS)
        raise ValueError(f"{name}= is no way to sample; {say}")
    if sampling is not None and filters:
        raise ValueError(f"sampling= and {', '.join(filters)}= both say how to sample; give one of them")
    return sampling or Sampling(**filters)


class Sampler:
    """A model ready to generate text: its weights cast to `config.dtype` and unstacked, once.

        sampler = Sampler(config, params, tokenizer)
        sampler.generate(["def f("], temperature=0.5)

    `params` are those of `Transformer(config)`. `tokenizer` is one of ours, or its name, such as `byte`. `begin` puts
    the begin-of-text token before each prompt, as a document began in training; for an imported model the right value
    is its tokenizer's `begins`. `special` reads special tokens in prompts. With a `task`, prompts are its questions,
    with its separator or without. Raise `ValueError` for a classifier, and for what is no model or its parameters.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: PyTree,
        tokenizer: Tokenizer | str | Path,
        *,
        begin: bool = True,
        special: bool = False,
        task: TaskConfig | None = None,
    ) -> None:
        _check_model(config, params)
        tokenizer = open_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        self.tokenizer, self.begin, self.special = tokenizer, begin, special
        # An implementation chosen for rows of training length may decline a single query.
        self.config = replace(config, **{"attention.implementation": None})
        self._params = unstack(config, in_dtype(params, config.dtype))
        self._task = None if task is None else resolve(task, tokenizer, special=special)
        self._ask = (lambda prompt: prompt) if task is None else task.ask
        if own_layers(config):  # which may have changed under its name since these were traced
            forget(begin_rows)
            forget(next_token)

    def stream(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        *,
        max_tokens: int = 200,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        **filters: Any,
    ) -> Iterator[Piece]:
        """Yield the continuation of each prompt, or of the only one, in pieces: whole characters, each once certain.

        How to sample is said by a `sampling`, or by `filters`: the fields of `Sampling`, such as `temperature=0.5`.
        A row ends with one of the tokenizer's `end_ids`, before the first `stop` text, after `max_tokens`, or where
        prompt and text fill `max_seq_len`. A row depends on its prompt, its index among `prompts` and `seed`; at
        temperature 0, on its prompt alone, unless positions are scaled by the length that a text may reach (`dynamic`,
        `longrope`): then on `max_tokens` too, once prompt and text may exceed `rotary.original_len`. A repetition
        penalty ignores the begin-of-text token. Raise `ValueError` for a prompt that is empty or too long, for an
        unknown option, and where the logits are not finite.
        """
        sampling, stop = chosen_sampling(sampling, filters), as_texts(stop, "stop=")
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int | np.integer) or max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens!r} generates nothing; use a whole number, 1 or more")
        if "" in stop:
            raise ValueError("an empty stop text would end every text before it begins; leave it out")
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed!r} must lie between 0 and {2**32 - 1}, a whole number")
        questions = list(map(self._ask, as_texts(prompts, "prompts=")))
        ids = prompt_ids(self.config, self.tokenizer, questions, self.begin, self.special)
        rooms = [min(max_tokens, self.config.max_seq_len - len(tokens)) for tokens in ids]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(ids)))
        for first in range(0, len(ids), BATCH):
            batch = slice(first, first + BATCH)
            rows = [Row(self.tokenizer, stop, room) for room in rooms[batch]]
            for tokens in continuations(
                self.config,
                self._params,
                ids[batch],
                keys[batch],
                vocab_size=self.tokenizer.vocab_size,
                sampling=sampling,
                max_tokens=max(rooms[batch]),
                task=self._task,
                uncounted=int(self.begin),
            ):
                for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True), start=first):
                    if row.finish is None and ((text := row.add(token)) or row.finish):
                        yield Piece(i, text, row.finish)
                if all(row.finish for row in rows):
                    break

    def texts(self, prompts: str | Sequence[str], sampling: Sampling | None = None, **options: Any) -> list[Text]:
        """Return each prompt with its continuation and why that ends; `options` as for `stream`."""
        prompts = as_texts(prompts, "prompts=")
        texts = [Text(prompt, "", None) for prompt in prompts]
        for piece in self.stream(prompts, sampling, **options):
            so_far = texts[piece.row]
            texts[piece.row] = Text(so_far.prompt, so_far.text + piece.text, piece.finish)
        return texts

    def generate(self, prompts: str | Sequence[str], sampling: Sampling | None = None, **options: Any) -> list[str]:
        """Return the continuation of each prompt, or of the only one; `options` as for `stream`."""
        return [text.text for text in self.texts(prompts, sampling, **options)]


def _check_model(config: Any, params: Any) -> None:
    """Raise `ValueError` for what is no config of a model that generates, or not its parameters."""
    if not isinstance(config, ModelConfig):
        inside = next(
            (name for name in ("config", "model") if isinstance(getattr(config, name, None), ModelConfig)), ""
        )
        way = f"; give its .{inside}" if inside else ""
        raise ValueError(f"Sampler takes a ModelConfig, got a {type(config).__name__}{way}")
    if config.n_classes is not None:
        raise ValueError("a classifier generates nothing; ask run.classify(prompts), or: llm-jax generate RUN")
    if not isinstance(params, Mapping) or config.head not in params:
        way = 'variables["params"]' if isinstance(params, Mapping) and "params" in params else "run.params"
        raise ValueError(f"params are no parameters of this model, which have {config.head!r} among them; give {way}")


def row_by_row(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Yield the same pieces row by row: each row as it grows, once the row before it has ended."""
    waiting: dict[int, list[Piece]] = {}
    row = 0
    for piece in pieces:
        waiting.setdefault(piece.row, []).append(piece)
        while ready := waiting.pop(row, []):
            yield from ready
            if ready[-1].finish is None:
                break
            row += 1


class Row:
    """One text as it grows. Each token's bytes are decoded once, so the cost of a token does not grow with the text."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], room: int) -> None:
        self.finish: Finish | None = None
        self._tokenizer, self._stop, self._room = tokenizer, stop, room
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # what may be the start of a stop text

    def add(self, token: int) -> str:
        """Return the text that `token` makes certain: characters of several tokens come whole, stop texts never.

        Raise `ValueError` for `NO_TOKEN`.
        """
        if token == NO_TOKEN:
            raise ValueError(
                "the model's logits are not finite: its weights have diverged, or overflow its dtype; take another "
                "checkpoint (--checkpoint, or Run.open(folder, checkpoint)), or look at the loss of its run"
            )
        ends = token in self._tokenizer.end_ids
        self._room -= 1
        if ends or self._room == 0:
            self.finish = "end_of_text" if ends else "length"
        new = b"" if ends else self._tokenizer.token_bytes(token)
        text = self._held + self._characters.decode(new, final=self.finish is not None)
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.finish = "stop"
            return text[: min(found)]
        if self.finish:
            return text
        held = max((n for end in self._stop for n in range(1, len(end)) if text.endswith(end[:n])), default=0)
        certain = len(text) - held
        self._held = text[certain:]
        return text[:certain]
