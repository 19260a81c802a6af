"""Evaluation: exact means of what was scored, and intervals that behave as a bootstrap's should."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_jax.data import tokenizer
from llm_jax.data.loader import IGNORE, Batch
from llm_jax.data.shards import TokenStore
from llm_jax.data.task import TaskConfig
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.runs.evaluate import Evaluation, _summary, evaluate, resampled, target_lengths
from llm_jax.train.step import Scored


class Spelling(Tokenizer):
    """Four tokens, of which three spell one, two and three bytes of the text, and the last ends it."""

    def __init__(self) -> None:
        super().__init__("spelling", [b"a", b"bb", b"ccc", b"end"], 3)

    def _encode_text(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def _description(self) -> dict:
        return {}


SPELLING = Spelling()
LENGTHS = target_lengths(SPELLING)

# A document is a list of (nats, token), at least one.
documents = st.lists(
    st.lists(st.tuples(st.floats(0, 20, width=32), st.integers(0, 3)), min_size=1, max_size=6),
    min_size=1,
    max_size=12,
)
Documents = Sequence[Sequence[tuple[float, int]]]


def batch_of(scored: Sequence[tuple[int, float, int]], padding: int = 0) -> tuple[Batch, Scored]:
    """One row of (document, nats, token), and its scores; positions without a target score nonsense.

    As if of four tokens: one of less than log 2 nats is the likeliest for certain.
    """
    ignored = [(IGNORE, 99.0, IGNORE)] * padding
    of, nats, targets = (np.array([column]) for column in zip(*scored, *ignored, strict=True))
    return Batch(targets, targets, documents=of), Scored(nats.astype(np.float32), nats < math.log(2))


def store_of(corpus: Documents) -> TokenStore:
    """`corpus` as prepared text, in which every token spells what stands there."""
    tokens = [np.array([token for _, token in document], np.uint16) for document in corpus]
    offsets = np.cumsum([0, *map(len, tokens)])
    return TokenStore(SPELLING, tokens, offsets, np.array([LENGTHS[own].sum() for own in tokens], np.int64), [])


def evaluated(corpus: Documents, rows: int = 3, padding: int = 2, task: TaskConfig | None = None) -> Evaluation:
    """`corpus` scored over batches of `rows` tokens, so that documents are cut by batches."""
    tokens = [(n, nats, token) for n, document in enumerate(corpus) for nats, token in document]
    batches = [batch_of(tokens[i : i + rows], padding) for i in range(0, len(tokens), rows)]
    scores = {id(batch): scored for batch, scored in batches}
    return evaluate(lambda batch: scores[id(batch)], [batch for batch, _ in batches], store_of(corpus), task)


@settings(max_examples=25)
@given(documents)
@example([[(1.0, 3)]])  # a token without bytes
def test_means_are_over_all_tokens_and_bytes_whatever_the_batches(corpus: Documents):
    result = evaluated(corpus)
    nats = [pair[0] for document in corpus for pair in document]
    size = sum(int(LENGTHS[pair[1]]) for document in corpus for pair in document)
    assert result.tokens == len(nats)
    assert result.bytes == size
    assert result.documents == len(corpus)
    np.testing.assert_allclose(result.loss, math.fsum(nats) / len(nats), rtol=1e-6)
    assert (result.bits_per_byte is None) == (size == 0)
    assert (result.bits_per_byte_interval is None) == (size == 0 or len(corpus) == 1)
    if result.bits_per_byte is not None:
        np.testing.assert_allclose(result.bits_per_byte, math.fsum(nats) / math.log(2) / size, rtol=1e-6)
    np.testing.assert_allclose(result.perplexity, math.exp(result.loss))


@settings(max_examples=25)
@given(documents)
def test_an_answer_is_right_if_each_of_its_tokens_is_the_likeliest(corpus: Documents):
    assert evaluated(corpus).accuracy is None
    result = evaluated(corpus, task=TaskConfig("translate"))
    assert result.accuracy is not None
    right = [all(nats < math.log(2) for nats, _ in document) for document in corpus]
    np.testing.assert_allclose(result.accuracy, np.mean(right))
    low, high = result.accuracy_interval or (result.accuracy, result.accuracy)
    assert 0 <= low <= result.accuracy <= high <= 1


@settings(max_examples=25)
@given(documents)
def test_an_interval_lies_within_the_best_and_the_worst_document(corpus: Documents):
    means = [np.mean([nats for nats, _ in document]) for document in corpus]
    low, high = evaluated(corpus).loss_interval or (means[0], means[0])
    assert min(means) - 1e-5 <= low <= high <= max(means) + 1e-5


@settings(max_examples=25)
@given(documents)
def test_documents_of_one_loss_leave_no_doubt(corpus: Documents):
    result = evaluated([[(2.5, token) for _, token in document] for document in [*corpus, *corpus]])
    np.testing.assert_allclose(result.loss_interval or (), (2.5, 2.5), rtol=1e-12)


def test_one_document_says_nothing_of_others():
    result = evaluated([[(2.5, 1), (1.0, 2)]], task=TaskConfig("translate"))
    assert (result.loss_interval, result.bits_per_byte_interval, result.accuracy_interval) == (None, None, None)
    result = _summary([np.ones((5, 4)), np.ones((1, 4))], [0.5, 0.5], False)  # of the second source
    assert (result.loss, result.documents, result.loss_interval) == (1.0, 6, None)


@settings(max_examples=25)
@given(documents, st.randoms(use_true_random=False))
def test_the_order_of_documents_changes_no_mean(corpus: Documents, random):
    shuffled = random.sample(corpus, len(corpus))
    np.testing.assert_allclose(evaluated(shuffled).loss, evaluated(corpus).loss, rtol=1e-9)


def test_the_same_scores_give_the_same_interval():
    corpus = [[(float(n), 1)] for n in range(20)]
    assert evaluated(corpus) == evaluated(corpus)


def test_the_interval_is_that_of_the_mean_of_documents():
    """For documents of equal length the bootstrap's spread is the standard error, s / sqrt(n)."""
    draw = np.random.default_rng(1)
    nats = draw.normal(3, 0.5, size=400)
    sums = np.stack([nats, np.ones(400), np.ones(400), np.ones(400)], axis=1)
    spread = resampled([sums], [1.0])[:, 0].std()
    np.testing.assert_allclose(spread, nats.std() / math.sqrt(400), rtol=0.1)  # 1000 draws: 2 % standard error


