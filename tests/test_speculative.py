"""Whatever a draft proposes, what comes out has the model's distribution: enumerated, not sampled."""

import itertools

import jax
import numpy as np
import pytest

from llm_jax.ops.speculative import acceptance, look_up, remainder, verify

V, G = 3, 2


def tables(seed: int, zeros: bool) -> np.ndarray:
    """A distribution over V for every text of 0, 1 and 2 tokens: [3 lengths, V, V, V]."""
    raw = np.random.default_rng(seed).gamma(0.5, size=(G + 1, V, V, V))
    if zeros:  # as after filters
        raw[..., 0] *= np.random.default_rng(seed + 1).integers(0, 2, raw.shape[:-1])
    return raw / raw.sum(-1, keepdims=True)


def after(table: np.ndarray, text: tuple[int, ...]) -> np.ndarray:
    a, b = (*text, 0, 0)[:2]
    return table[len(text), a, b]


@pytest.mark.parametrize("draft", ["model", "filtered", "lookup"])
def test_the_law_of_three_tokens_is_the_models_whatever_the_draft(draft: str):
    p = tables(0, zeros=draft == "filtered")
    q = np.eye(V)[np.full(p.shape[:-1], 1)] if draft == "lookup" else tables(7, zeros=draft == "filtered")
    law = np.zeros((V,) * (G + 1))
    keep = jax.jit(lambda p, q, token: acceptance(p, q, token))
    rest = jax.jit(remainder)
    for drafted in itertools.product(range(V), repeat=G):
        proposed = np.prod([after(q, drafted[:i])[drafted[i]] for i in range(G)])
        if proposed == 0:
            continue
        reach = proposed  # the probability that all tokens so far were drafted, and kept
        for i in range(G + 1):
            ours, theirs = after(p, drafted[:i]), after(q, drafted[:i])
            kept = 0.0 if i == G else float(keep(ours, theirs, np.int32(drafted[i])))
            next_token = ours if i == G else np.asarray(rest(ours, theirs))
            for token, share in enumerate(next_token / next_token.sum()):
                text = (*drafted[:i], token)
                left = G + 1 - len(text)  # what the rounds after this one sample, from the model itself
                for more in itertools.product(range(V), repeat=left):
                    full = (*text, *more)
                    then = np.prod([after(p, full[:j])[full[j]] for j in range(len(text), G + 1)])
                    law[full] += reach * (1 - kept) * share * then
            reach *= kept
    expected = np.zeros_like(law)
    for text in itertools.product(range(V), repeat=G + 1):
        expected[text] = np.prod([after(p, text[:i])[text[i]] for i in range(G + 1)])
    np.testing.assert_allclose(law, expected, atol=2e-7)


def test_verdicts_fall_as_often_as_their_probabilities_say():
    n, p, q = 20_000, np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]), np.array([[0.2, 0.7, 0.1]])
    drafted = np.random.default_rng(0).choice(V, size=(n, 1), p=q[0])
    keys = jax.random.split(jax.random.key(0), (n, 2))
    ps, qs = np.tile(p, (n, 1, 1)).astype(np.float32), np.tile(q, (n, 1, 1)).astype(np.float32)
    verdict = jax.jit(verify)(ps, qs, drafted, keys)
    kept = np.asarray(verdict.kept) == 1
    assert abs(kept.mean() - np.minimum(p[0], q[0]).sum()) < 4 * np.sqrt(0.25 / n)
    first = np.where(kept, drafted[:, 0], verdict.token)
    found = np.bincount(first, minlength=V) / n
    assert (np.abs(found - p[0]) < 4 * np.sqrt(p[0] * (1 - p[0]) / n)).all()
    second = np.bincount(np.asarray(verdict.token)[kept], minlength=V) / kept.sum()
    assert (np.abs(second - p[1]) < 4 * np.sqrt(0.25 / kept.sum())).all()


def test_a_draft_that_is_the_model_is_always_kept():
    p = np.full((50, 3, 4), 0.25, np.float32)
    drafted = np.random.default_rng(0).integers(0, 4, (50, 2))
    verdict = jax.jit(verify)(p, p[:, :2], drafted, jax.random.split(jax.random.key(0), (50, 3)))
    assert (np.asarray(verdict.kept) == 2).all()


def followed(text: list[int], number: int = 4) -> list[int]:
    row = np.zeros((1, 12), np.int32)
    row[0, : len(text)] = text
    return np.asarray(jax.jit(look_up, static_argnums=2)(row, np.array([len(text)]), number))[0].tolist()


def test_lookup_drafts_what_followed_the_latest_of_the_longest_matches():
    assert followed([1, 2, 3, 4, 5, 6, 1, 2, 3])[:3] == [4, 5, 6]
    assert followed([7, 2, 8, 9, 2, 5, 6, 2])[:2] == [5, 6]  # the latest 2
    assert followed([7, 2, 8, 9, 2, 5, 7, 2])[:2] == [8, 9]  # 7 2 is longer than 2
    assert followed([0, 0, 0, 4]) == followed([0, 0, 0, 4])  # no match: anything
    assert followed([5, 1, 2, 1, 2]) == [1, 2, 1, 2]  # it repeats itself
