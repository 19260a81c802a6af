"""What a run reads and how it becomes rows, and the grammar of `data.uri`, which may name several sources.

    tales.txt                             one source: an address as `sources.documents` takes it, whatever it contains
    tales.txt:0.7,hf://datasets/a/b:0.3   a mixture: every address with its weight

A weight is a decimal after the last colon of its address, and a comma that follows a weight separates two addresses.
Every other colon or comma belongs to an address: `s3://a/b,c.jsonl:2,C:\\books:1` has two. Text in which no weight
is followed by a comma is one address; a file called `take:1,2.txt` is found by a pattern, `take:1?2.txt`.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from llm_jax.config import check_types, nearest
from llm_jax.data import sources
from llm_jax.data.task import TaskConfig

NUMBER = re.compile(r":([+-]?(?:\d+\.?\d*(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?|nan|inf(?:inity)?))(,|$)", re.IGNORECASE)
WEIGHT = re.compile(r"\d{1,15}(\.\d{0,15})?|\.\d{1,15}", re.ASCII)


@dataclass(frozen=True)
class Source:
    """One source of a mixture: its address, a short name, its weight as written, and its share of the rows."""

    uri: str
    name: str
    weight: str
    share: Fraction


@dataclass(frozen=True)
class DataConfig:
    """What is read, how it becomes tokens, what is held out, and how the rest is cut into rows.

    Every field up to `heldout_by`, and `special`, is an argument of `prepare`; the others are for the loader. Raise
    `ValueError` for fields that contradict each other.

    Attributes:
      uri: where the text is: `builtin:python`, a file, folder or pattern, `hf://datasets/...`, or a folder that
        `prepare` made; of a mixture every address with its weight, as in `a.jsonl:0.7,b/:0.3`.
      tokenizer: `byte`, `char`, `train:N` (N ids, trained on the text), `gpt2`, `cl100k_base`, `o200k_base`, or a
        folder that holds one.
      separator: text that ends a document, if a file holds many; None: a file, or a row, is a document.
      column: which column of JSON, CSV or parquet is text; None: `text`, else `content`.
      end_of_text: a token ends each document.
      heldout: share of the documents for evaluation, never trained on.
      heldout_by: which documents those are: chosen by their content (`hash`), or the last (`tail`).
      packing: `documents` puts whole documents into rows, `windows` cuts the stream of tokens evenly.
      seq_len: tokens in a row.
      batch_size: rows in a step, over all processes.
      epochs: how often a run may see each row; None: as often as its steps need.
      seed: of the order of rows.
      task: what to learn from the documents, if not to predict every next token.
      special: text that spells a special token of the tokenizer, such as <|endoftext|>, becomes that token.
    """

    uri: str = sources.BUILTIN
    tokenizer: str = "train:4096"
    separator: str | None = None
    column: str | None = None
    end_of_text: bool = True
    heldout: float = 0.05
    heldout_by: Literal["hash", "tail"] = "hash"
    packing: Literal["documents", "windows"] = "documents"
    seq_len: int = 256
    batch_size: int = 16
    epochs: float | None = None
    seed: int = 0
    task: TaskConfig | None = None
    special: bool = False

    def __post_init__(self) -> None:
        check_types(self, "data.")
        parse_uri(self.uri)
        check_heldout(self.heldout, self.heldout_by)
        for name in ("seq_len", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} leaves no tokens; use 1 or more")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"data.epochs={self.epochs:g} allows no step; use a positive number, or none for no limit")
        if self.task is not None and self.packing != "documents":
            raise ValueError(
                f"a task needs whole documents, and data.packing={self.packing} cuts them; use data.packing=documents"
            )
        if self.task is not None and self.task.kind == "translate" and not self.end_of_text:
            raise ValueError("data.task.kind=translate must learn where an answer ends; set data.end_of_text=true")

    @property
    def sources(self) -> tuple[Source, ...]:
        """The sources that `uri` names: one, or those of a mixture."""
        return parse_uri(self.uri)

    def ask(self, prompt: str) -> str:
        """Return `prompt` as a document begins: as the question of the task, if there is one."""
        return prompt if self.task is None else self.task.ask(prompt)


def parse_uri(uri: str) -> tuple[Source, ...]:
    """Return the sources that `uri` names, by the grammar above.

    Raise `ValueError` for a mixture with a weight that is missing or not a positive decimal, or with an address that
    is empty or occurs twice.
    """
    ends = list(NUMBER.finditer(uri))
    if not any(end[2] for end in ends):
        return (Source(uri, _last_name(uri), "1", Fraction(1)),)
    starts = [0, *(end.end() for end in ends)]
    if (rest := uri[starts[-1] :]) or ends[-1][2]:
        raise ValueError(
            f"data.uri={uri}: every source of a mixture has a weight, and the last one has none; write "
            f"{rest or 'ADDRESS'}:1, leave it out, or write ? for a comma that belongs to an address"
        )
    addresses = [uri[start : end.start()] for start, end in zip(starts, ends, strict=False)]
    weights = [end[1] for end in ends]
    for address, count in Counter(addresses).items():
        if not address or count > 1:
            what = f"names {address} {count} times" if address else "has a weight without an address"
            raise ValueError(f"data.uri={uri} {what}; a mixture is ADDRESS:WEIGHT,ADDRESS:WEIGHT, each address once")
    shares = list(map(_number, addresses, weights))
    shares = [share / sum(shares) for share in shares]
    return tuple(map(Source, addresses, _names(addresses), weights, shares))


def format_uri(addresses: Sequence[str], sources: Sequence[Source]) -> str:
    """Return the `uri` of `sources` with other addresses, such as absolute ones, in the same order."""
    if len(sources) == 1:
        return addresses[0]
    return ",".join(f"{address}:{source.weight}" for address, source in zip(addresses, sources, strict=True))


def _number(address: str, weight: str) -> Fraction:
    if not WEIGHT.fullmatch(weight) or not Fraction(weight):
        raise ValueError(
            f"data.uri: {address} has the weight {weight}, expected a positive decimal such as 0.7 or 3; give it one, "
            "or leave the source out"
        )
    return Fraction(weight)


def _names(addresses: list[str]) -> list[str]:
    """Return the last component of each address, which relative and absolute paths share; numbered if two are equal."""
    last = [_last_name(address) for address in addresses]
    if len(set(last)) == len(last):
        return last
    return [f"{name}#{number}" for number, name in enumerate(last, start=1)]


def _last_name(address: str) -> str:
    return re.split(r"[/\\]", address.rstrip("/\\"))[-1] or address


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; {nearest(value, choices)}")


def check_heldout(heldout: float, heldout_by: str) -> None:
    """Raise `ValueError` unless `heldout` is a fraction and `heldout_by` a known way to choose it."""
    check_choice("data.heldout_by", heldout_by, ("hash", "tail"))
    if not 0 <= heldout < 1:
        raise ValueError(f"data.heldout={heldout:g} is not a fraction of the documents; use 0.05, or 0 for none")
