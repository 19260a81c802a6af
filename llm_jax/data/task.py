r"""What is asked of a document that is a question and its answer, `QUESTION\tANSWER`.

    translate   the answer is written token by token, by a model that sees the whole question at once (prefix-LM,
                Raffel et al. 2019, arXiv:1910.10683)
    classify    the answer is one of a few; the head tells which at the separator, the last token of the question

Data is prepared as ever; the loader, which knows the documents of a row, keeps the targets that are asked for.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from llm_jax.data.tokenizer import Tokenizer

IGNORE = -1  # the target of a position that counts for nothing

Kind = Literal["translate", "classify"]


@dataclass(frozen=True)
class TaskConfig:
    """What a run learns to answer.

    Attributes:
      kind: `translate` writes the answer, `classify` chooses it.
      separator: the token between question and answer; the first one in a document counts.
      answers: of classify, the text of every class.
    """

    kind: Kind
    separator: str = "\t"
    answers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.kind == "classify" and (len(self.answers) < 2 or "" in self.answers):
            raise ValueError(f"task.kind=classify chooses among answers; got {self.answers}; set task.answers=yes,no")
        if self.kind == "translate" and self.answers:
            raise ValueError(f"task.kind=translate writes any answer; leave out task.answers={','.join(self.answers)}")

    def ask(self, question: str) -> str:
        """`question` with the separator behind it, if there is none in it yet."""
        return question if self.separator in question else question + self.separator


@dataclass(frozen=True)
class Asked:
    """What is left of a batch's targets, and the tokens that all of their document may see; None: none."""

    targets: Int32[np.ndarray, "B L"]
    prefix: Bool[np.ndarray, "B L"] | None


@dataclass(frozen=True)
class Task:
    """A task in token ids; an answer is known by its first."""

    kind: Kind
    separator: int
    answers: Int64[np.ndarray, " C"]

    def asked(
        self,
        tokens: Int32[np.ndarray, "B L"],
        targets: Int32[np.ndarray, "B L"],
        segments: Int32[np.ndarray, "B L"],
    ) -> Asked:
        """Of every next token those that answer: the whole answer and its end, or at the separator its class."""
        question = self.question(tokens, segments)
        last = question & (tokens == self.separator)
        if self.kind == "translate":
            return Asked(np.where(question & ~last, IGNORE, targets), question)
        classes = (targets[..., None] == self.answers).argmax(-1).astype(np.int32)
        return Asked(np.where(last, classes, np.int32(IGNORE)), None)

    def question(self, tokens: Int[np.ndarray, "B L"], segments: Int[np.ndarray, "B L"]) -> Bool[np.ndarray, "B L"]:
        """Which tokens stand in the question of their document: all up to its first separator, and this too."""
        separates = tokens == self.separator
        before = np.cumsum(separates, axis=1) - separates  # separators before each token, in the whole row
        begins = np.diff(segments, axis=1, prepend=0) != 0
        before_document = np.maximum.accumulate(np.where(begins, before, 0), axis=1)
        return (before == before_document) & (segments != 0)

    def misfit(
        self, tokens: Int32[np.ndarray, " n"], offsets: Int64[np.ndarray, " m"], seq_len: int
    ) -> tuple[int, str] | None:
        """The first document that does not have the form of question and answer, and why; None: all have.

        Document d is `tokens[offsets[d] : offsets[d + 1]]`.
        """
        lengths = np.diff(offsets)
        if lengths.max(initial=0) > seq_len:
            longest = int(lengths.argmax())
            n = int(lengths[longest])
            return longest, f"its {n} tokens exceed seq_len={seq_len}, which would part question and answer; use {n}"
        places = np.flatnonzero(tokens == self.separator)
        documents, first = np.unique(np.searchsorted(offsets, places, side="right") - 1, return_index=True)
        missing = np.setdiff1d(np.arange(len(lengths)), documents)
        if len(missing):
            return int(missing[0]), (
                "it has no separator as a token of its own; put one between question and answer, or name another as "
                "data.task.separator"
            )
        if self.kind == "classify":
            begin = places[first] + 1
            known = np.isin(tokens[np.minimum(begin, len(tokens) - 1)], self.answers) & (begin < offsets[1:])
            if not known.all():
                return int(known.argmin()), "its answer begins like none of data.task.answers; mend it, or add it there"
        return None


def resolve(config: TaskConfig, tokenizer: Tokenizer, *, special: bool = False) -> Task:
    """Return the task in the ids of `tokenizer`, which reads special tokens in it where its data has them.

    Raises `ValueError` where they don't tell what must be told apart.
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
                f"data.task.answers: {one!r} and {other!r} begin with the same token of {tokenizer.name}, by which "
                "they are known; use other words for them"
            )
    return Task(config.kind, int(separator[0]), np.array(first, np.int64))
