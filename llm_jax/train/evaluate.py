"""How well a model predicts held-out text: loss, perplexity, bits per byte, and how sure of it we are."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float, Int

from llm_jax.data.loader import Batch
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.ops.loss import IGNORE

RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over all scored tokens, with 95 % intervals from a bootstrap over documents.

    `loss` is in nats a token. `bits_per_byte` counts the UTF-8 bytes of the scored text, so that models with
    different tokenizers compare; the end-of-text token is scored and has no bytes. What was measured on one document
    says nothing of others: its intervals are points.
    """

    loss: float
    loss_interval: tuple[float, float]
    perplexity: float
    bits_per_byte: float
    bits_per_byte_interval: tuple[float, float]
    tokens: int
    bytes: int
    documents: int


def token_lengths(tokenizer: Tokenizer) -> Int[np.ndarray, " V"]:
    """Bytes of every token id; 0 for the end-of-text token."""
    lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    lengths[tokenizer.end_of_text] = 0
    return lengths


def evaluate(
    score: Callable[[Batch], Float[np.ndarray, "B L"]],
    batches: Iterable[Batch],
    lengths: Int[np.ndarray, " V"],
) -> Evaluation:
    """Scores every target of `batches`; `lengths` are `token_lengths`. Raises `ValueError` if there is none."""
    sums = np.zeros((0, 3))  # of nats, tokens and bytes, by document
    for batch in batches:
        counted = batch.targets != IGNORE
        documents, targets = batch.documents[counted], batch.targets[counted]
        new = max(documents.max(initial=-1) + 1 - len(sums), 0)
        sums = np.pad(sums, ((0, new), (0, 0)))
        np.add.at(sums, documents, np.stack([score(batch)[counted], np.ones(len(targets)), lengths[targets]], 1))
    sums = sums[sums[:, 1] > 0]
    if not len(sums):
        raise ValueError("nothing to evaluate: not one held-out token; prepare the data with heldout above 0")
    return _summary(sums)


def _summary(sums: Float[np.ndarray, "n 3"]) -> Evaluation:
    low, high = np.quantile(resampled(sums), (0.025, 0.975), axis=0)
    loss, bits = _ratios(sums.sum(0))
    return Evaluation(
        loss=float(loss),
        loss_interval=(float(low[0]), float(high[0])),
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=float(bits),
        bits_per_byte_interval=(float(low[1]), float(high[1])),
        tokens=int(sums[:, 1].sum()),
        bytes=int(sums[:, 2].sum()),
        documents=len(sums),
    )


def resampled(sums: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "resamples 2"]:
    """Loss and bits per byte of `RESAMPLES` corpora, each of n documents drawn with replacement (Efron 1979)."""
    random = np.random.default_rng(0)
    return np.array([_ratios(sums[random.integers(len(sums), size=len(sums))].sum(0)) for _ in range(RESAMPLES)])


def _ratios(totals: Float[np.ndarray, "3"]) -> tuple[float, float]:
    """Nats a token, bits a byte."""
    nats, tokens, size = totals.tolist()
    return nats / tokens, nats / math.log(2) / max(size, 1)