def test_four_times_the_documents_halve_the_interval():
    draw = np.random.default_rng(2)
    losses = draw.normal(3, 0.5, size=1600).tolist()

    def width(n: int) -> float:
        low, high = evaluated([[(loss, 1)] for loss in losses[:n]], rows=1600).loss_interval or (0.0, 0.0)
        return high - low

    np.testing.assert_allclose(width(400) / width(1600), 2, rtol=0.15)


def test_a_long_document_counts_as_one_however_many_tokens_it_has():
    """Tokens of a document are no independent draws: one document of 1000 tokens is one observation."""
    assert evaluated([[(1.0, 1)] * 100, [(3.0, 1)] * 100], rows=400).loss_interval == (1.0, 3.0)


def test_nothing_to_score_is_an_error():
    batch, scored = batch_of([], padding=1)
    with pytest.raises(ValueError, match="not one held-out token"):
        evaluate(lambda batch: scored, [batch], store_of([[(1.0, 0)]]))
    with pytest.raises(ValueError, match="not one held-out token"):
        evaluate(lambda batch: scored, [], store_of([[(1.0, 0)]]))


def test_lengths_add_up_to_the_bytes_of_the_text_and_end_of_text_has_none():
    byte = tokenizer.build("byte", list)
    lengths = target_lengths(byte)
    text = "naïve ☃"
    assert lengths[byte.encode(text)].sum() == len(text.encode())
    assert lengths[byte.end_of_text] == 0
