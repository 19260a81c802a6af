"""Text comes out as the full forward pass would have it, whoever else is in the batch, and whole."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jaxtyping import PyTree
from tiny_run import generate, sampler

from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.infer import decode as decode_module
from llm_jax.infer import generate as module
from llm_jax.infer.decode import Request, continuations, decode, prefill, prepare
from llm_jax.infer.generate import Piece, Row, Sampler, row_by_row
from llm_jax.model.cache import init_cache
from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.model.stack import unstack
from llm_jax.model.transformer import Transformer
from llm_jax.ops.experts import Experts
from llm_jax.ops.mask import Sparse
from llm_jax.ops.position import Rotary
from llm_jax.ops.sampling import Sampling, filters

# More ids than the tokenizer has, as in a vocabulary padded to a round number.
CONFIG = ModelConfig(vocab_size=272, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=48)
PROMPTS = ["def f(x):", "a", "import os, sys", ""]
GREEDY = Sampling(temperature=0)
TEXT = ByteTokenizer()


@functools.cache
def weights(config: ModelConfig = CONFIG) -> PyTree:
    """Random weights, away from the initialization, where a tied head mostly repeats what it reads."""
    start = jax.jit(Transformer(config).init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.3 * random.standard_normal(x.shape, np.float32), start)


def written_by(config: ModelConfig, params: PyTree, request: Request) -> np.ndarray:
    """All new tokens of each row."""
    return np.concatenate([np.array(new) for new in continuations(config, prepare(config, params), request)], axis=1)


@functools.cache
def forward() -> Callable:
    return jax.jit(lambda tokens: Transformer(CONFIG).apply({"params": weights()}, tokens).logits)


def full_forward_greedy(prompt: str, max_tokens: int) -> str:
    """The specification: no cache, no batch, the whole text read again for every token."""
    ids = [TEXT.end_of_text, *TEXT.encode(prompt).tolist()]
    start = len(ids)
    for _ in range(max_tokens):
        padded = np.zeros((1, CONFIG.max_seq_len), np.int32)
        padded[0, : len(ids)] = ids
        token = int(forward()(padded)[0, len(ids) - 1, : TEXT.vocab_size].argmax())
        if token == TEXT.end_of_text:
            break
        ids.append(token)
    return TEXT.decode(ids[start:])


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        pytest.param(
            dataclasses.replace(
                CONFIG, n_layers=1, positions="learned", layers=("local",), attention=AttentionConfig(window=4)
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            dataclasses.replace(CONFIG, n_layers=1, positions="sinusoidal", bias="all"), marks=pytest.mark.slow
        ),
    ],
    ids=["rotary", "learned", "sinusoidal"],
)
def test_cached_decode_of_ragged_rows_gives_the_logits_of_the_full_forward(config):
    params, L = weights(config), 12
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (3, L), np.int32)
    full = jax.jit(Transformer(config).apply)({"params": params}, tokens).logits
    unstacked = {"params": unstack(config, params)}
    cached = functools.partial(jax.jit(Transformer(config, stacked=False).apply), unstacked)

    lengths, rows = np.array([1, 7, 4], np.int32), np.arange(3)
    padded = np.where(np.arange(8) < lengths[:, None], tokens[:, :8], 5)
    out = cached(padded, cache=init_cache(config, 3, L))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(out.logits[row, :length], full[row, :length], atol=2e-5)
    cache = out.cache
    while lengths.min() < L:
        at = np.minimum(lengths, L - 1)  # a row that is complete reads its last token again
        out = cached(tokens[rows, at][:, None], cache=cache.replace(length=at))
        np.testing.assert_allclose(out.logits[:, 0], full[rows, at], atol=2e-5)
        cache, lengths = out.cache, lengths + 1


@pytest.mark.smoke
def test_a_greedy_batch_equals_the_full_forward_of_each_prompt_alone():
    together = generate(CONFIG, weights(), TEXT, PROMPTS, sampling=GREEDY, max_tokens=12)
    assert together == [full_forward_greedy(prompt, 12) for prompt in PROMPTS]
    assert len(set(together)) == len(together)  # or the comparison would say little


@pytest.mark.slow
def test_angles_go_by_the_length_a_row_may_reach_whatever_its_neighbours():
    """Up to 8 tokens longrope takes one list, beyond them the other: here 3 + 4 tokens, and 7 + 4."""
    lists = {"short_factors": (1.0, 1.5), "long_factors": (4.0, 9.0)}
    long = Rotary(scaling="longrope", factor=4.0, original_len=8, **lists)
    config = dataclasses.replace(CONFIG, n_layers=1, rotary=long)
    params, keys = weights(config), jax.random.split(jax.random.key(0), 2)
    prompts = [np.arange(5, 8, dtype=np.int32), np.arange(20, 27, dtype=np.int32)]
    written = written_by(config, params, Request(prompts, keys, filters(GREEDY), 4, 272)).T
    for row, (prompt, factors) in enumerate(zip(prompts, lists.values(), strict=True)):
        always = dataclasses.replace(long, short_factors=factors, long_factors=factors)
        model = Transformer(dataclasses.replace(config, rotary=always))
        text = np.concatenate([prompt, written[:, row]])
        logits = model.apply({"params": params}, jnp.asarray(text)[None]).logits[0, len(prompt) - 1 : -1]
        assert (logits.argmax(-1) == written[:, row]).all()


def test_prompts_beyond_one_batch_get_what_they_would_get_in_it(monkeypatch: pytest.MonkeyPatch):
    together = generate(CONFIG, weights(), TEXT, PROMPTS, max_tokens=12)
    monkeypatch.setattr(module, "BATCH", 2)
    assert generate(CONFIG, weights(), TEXT, PROMPTS, max_tokens=12) == together


def test_a_sampled_row_does_not_depend_on_its_neighbours():
    one, other = (generate(CONFIG, weights(), TEXT, ["a", b], max_tokens=12)[0] for b in ("b", "a longer one"))
    assert one == other == generate(CONFIG, weights(), TEXT, ["a"], max_tokens=12)[0]


KINDS: dict[str, dict[str, Any]] = {
    "global": {},
    "global+moe": {"experts": Experts(number=4, d_ff=8)},
    "local": {"attention": AttentionConfig(window=3, sinks=1)},
    "sparse": {"attention": AttentionConfig(sparse=Sparse("strided", block=4))},
    "nope": {},
    "linear": {},
    "delta": {},
    "delta+moe": {"experts": Experts(number=4, d_ff=8, shared=1)},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_greedy_row_is_the_same_alone_and_in_a_ragged_batch(kind: str):
    """Of prompts that fill one and two steps of width, and do so in one batch."""
    config = dataclasses.replace(CONFIG, layers=(kind,), **KINDS[kind])
    prompts = ["def f(x):", "a", "import os, sys, re, math"]
    write = functools.partial(generate, config, weights(config), TEXT, sampling=GREEDY, max_tokens=10)
    assert (together := write(prompts)) == [text for prompt in prompts for text in write([prompt])]
    assert len(set(together)) > 1


def test_what_a_row_draws_depends_on_no_other_row():
    write = functools.partial(generate, CONFIG, weights(), TEXT, max_tokens=12, seed=5)
    assert write(["def f(x):", "a", ""])[0] == write(["def f(x):"])[0] == write(["def f(x):", "import os, sys"])[0]


def test_samples_of_one_prompt_differ_and_come_again_with_the_same_seed():
    options = {"prompts": ["a", "a"], "max_tokens": 12}
    one, other, again = (generate(CONFIG, weights(), TEXT, **options, seed=seed) for seed in (1, 2, 1))
    assert one[0] != one[1]
    assert one != other
    assert one == again


def test_each_row_may_fill_the_context_whatever_the_others_have_used():
    endless = ByteTokenizer()
    endless.end_ids = ()  # no token ends a row
    options = {"sampling": GREEDY, "max_tokens": 99, "begin": False}
    pieces = list(sampler(CONFIG, weights(), endless, dict(options)).stream(["ab", "x" * 40], GREEDY, max_tokens=99))
    texts = ["".join(piece.text for piece in pieces if piece.row == row) for row in (0, 1)]
    assert texts[:1] == generate(CONFIG, weights(), endless, ["ab"], **options)
    assert len(texts[0]) > len(texts[1])
    assert [piece.finish for piece in pieces if piece.finish] == ["length", "length"]


def test_a_token_that_ends_a_text_ends_its_row_and_no_other():
    ids = [TEXT.encode(prompt) for prompt in PROMPTS[:3]]
    keys = jax.random.split(jax.random.key(0), 3)
    written = written_by(CONFIG, weights(), Request(ids, keys, filters(GREEDY), 8, TEXT.vocab_size))
    ender = ByteTokenizer()
    ender.end_ids = (TEXT.end_of_text, int(written[0, 2]))  # what the first row writes third
    texts = generate(CONFIG, weights(), ender, PROMPTS[:3], sampling=GREEDY, max_tokens=8, begin=False)
    until_then = [list(itertools.takewhile(lambda token: token not in ender.end_ids, row)) for row in written]
    assert texts == [TEXT.decode(np.array(tokens)) for tokens in until_then]
    assert len(until_then[0]) <= 2 < max(map(len, until_then))


def test_a_repetition_penalty_counts_all_but_what_begins_a_text():
    end, by = TEXT.end_of_text, filters(Sampling(temperature=0, repetition_penalty=2))
    prompts, keys = [np.array([end, 5, 6, 6]), np.array([end, end, 7])], jax.random.split(jax.random.key(0), 2)
    request, weights_ = Request(prompts, keys, by, 2, TEXT.vocab_size, uncounted=1), prepare(CONFIG, weights())
    state = request.begin(CONFIG, weights_)
    assert [np.flatnonzero(row).tolist() for row in state.seen] == [[5, 6], [7, end]]
    first = np.asarray(state.token)
    state, *_ = decode(CONFIG, TEXT.vocab_size, weights_, by, state, request.end_ids, np.int32(1))
    assert state.seen[np.arange(2), first].all()


def test_weights_that_give_no_numbers_are_named_and_not_written_from():
    broken = weights() | {"embedding": {"table": weights()["embedding"]["table"].at[7].set(jnp.nan)}}
    for sampling in (GREEDY, Sampling()):
        with pytest.raises(ValueError, match=r"logits are not finite: its weights have diverged.*--checkpoint"):
            generate(CONFIG, broken, TEXT, ["a"], sampling=sampling, max_tokens=12)


@pytest.mark.parametrize("token", [-1, 272, 2**31 - 1])
def test_a_prompt_with_an_id_that_the_model_lacks_is_refused(token: int):
    request = Request([np.array([1, token])], jax.random.split(jax.random.key(0), 1), filters(GREEDY), 2, 264)
    with pytest.raises(ValueError, match=rf"token {token} of a prompt is not an id of the model, which has 0 to 271"):
        request.begin(CONFIG, prepare(CONFIG, weights()))


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    table = weights()["embedding"]["table"].at[TEXT.vocab_size :].multiply(100.0)  # else the likeliest by far
    texts = generate(CONFIG, weights() | {"embedding": {"table": table}}, TEXT, PROMPTS, max_tokens=12)
    assert all(texts)


def test_a_row_draws_anew_at_every_position():
    indifferent = jax.tree.map(jnp.zeros_like, weights())
    assert len(set(generate(CONFIG, indifferent, TEXT, ["a"], max_tokens=12)[0])) > 6


def test_prompts_texts_and_temperatures_of_many_sizes_share_two_programs():
    before = prefill._cache_size(), decode._cache_size()
    for length, n, temperature in ((1, 2, 0.5), (5, 9, 1.0), (9, 3, 0.7), (14, 12, 1.5)):
        generate(CONFIG, weights(), TEXT, ["y" * length, "z"], sampling=Sampling(temperature, n), max_tokens=n)
    assert (prefill._cache_size(), decode._cache_size()) == (before[0] + 1, before[1] + 1)


@pytest.mark.parametrize("size", [1, 3, 32])
def test_text_does_not_depend_on_how_many_tokens_a_dispatch_decodes(size: int, monkeypatch: pytest.MonkeyPatch):
    """Nor where a row ends within one: what is decoded after its end is not shown."""
    expected = generate(CONFIG, weights(), TEXT, PROMPTS, max_tokens=30, stop=["never"])  # which looks at each token
    monkeypatch.setattr(decode_module, "LIVE", 1e9 if size > 1 else 0)
    monkeypatch.setattr(decode_module, "BLOCK", size)
    decode.clear_cache()
    assert generate(CONFIG, weights(), TEXT, PROMPTS, max_tokens=30) == expected
    decode.clear_cache()


def test_generation_leaves_the_weights_as_they_were():
    before = jax.tree.map(np.asarray, weights())
    generate(CONFIG, weights(), TEXT, ["a"], max_tokens=2)
    jax.tree.map(np.testing.assert_array_equal, before, weights())


def test_an_attention_that_declines_single_queries_still_generates():
    config = dataclasses.replace(CONFIG, attention=AttentionConfig(implementation="chunked"))
    assert generate(config, weights(), TEXT, PROMPTS, max_tokens=12) == generate(
        CONFIG, weights(), TEXT, PROMPTS, max_tokens=12
    )


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("x" * 48, {}, "49 tokens.*max_seq_len=48.*at most 47"),
        ("", {"begin": False}, "without tokens.*or --begin"),
        ("a", {"seed": -1}, "seed=-1 must lie between 0 and 4294967295"),
        ("a", {"seed": 2**32}, "seed=4294967296 must lie"),
        ("a", {"max_tokens": 0}, "max_tokens=0"),
        ("a", {"stop": [""]}, "an empty stop text"),
    ],
    ids=["too long", "empty", "seed below", "seed above", "no tokens wanted", "empty stop"],
)
def test_what_cannot_be_written_is_refused(prompt: str, options: dict, says: str):
    with pytest.raises(ValueError, match=says):
        generate(CONFIG, weights(), TEXT, [prompt], **options)


def grown(data: bytes, stop: list[str], room: int = 1000) -> list[str]:
    """The text of a row that gets `data` byte by byte and then the end of text."""
    row, texts = Row(TEXT, stop, room), []
    for token in [*data, TEXT.end_of_text]:
        texts.append(row.add(token))
        if row.finish:
            break
    return texts


@given(st.text(max_size=30))
def test_characters_of_several_tokens_come_whole(text: str):
    ends = [[""] * (len(character.encode()) - 1) + [character] for character in text]
    assert grown(text.encode(), []) == [*itertools.chain(*ends), ""]


@given(st.binary(max_size=30))
def test_bytes_that_are_no_text_are_shown_as_the_tokenizer_shows_them(data: bytes):
    assert "".join(grown(data, [])) == TEXT.decode(list(data))


@example("ab", ["b", "ab"])
@given(st.text("ab\n", max_size=20), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_ends_a_row_just_before_it_wherever_tokens_are_cut(text: str, stop: list[str]):
    # The specification reads the whole text again after every token.
    read = [text[:n] for n in range(len(text) + 1)]
    cuts = (min(part.find(end) for end in stop if end in part) for part in read if any(end in part for end in stop))
    assert "".join(grown(text.encode(), stop)) == text[: next(cuts, None)]


def test_text_is_shown_as_soon_as_no_stop_text_can_begin_in_it():
    assert grown(b"one\n\ntwo", ["\n\n"]) == ["o", "n", "e", "", ""]
    assert grown(b"a\nb", ["\n\n"]) == ["a", "", "\nb", ""]


def test_a_row_out_of_room_gives_up_what_it_held_back():
    assert grown("aé".encode(), [], room=2) == ["a", "\N{REPLACEMENT CHARACTER}"]
    assert grown(b"a\nb", ["\n\n"], room=2) == ["a", "\n"]


def test_the_pieces_of_a_stream_are_the_texts_of_generate():
    options = {"max_tokens": 12, "stop": ["e", "x"], "seed": 3}
    pieces = list(Sampler(CONFIG, weights(), TEXT).stream(PROMPTS, **options))
    texts = ["".join(piece.text for piece in pieces if piece.row == row) for row in range(len(PROMPTS))]
    assert texts == generate(CONFIG, weights(), TEXT, PROMPTS, **options)
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert sorted(piece.row for piece in pieces if piece.finish) == list(range(len(PROMPTS)))


@given(st.lists(st.integers(0, 2), max_size=12))
def test_rows_in_turn_come_one_after_the_other_and_as_soon_as_they_may(order: list[int]):
    grows = [Piece(row, f"{row}{n}", None) for n, row in enumerate(order)]
    pieces = [*grows, *(Piece(row, "", "stop") for row in (1, 0, 2))]
    shown = list(row_by_row(pieces))
    assert shown == sorted(pieces, key=lambda piece: piece.row)
    read = iter(pieces)
    live = list(itertools.islice(row_by_row(read), order.count(0)))  # all of row 0, without reading further
    assert live == [piece for piece in grows if piece.row == 0]
    assert not live or next(read) == pieces[pieces.index(live[-1]) + 1]
