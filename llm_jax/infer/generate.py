"""Generate text: from prompts to tokens, and from tokens to whole characters, each as soon as it is certain."""

import codecs
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from llm_jax.config import nearest, replace
from llm_jax.data.task import TaskConfig, resolve
from llm_jax.data.tokenizer import Tokenizer, open_tokenizer
from llm_jax.infer import decode
from llm_jax.infer.speculate import DRAFTED, Draft, check_rewindable, round_of, speculations
from llm_jax.keys import options_meant
from llm_jax.model.config import ModelConfig, own_layers
from llm_jax.ops.sampling import NO_TOKEN, Sampling, filters

Finish = Literal["end_of_text", "stop", "length"]
BATCH = 32  # rows decoded together; further prompts wait


@dataclasses.dataclass(frozen=True)
class Piece:
    """New text of one row, of which a draft proposed `drafted` tokens and the model `kept` some.

    `finish`, in a row's last piece, says why it ends.
    """

    row: int
    text: str
    finish: Finish | None
    drafted: int = 0
    kept: int = 0


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
    """A prompt, its continuation, and why that ends; how many tokens a draft proposed, and how many were kept."""

    prompt: str
    text: str
    finish: Finish | None
    drafted: int = 0
    kept: int = 0


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


OPTIONS = (*(field.name for field in dataclasses.fields(Sampling)), "max_tokens", "stop", "seed", "draft")


def chosen_sampling(sampling: Sampling | None, fields: Mapping[str, Any]) -> Sampling:
    """Return how to sample, given as a whole or by the fields of `Sampling`; the model's own distribution if neither.

    Raise `ValueError` for both, and for a name that no option has, with the nearest that one has.
    """
    if sampling is not None and not isinstance(sampling, Sampling):
        raise ValueError(
            f"sampling= takes a Sampling, got {sampling!r}; write temperature={sampling!r}, or such a field"
        )
    for name in [name for name in fields if name not in OPTIONS]:
        shell = [
            f"--{known.replace('_', '-')}" for known in OPTIONS
        ]  # synonyms are listed as the command line has them
        words = options_meant(name, shell)
        meant = [word.removeprefix("--").replace(" ", "=").replace("-", "_") for word in words]
        say = f"did you mean {' or '.join(meant)}?" if meant else nearest(name, OPTIONS)
        raise ValueError(f"{name}= is no way to sample; {say}")
    if sampling is not None and fields:
        raise ValueError(f"sampling= and {', '.join(fields)}= both say how to sample; give one of them")
    return sampling or Sampling(**fields)


