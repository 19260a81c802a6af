"""How well a model predicts held-out text: loss, perplexity, bits per byte, and how sure of it we are."""

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
from jaxtyping import Float

from llm_jax.data.loader import Batch
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.ops.loss import IGNORE

RESAMPLES = 1000


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Means over all scored tokens, with 95 % intervals from a bootstrap over documents.

    `loss` is in nats a token. `bits_per_byte` counts the UTF-8 bytes of the scored text, so that models with
    different tokenizers compare; the end-of-text token is scored and has no bytes.
    """

    loss: float
    loss_interval: tuple[float, float]
    perplexity: float
    bits_per_byte: float
    bits_per_byte_interval: tuple[float, float]
    tokens: int
    bytes: int
    documents: int


def token_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of every token id, [V]; 0 for special tokens."""
    lengths = np.array([len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)])
    lengths[tokenizer.end_of_text] = 0
    return lengths


def evaluate(
    score: Callable[[Batch], Float[np.ndarray, "B L"]], batches: Iterable[Batch], lengths: np.ndarray
) -> Evaluation:
    """Scores every target of `batches`; `lengths` are `token_lengths`. Raises `ValueError` without a single target."""
    sums: dict[int, np.ndarray] = {}  # document -> nats, tokens, bytes
    for batch in batches:
        nll = score(batch)
        counted = batch.targets != IGNORE
        rows = np.stack([nll[counted], np.ones(counted.sum()), lengths[batch.targets[counted]]], axis=1)
        documents, inverse = np.unique(batch.documents[counted], return_inverse=True)
        for column, document in enumerate(documents.tolist()):
            sums[document] = sums.get(document, np.zeros(3)) + rows[inverse == column].sum(0)
    if not sums:
        raise ValueError("nothing to evaluate: no held-out document; prepare the data with heldout above 0")
    return _summary(np.stack(list(sums.values())))


def _summary(sums: np.ndarray) -> Evaluation:
    """From (nats, tokens, bytes) of each document to means and intervals."""

    def ratios(totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return totals[..., 0] / totals[..., 1], totals[..., 0] / math.log(2) / np.maximum(totals[..., 2], 1)

    random = np.random.default_rng(0)
    weights = random.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=RESAMPLES)
    low, high = (np.quantile(np.stack(ratios(weights @ sums)), q, axis=1) for q in (0.025, 0.975))
    loss, bits = (float(x) for x in ratios(sums.sum(0)))
    return Evaluation(
        loss=loss,
        loss_interval=(float(low[0]), float(high[0])),
        perplexity=math.exp(min(loss, 700)),
        bits_per_byte=bits,
        bits_per_byte_interval=(float(low[1]), float(high[1])),
        tokens=int(sums[:, 1].sum()),
        bytes=int(sums[:, 2].sum()),
        documents=len(sums),
    )
