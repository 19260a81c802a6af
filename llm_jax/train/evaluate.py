"""How well a model predicts held-out text: loss, perplexity, bits per byte, accuracy, and how sure of it we are."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Int

from llm_jax.data.loader import Batch
from llm_jax.data.task import TaskConfig
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.ops.loss import IGNORE
from llm_jax.train.step import Scored

RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over all scored tokens, with 95 % intervals from a bootstrap over documents.

    `loss` is in nats a token. `bits_per_byte` counts the UTF-8 bytes of the scored text, so that models with
    different tokenizers compare; the end-of-text token is scored and has no bytes, nor has a class: where no target has
    any, it is None. What was measured on one document says nothing of others: its intervals are points.

    `accuracy`, of a task, is the share of documents of which every target is the likeliest. For an answer in tokens
    this is exact match with what the model writes at temperature 0: as long as it has written what it should have, it
    has read what it reads here, and writes next what is the likeliest here.
    """

    loss: float
    loss_interval: tuple[float, float]
    perplexity: float
    bits_per_byte: float | None
    bits_per_byte_interval: tuple[float, float] | None
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None
    tokens: int
    bytes: int
    documents: int

    def numbers(self) -> dict[str, float]:
        """What a run logs of it."""
        found = {"heldout_loss": self.loss, "bits_per_byte": self.bits_per_byte, "heldout_accuracy": self.accuracy}
        return {name: number for name, number in found.items() if number is not None}


def target_lengths(tokenizer: Tokenizer, task: TaskConfig | None = None) -> Int[np.ndarray, " V"]:
    """Bytes of whatever can be a target: of every token id, 0 for end-of-text; of the classes of a task, 0 each."""
    if task is not None and task.kind == "classify":
        return np.zeros(len(task.answers), np.int64)
    lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    lengths[tokenizer.end_of_text] = 0
    return lengths


def evaluate(
    score: Callable[[Batch], Scored],
    batches: Iterable[Batch],
    lengths: Int[np.ndarray, " V"],
    task: TaskConfig | None = None,
) -> Evaluation:
    """Scores every target of `batches`; `lengths` are `target_lengths`. Raises `ValueError` if there is none."""
    sums = np.zeros((0, 4))  # of nats, tokens, bytes and targets that are the likeliest, by document
    for batch in batches:
        counted = batch.targets != IGNORE
        documents, targets = batch.documents[counted], batch.targets[counted]
        new = max(documents.max(initial=-1) + 1 - len(sums), 0)
        sums = np.pad(sums, ((0, new), (0, 0)))
        scored = score(batch)
        columns = scored.nll[counted], np.ones(len(targets)), lengths[targets], scored.likeliest[counted]
        np.add.at(sums, documents, np.stack(columns, 1))
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        raise ValueError("nothing to evaluate: not one held-out token; prepare the data with heldout above 0")
    return _summary(sums, task is not None)


def _summary(sums: Float[np.ndarray, "n 4"], asked: bool) -> Evaluation:
    low, high = np.quantile(resampled(sums), (0.025, 0.975), axis=0).tolist()
    loss, bits, accuracy = _ratios(sums)
    written = bool(sums[:, 2].any())
    return Evaluation(
        loss=loss,
        loss_interval=(low[0], high[0]),
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=bits if written else None,
        bits_per_byte_interval=(low[1], high[1]) if written else None,
        accuracy=accuracy if asked else None,
        accuracy_interval=(low[2], high[2]) if asked else None,
        tokens=int(sums[:, 1].sum()),
        bytes=int(sums[:, 2].sum()),
        documents=len(sums),
    )


def resampled(sums: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, "resamples 3"]:
    """The ratios of `RESAMPLES` corpora, each of n documents drawn with replacement (Efron 1979)."""
    random = np.random.default_rng(0)
    return np.array([_ratios(sums[random.integers(len(sums), size=len(sums))]) for _ in range(RESAMPLES)])


def _ratios(sums: Float[np.ndarray, "n 4"]) -> tuple[float, float, float]:
    """Nats a token, bits a byte, and the share of documents that are right throughout."""
    nats, tokens, size, _ = sums.sum(0).tolist()
    right = (sums[:, 3] == sums[:, 1]).mean().item()
    return nats / tokens, nats / math.log(2) / max(size, 1), right