class Sampler:
    """A model ready to generate text: its weights cast to `config.dtype`, unstacked and laid out, once.

        sampler = Sampler(config, params, tokenizer)
        sampler.generate(["def f("], temperature=0.5)

    `params` are those of `Transformer(config)`. `tokenizer` is one of ours, or its name, such as `byte`. `begin` puts
    the begin-of-text token before each prompt, as a document began in training; for an imported model the right value
    is its tokenizer's `begins`. `special` reads special tokens in prompts. With a `task`, prompts are its questions,
    with its separator or without. `weights="int8"` holds matrices in a quarter of the memory (docs/generation.md).
    Raise `ValueError` for a classifier, for what is no model or its parameters, and for int8 weights of experts.
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
        weights: str | None = None,
    ) -> None:
        _check_model(config, params)
        tokenizer = open_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
        self.tokenizer, self.begin, self.special = tokenizer, begin, special
        # An implementation chosen for rows of training length may decline a single query.
        self.config = replace(config, **{"attention.implementation": None})
        self._weights = decode.prepare(config, params, weights)
        self._task = None if task is None else resolve(task, tokenizer, special=special)
        self._ask = (lambda prompt: prompt) if task is None else task.ask
        if own_layers(config):  # which may have changed under its name since these were traced
            decode.forget(decode.prefill, decode.decode, round_of)

    def stream(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        *,
        max_tokens: int = 200,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        draft: "Sampler | str | None" = None,
        **fields: Any,
    ) -> Iterator[Piece]:
        """Yield the continuation of each prompt, or of the only one, in pieces: whole characters, each once certain.

        How to sample is said by a `sampling`, or by `fields` of one, such as `temperature=0.5`. A row ends with one of
        the tokenizer's `end_ids`, before the first `stop` text, after `max_tokens`, or where prompt and text fill
        `max_seq_len`. A row depends on its prompt, its index among `prompts` and `seed`; at temperature 0, on its
        prompt alone, unless positions are scaled by the length that a text may reach (`dynamic`, `longrope`): then on
        `max_tokens` too, once prompt and text may exceed `rotary.original_len`. A repetition penalty ignores the
        begin-of-text token.

        A `draft` proposes tokens, of which the model reads several in one pass: a `Sampler` of a smaller model with the
        same tokenizer, or `"lookup"`, for texts that repeat themselves. The distribution of the texts stays the same
        (`ops/speculative.py`), at temperature 0 the texts do; other draws follow from a seed.

        Raise `ValueError` for a prompt that is empty or too long, for an unknown option, for a draft that does not fit,
        and where the logits are not finite.
        """
        sampling, stop = chosen_sampling(sampling, fields), as_texts(stop, "stop=")
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int | np.integer) or max_tokens < 1:
            raise ValueError(f"max_tokens={max_tokens!r} generates nothing; use a whole number, 1 or more")
        if "" in stop:
            raise ValueError("an empty stop text would end every text before it begins; leave it out")
        if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed!r} must lie between 0 and {2**32 - 1}, a whole number")
        drafter = self._drafter(draft)
        questions = list(map(self._ask, as_texts(prompts, "prompts=")))
        ids = prompt_ids(self.config, self.tokenizer, questions, self.begin, self.special)
        rooms = [min(max_tokens, self.config.max_seq_len - len(tokens)) for tokens in ids]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(ids)))
        for first in range(0, len(ids), BATCH):
            batch = slice(first, first + BATCH)
            request = decode.Request(
                ids[batch],
                keys[batch],
                filters(sampling),
                max(rooms[batch]),
                self.tokenizer.vocab_size,
                ends=self.tokenizer.end_ids,
                task=self._task,
                uncounted=int(self.begin),
                look=bool(stop),
            )
            rows = [Row(self.tokenizer, stop, room) for room in rooms[batch]]
            drafted = 0  # the first token follows the prompt
            for new in self._tokens(request, draft, drafter):
                for i, (row, tokens) in enumerate(zip(rows, new, strict=True), start=first):
                    if row.finish is None and ((text := row.add_all(tokens)) or row.finish or drafted):
                        yield Piece(i, text, row.finish, drafted, len(tokens) - 1 if drafted else 0)
                if all(row.finish for row in rows):
                    break
                drafted = 0 if draft is None else DRAFTED

    def _tokens(self, request: decode.Request, draft: object, drafter: Draft | None) -> Iterator[decode.Tokens]:
        if draft is None:
            return decode.continuations(self.config, self._weights, request)
        return speculations(self.config, self._weights, request, drafter)

    def _drafter(self, draft: object) -> Draft | None:
        """Return the model that drafts, if one does. Raise `ValueError` for a draft that does not fit."""
        if draft is None:
            return None
        if draft != "lookup" and not isinstance(draft, Sampler):
            raise ValueError(f"draft={draft!r} is neither a Sampler nor 'lookup'; give one of them")
        check_rewindable(self.config, "the model")
        if not isinstance(draft, Sampler):
            return None
        check_rewindable(draft.config, "the draft")
        if draft.tokenizer.fingerprint != self.tokenizer.fingerprint:
            raise ValueError("a draft proposes tokens, and these have another tokenizer; use a model with the same one")
        if draft.config.max_seq_len < self.config.max_seq_len:
            raise ValueError(
                f"the draft reads {draft.config.max_seq_len} tokens and the model {self.config.max_seq_len}; use a "
                "draft whose max_seq_len is no smaller"
            )
        return Draft(draft.config, draft._weights)

    def texts(self, prompts: str | Sequence[str], sampling: Sampling | None = None, **options: Any) -> list[Text]:
        """Return each prompt with its continuation and why that ends; `options` as for `stream`."""
        prompts = as_texts(prompts, "prompts=")
        texts = [Text(prompt, "", None) for prompt in prompts]
        for piece in self.stream(prompts, sampling, **options):
            so_far = texts[piece.row]
            drafted, kept = so_far.drafted + piece.drafted, so_far.kept + piece.kept
            texts[piece.row] = Text(so_far.prompt, so_far.text + piece.text, piece.finish, drafted, kept)
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

    def add_all(self, tokens: Iterable[int]) -> str:
        """Return the text that `tokens` make certain, up to the one that ends the row."""
        text = ""
        for token in tokens:
            if self.finish is None:
                text += self.add(token)
        return text

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
