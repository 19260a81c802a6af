"""Evaluate a model on held-out text: loss, perplexity, bits per byte, accuracy, and their confidence intervals."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int

from llm_jax.data.loader import Batch
from llm_jax.data.shards import TokenStore
from llm_jax.data.task import TaskConfig
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.ops.loss import IGNORE
from llm_jax.train.step import Scored

RESAMPLES = 1000
SAID = {
    "heldout_loss": "held-out loss {:.4f}",
    "bits_per_byte": "{:.4f} bits per byte",
    "heldout_accuracy": "{:.2%} right",
}


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over all scored tokens, with 95 % intervals from a bootstrap over documents.

    `loss` is in nats a token. `bits_per_byte` counts the UTF-8 bytes of the scored text, as `text_bytes` defines them,
    so that models with different tokenizers compare; it is None where no target has bytes, as with classes. One
    document says nothing of others: where a source has only one, the intervals are None.

    `accuracy`, of a task, is the share of documents in which every target is the likeliest. For an answer in tokens
    this is exact match with what the model generates at temperature 0: as long as its tokens are right, it reads the
    same context as here, and the likeliest token is the same.

    For a mixture `loss` is the mean over its sources weighted by their shares of the rows, which is what training
    minimizes, and the other ratios are those of a text with tokens of each source in these shares; `sources` has each
    source by itself. A source without scored tokens is left out. Tokens, bytes and documents are those scored.
    """

    loss: float
    loss_interval: tuple[float, float] | None
    perplexity: float
    bits_per_byte: float | None
    bits_per_byte_interval: tuple[float, float] | None
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    tokens: int
    bytes: int
    documents: int
    sources: Mapping[str, "Evaluation"] = dataclasses.field(default_factory=dict)

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the perplexity, which is that of the loss."""
        if self.loss_interval is None:
            return None
        low, high = (math.exp(min(loss, 700)) for loss in self.loss_interval)
        return low, high

    def __str__(self) -> str:
        """Return it as a table, a line a number, with the loss of each source of a mixture by itself."""
        lines = []
        for name, digits in (("loss", 4), ("perplexity", 2), ("bits_per_byte", 4), ("accuracy", 4)):
            if (number := getattr(self, name)) is not None:
                value, *ends = (f"{x:.{digits}f}" for x in (number, *(getattr(self, f"{name}_interval") or ())))
                lines.append(f"{name.replace('_', ' '):14} {value:>9}   {' to '.join(ends) or '-'}")
        for name, source in self.sources.items():
            bits = "" if source.bits_per_byte is None else f", {source.bits_per_byte:.4f} bits per byte"
            lines.append(f"  {name}: loss {source.loss:.4f}{bits}")
        counts = {"tokens": self.tokens, "bytes": self.bytes, "documents": self.documents}
        return "\n".join([*lines, "on " + ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)])

    def said(self) -> str:
        """Return it as a line, for a mixture with the held-out loss of each source."""
        numbers = self.numbers()
        whole = [text.format(numbers[name]) for name, text in SAID.items() if name in numbers]
        return "  ".join([*whole, *(f"{name} {source.loss:.4f}" for name, source in self.sources.items())])

    def numbers(self) -> dict[str, float]:
        """Return the numbers that a run logs; that of a source is `heldout_loss/NAME`."""
        found = {"heldout_loss": self.loss, "bits_per_byte": self.bits_per_byte, "heldout_accuracy": self.accuracy}
        numbers = {name: number for name, number in found.items() if number is not None}
        for source, result in self.sources.items():
            numbers |= {f"{name}/{source}": number for name, number in result.numbers().items()}
        return numbers


@functools.lru_cache(maxsize=2)  # every evaluation asks
def target_lengths(tokenizer: Tokenizer, task: TaskConfig | None = None) -> Int[np.ndarray, " V"]:
    """Return the bytes that each possible target spells: every token id, 0 for end-of-text; 0 for each class."""
    if task is not None and task.kind == "classify":
        return np.zeros(len(task.answers), np.int64)
    lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    lengths[tokenizer.end_of_text] = 0
    return lengths


def evaluate(
    score: Callable[[Batch], Scored], batches: Iterable[Batch], store: TokenStore, task: TaskConfig | None = None
) -> Evaluation:
    """Score every target of `batches`, whose documents are those of `store`. Raise `ValueError` if there is none."""
    lengths = target_lengths(store.tokenizer, task)
    sums = np.zeros((store.n_documents, 4))  # a row a document: nats, tokens, bytes, targets that are the likeliest
    for batch in batches:
        counted = batch.targets != IGNORE
        documents, targets = batch.documents[counted], batch.targets[counted]
        scored = score(batch)
        columns = scored.nll[counted], np.ones(len(targets)), lengths[targets], scored.likeliest[counted]
        np.add.at(sums, documents, np.stack(columns, 1))
    seen = np.flatnonzero(sums[:, 1])
    if not len(seen):
        raise ValueError("nothing to evaluate: not one held-out token; prepare the data with heldout above 0")
    if lengths.any():
        sums[seen, 2] = text_bytes(store, seen, sums[seen, 1], sums[seen, 2])
    found = [(part, sums[part.documents]) for part in store.sources]
    found = [(part, own[own[:, 1] > 0]) for part, own in found if own[:, 1].any()]
    result = _summary([own for _, own in found], [float(part.share) for part, _ in found], task is not None)
    if len(store.sources) == 1:
        return result
    return dataclasses.replace(
        result, sources={part.name: _summary([own], [1.0], task is not None) for part, own in found}
    )


def text_bytes(
    store: TokenStore,
    documents: Int[np.ndarray, " n"],
    tokens: Float[np.ndarray, " n"],
    spelled: Float[np.ndarray, " n"],
) -> Float[np.ndarray, " n"]:
    """Return the scored UTF-8 bytes of each of `documents`: `tokens` of its tokens, which spell `spelled` bytes.

    A document of which every token was scored has the bytes of its own text, whatever its tokens spell: a tokenizer may
    add a blank, lowercase the text, or lack a character. One that was scored in part (an answer; the rows of a long
    document that were reached; all but the first token) has the share of its bytes that the scored tokens spell of
    what all of its tokens spell: exact where tokens spell the text itself, as ours do. Where they spell nothing at all,
    each token has an equal share. End-of-text spells nothing.
    """
    sizes = store.document_bytes[documents].astype(np.float64)
    whole = store.offsets[documents + 1] - store.offsets[documents]
    for i in np.flatnonzero(tokens < whole).tolist():
        total = spelled_by_all(store, int(documents[i]))
        scored, of = (int(spelled[i]), total) if total else (int(tokens[i]), int(whole[i]))
        sizes[i] = int(sizes[i]) * scored / of  # in integers: a whole quotient is exact
    return sizes


@functools.lru_cache(maxsize=1 << 16)  # the next evaluation splits the same documents
def spelled_by_all(store: TokenStore, document: int) -> int:
    """Return how many bytes all tokens of `document` spell."""
    lengths = target_lengths(store.tokenizer)
    return sum(int(lengths[tokens].sum()) for tokens in store.read_document(document))


Sums = Sequence[Float[np.ndarray, "_ 4"]]  # an array a source, a row a document


def _summary(sums: Sums, shares: Sequence[float], asked: bool) -> Evaluation:
    loss, bits, accuracy = _ratios(sums, shares)
    written, drawn = any(own[:, 2].any() for own in sums), min(map(len, sums)) > 1
    bounds = np.quantile(resampled(sums, shares), (0.025, 0.975), axis=0).T.tolist() if drawn else []
    intervals = [(low, high) for low, high in bounds] or [None] * 3
    return Evaluation(
        loss=loss,
        loss_interval=intervals[0],
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=bits if written else None,
        bits_per_byte_interval=intervals[1] if written else None,
        accuracy=accuracy if asked else None,
        accuracy_interval=intervals[2] if asked else None,
        tokens=round(sum(own[:, 1].sum() for own in sums)),
        bytes=round(sum(own[:, 2].sum() for own in sums)),
        documents=sum(map(len, sums)),
    )


def resampled(sums: Sums, shares: Sequence[float]) -> Float[np.ndarray, "resamples 3"]:
    """Return the ratios of `RESAMPLES` bootstrap samples of the documents of each source (Efron 1979)."""
    random = np.random.default_rng(0)

    def drawn() -> Sums:
        return [own[random.integers(len(own), size=len(own))] for own in sums]

    return np.array([_ratios(drawn(), shares) for _ in range(RESAMPLES)])


def _ratios(sums: Sums, shares: Sequence[float]) -> tuple[float, float, float]:
    """Return nats a token, bits a byte, and the share of documents whose targets are all right.

    The sums of each source are scaled, those of the first by 1, so that their tokens have the `shares`.
    """
    totals = [own.sum(0) for own in sums]
    rates = [share / total[1] for share, total in zip(shares, totals, strict=True)]
    scaled = [rate / rates[0] * total for rate, total in zip(rates, totals, strict=True)]
    nats, tokens, size, _ = np.sum(scaled, axis=0).tolist()
    right = sum(share * (own[:, 3] == own[:, 1]).mean().item() for share, own in zip(shares, sums, strict=True))
    return nats / tokens, nats / math.log(2) / max(size, 1), right / sum(shares)
