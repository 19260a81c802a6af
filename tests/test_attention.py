"""One function chooses who attends, and says why others declined. Values: `test_conformance.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llm_jax.ops.attention
import llm_jax.ops.fast_attention
from llm_jax.ops.attention import IMPLEMENTATIONS, LONG, Declined, Dropout, attention, candidates, heard
from llm_jax.ops.mask import Mask

SHORT = 9


def test_an_implementation_that_declines_says_why():
    q = jnp.ones((1, SHORT, 2, 3, 8))
    with pytest.raises(Declined, match=f"flash takes a multiple of 128 tokens, got {SHORT}"):
        attention(q, q[:, :, :, 0], q[:, :, :, 0], Mask(), implementation="flash")


@pytest.mark.parametrize("backend", ["cpu", "tpu", "gpu", "another"])
def test_it_is_said_once_who_attends_and_why_others_declined(backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm_jax.ops.attention, "platform", lambda: backend)
    monkeypatch.setattr(llm_jax.ops.fast_attention, "platform", lambda: backend)
    q, k = (jax.ShapeDtypeStruct((1, 8200, *heads, 8), jnp.float32) for heads in ((2, 1), (2,)))
    said = []
    with heard(said.append):
        for _ in range(2):
            jax.eval_shape(lambda q, k, v: attention(q, k, v, Mask(window=99, sinks=4)), q, k, k)
    reason = {"tpu": "; flash takes a multiple of 128 tokens, got 8200", "gpu": "; cudnn has no sinks"}.get(backend, "")
    assert said == [f"attention over 8,200 tokens: chunked{reason}"]


@pytest.mark.parametrize("backend", ["cpu", "tpu", "gpu", "another"])
@pytest.mark.parametrize("L", [LONG, LONG + 1, 8200])
def test_long_rows_never_hold_all_their_scores(L: int, backend: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(llm_jax.ops.attention, "platform", lambda: backend)
    assert candidates(L)[-1] == "chunked"  # which declines nothing
    assert candidates(LONG - 1)[-1] == "reference"


@pytest.mark.parametrize("name", ["reference", "chunked"])
def test_dropout_zeroes_its_share_of_the_pattern_and_scales_the_rest(name: str):
    """Where all scores are alike and values identify keys, the output is the pattern."""
    S, rate = 256, 0.25
    q, k, v = jnp.zeros((1, S, 1, 2, S)), jnp.zeros((1, S, 1, S)), jnp.eye(S)[None, :, None]
    drop = Dropout(jax.random.key(0), rate)
    found = attention(q, k, v, Mask(causal=False), implementation=name, dropout=drop)[0, :, 0]
    dropped = np.asarray(found) == 0
    np.testing.assert_allclose(found, np.where(dropped, 0, 1 / (S * (1 - rate))), rtol=1e-5)
    np.testing.assert_allclose(dropped.mean((0, 2)), rate, atol=0.01)
    np.testing.assert_allclose(found.sum(-1).mean(), 1, atol=0.01)  # in the mean nothing changes
    blocks = [dropped[:128, 0], dropped[128:, 0], dropped[:128, 1]]
    assert len({block.tobytes() for block in blocks}) == 3, "two blocks, or two heads, share their noise"


@pytest.mark.parametrize("name", sorted(IMPLEMENTATIONS.keys() - {"reference", "chunked"}))
def test_what_holds_no_pattern_declines_dropout(name: str):
    q = jnp.zeros((1, 128, 1, 1, 64))
    with pytest.raises(Declined, match=f"{name} never holds the pattern .*; use model.attention.implementation=refer"):
        attention(q, q[:, :, 0], q[:, :, 0], Mask(), implementation=name, dropout=Dropout(jax.random.key(0), 0.1))


def test_an_unknown_implementation_is_answered_with_the_known_ones():
    q = jnp.ones((1, SHORT, 2, 3, 8))
    with pytest.raises(ValueError, match="unknown attention 'flesh'; known: reference, "):
        attention(q, q[:, :, :, 0], q[:, :, :, 0], Mask(), implementation="flesh")


@pytest.mark.parametrize("L", [SHORT, 1024, 1025])
def test_the_default_accepts_every_length(L: int):
    q = jax.ShapeDtypeStruct((2, L, 2, 3, 8), jnp.float32)
    k = v = jax.ShapeDtypeStruct((2, L, 2, 8), jnp.float32)
    assert jax.eval_shape(lambda q, k, v: attention(q, k, v, Mask()), q, k, v).shape == q.shape
