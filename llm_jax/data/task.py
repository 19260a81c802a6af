r"""What a model learns from documents that are a question and its answer, `QUESTION\tANSWER`.

    translate   generate the answer token by token, with full attention over the question (prefix-LM, Raffel et al.
                2019, arXiv:1910.10683)
    classify    choose one of a few answers, by a head at the separator, the last token of the question

Data is prepared as usual; the loader, which knows the documents of a row, keeps the targets that the task needs.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from llm_jax.config import check_types
from llm_jax.data.tokenizer import Tokenizer

IGNORE = -1  # the target of a position without a loss

Kind = Literal["translate", "classify"]


@dataclass(frozen=True)
class TaskConfig:
    """What a run learns to answer. Raise `ValueError` for answers that don't fit the kind.

    Attributes:
      kind: `translate` generates the answer, `classify` chooses it.
      separator: the token between question and answer; the first one in a document counts.
      answers: the text of every class, for classify.
    """

    kind: Kind
    separator: str = "\t"
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "data.task.")
        if self.kind == "classify" and (len(self.answers) < 2 or "" in self.answers):
            raise ValueError(
                f"data.task.kind=classify chooses among answers; got {self.answers}; set data.task.answers=yes,no"
            )
        if self.kind == "translate" and self.answers:
            raise ValueError(
                f"data.task.kind=translate generates any answer; leave out data.task.answers={','.join(self.answers)}"
            )

    def ask(self, question: str) -> str:
        """Return `question` with the separator after it, unless it contains one."""
        return question if self.separator in question else question + self.separator


@dataclass(frozen=True)
class Selected:
    """The targets of a batch that a task keeps, and the tokens that all of their document attends to; None: none."""

    targets: Int32[np.ndarray, "B L"]
    prefix: Bool[np.ndarray, "B L"] | None


@dataclass(frozen=True)
class Task:
    """A task in token ids; an answer is identified by its first token."""

    kind: Kind
    separator: int
    answers: Int64[np.ndarray, " C"]

    def select(
        self,
        tokens: Int32[np.ndarray, "B L"],
        targets: Int32[np.ndarray, "B L"],
        segments: Int32[np.ndarray, "B L"],
    ) -> Selected:
        """Keep the targets that answer: all of the answer and its end, or its class at the separator."""
        question = self.question(tokens, segments)
        last = question & (tokens == self.separator)
        if self.kind == "translate":
            return Selected(np.where(question & ~last, IGNORE, targets), question)
        classes = (targets[..., None] == self.answers).argmax(-1).astype(np.int32)
        return Selected(np.where(last, classes, np.int32(IGNORE)), None)

    def question(self, tokens: Int[np.ndarray, "B L"], segments: Int[np.ndarray, "B L"]) -> Bool[np.ndarray, "B L"]:
        """Return which tokens belong to the question of their document: all up to its first separator, inclusive."""
        separates = tokens == self.separator
        before = np.cumsum(separates, axis=1) - separates  # separators before each token, in the whole row
        begins = np.diff(segments, axis=1, prepend=0) != 0
        before_document = np.maximum.accumulate(np.where(begins, before, 0), axis=1)
        return (before == before_document) & (segments != 0)

    def misfit(
        self, tokens: Int32[np.ndarray, " n"], offsets: Int64[np.ndarray, " m"], seq_len: int
    ) -> tuple[int, str] | None:
        """Return the first document that is not a question and its answer, and why; None if all are.

        Document d is `tokens[offsets[d] : offsets[d + 1]]`.
        """
        lengths = np.diff(offsets)
        if lengths.max(initial=0) > seq_len:
            longest = int(lengths.argmax())
            n = int(lengths[longest])
            why = f"its {n} tokens exceed data.seq_len={seq_len}, which would split question and answer; use {n}"
            return longest, why
        positions = np.flatnonzero(tokens == self.separator)
        documents, first = np.unique(np.searchsorted(offsets, positions, side="right") - 1, return_index=True)
        missing = np.setdiff1d(np.arange(len(lengths)), documents)
        if len(missing):
            return int(missing[0]), (
                "it has no separator as a token of its own; put one between question and answer, or name another as "
                "data.task.separator"
            )
        if self.kind == "classify":
            begin = positions[first] + 1
            known = np.isin(tokens[np.minimum(begin, len(tokens) - 1)], self.answers) & (begin < offsets[1:])
            if not known.all():
                return int(known.argmin()), "its answer begins like none of data.task.answers; fix it, or add it there"
        return None


def resolve(config: TaskConfig, tokenizer: Tokenizer, *, special: bool = False) -> Task:
    """Return the task in the ids of `tokenizer`; `special` reads special tokens in its texts, as in its data.

    Raise `ValueError` if the separator is not one token, or two answers begin with the same token.
    """
    separator = tokenizer.encode(config.separator, special=special)
    if len(separator) != 1:
        raise ValueError(
            f"data.task.separator={config.separator!r} must be one token, and is {len(separator)} of {tokenizer.name}; "
            r"use another, such as $'\t' or $'\n'"
        )
    first = [int(tokenizer.encode(answer, special=special)[0]) for answer in config.answers]
    for number, token in enumerate(first):
        if token in first[:number]:
            one, other = config.answers[first.index(token)], config.answers[number]
            raise ValueError(
                f"data.task.answers: {one!r} and {other!r} begin with the same token of {tokenizer.name}, which "
                "identifies them; use other words for them"
            )
    return Task(config.kind, int(separator[0]), np.array(first, np.int64))
