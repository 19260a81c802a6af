"""A model's arithmetic: its sizes fit together, and its counts equal what the program really has and does."""

import dataclasses
import re
from typing import Any

import pytest
from grid import OPTIONS, tiny
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.model.config import REMAT, TAPS, AttentionConfig, ModelConfig
from llm_jax.model.init import SCHEMES
from llm_jax.ops.position import Rotary

SIZES = {"vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len"}

ERRORS: list[tuple[dict[str, Any], str]] = [
    (
        {"d_model": 100, "n_heads": 6, "n_kv_heads": None},
        "model.n_heads=6 does not divide model.d_model=100; set model.head_dim, or use model.d_model=96 or 102",
    ),
    (
        {"d_model": 4, "n_heads": 6, "n_kv_heads": None},
        "model.n_heads=6 does not divide model.d_model=4; set model.head_dim, or use model.d_model=6",
    ),
    ({"n_kv_heads": 4}, "model.n_kv_heads=4 does not divide model.n_heads=6; use a divisor, as 3"),
    ({"n_kv_heads": 12}, "model.n_kv_heads=12 does not divide model.n_heads=6; use a divisor, as 6"),
    (
        {"n_heads": 2**31 - 1, "n_kv_heads": 2**31 - 2, "head_dim": 2},
        "model.n_kv_heads=2147483646 does not divide model.n_heads=2147483647; use a divisor, as 1",
    ),
    ({"n_layers": 10_001}, "model.n_layers=10001 is more than 10,000; use that or less"),
    ({"vocab_size": 2**31}, "model.vocab_size=2147483648 is more than int32 can count; use at most 2147483647"),
    ({"norm_eps": 1e-46}, "model.norm_eps=1e-46 is no float32; use 0, or a size from 1.2e-38 to 3.4e+38"),
    (
        {"rotary": Rotary(scaling="longrope", original_len=8, short_factors=(1.0,) * 3, long_factors=(1.0,) * 2)},
        "model.rotary.short_factors has 3 numbers where model.head_dim=4 has 2 pairs; give one for each",
    ),
    (
        {"rotary": Rotary(scaling="dynamic", original_len=8, fraction=0.5)},
        "model.rotary.scaling=dynamic slows all pairs but the first, and model.head_dim=4 x model.rotary.fraction=0.5 "
        "has no other; set model.head_dim=8, or model.rotary.scaling=none",
    ),
    ({"residual_scale": 0.0}, "model.residual_scale=0.0 must be positive"),
    ({"head_dim": 3}, "rotary positions rotate pairs: model.head_dim=3 must be even; set model.head_dim=4"),
    (
        {"d_model": 25, "head_dim": 4, "positions": "sinusoidal"},
        "sinusoidal positions come in pairs: model.d_model=25 must be even; use 26",
    ),
    (
        {"init": "mup"},
        "model.init=mup shrinks the head with width, which the embedding can't; set model.tied=false",
    ),
    ({"vocab_size": 0}, "model.vocab_size=0 must be at least 1"),
    ({"n_layers": -1}, "model.n_layers=-1 must be at least 1"),
    ({"n_heads": 0}, "model.n_heads=0 must be at least 1"),
    ({"n_kv_heads": 0}, "model.n_kv_heads=0 must be at least 1"),
    ({"head_dim": 0}, "model.head_dim=0 must be at least 1"),
    ({"d_ff": 0}, "model.d_ff=0 must be at least 1"),
    ({"unroll": 0}, "model.unroll=0 must be at least 1"),
    (
        {"layers": ("globl",)},
        "model.layers: 'globl' is no kind of layer; did you mean 'global'; a mixture of experts is global+moe",
    ),
    ({"norm_eps": 0.0}, "model.norm_eps=0.0 must be positive"),
    ({"layers": ("local",)}, "model.layers=local needs model.attention.window; set it to 4096"),
    ({"dropout": 1.0}, "model.dropout=1.0 must lie in [0, 1)"),
    ({"dropout": -0.1}, "model.dropout=-0.1 must lie in [0, 1)"),
    (
        {"remat": "resid_mdi"},
        "model.remat='resid_mdi' can't keep 'resid_mdi'; did you mean 'resid_mid'? Or use none, full, dots, offload",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message.split(";")[0] for _, message in ERRORS])
def test_sizes_that_do_not_fit_are_refused_with_the_numbers_and_a_way_out(changes: dict, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tiny(**changes)


@given(st.integers(1, 64), st.integers(1, 12))
def test_the_widths_that_an_error_offers_are_accepted(d_model: int, n_heads: int):
    try:
        tiny(d_model=d_model, n_heads=n_heads, n_kv_heads=None, positions="none")
    except ValueError as error:
        offered = [int(width) for width in str(error).split("d_model=")[-1].split(" or ")]
        assert all(tiny(d_model=d, n_heads=n_heads, n_kv_heads=None, positions="none") for d in offered)


def test_every_option_stands_in_the_grid():
    assert set(OPTIONS) | SIZES == {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(OPTIONS["init"]) == set(SCHEMES)
    assert set(REMAT) < set(OPTIONS["remat"])


def test_a_word_that_no_field_knows_is_answered_with_those_it_knows():
    with pytest.raises(ValueError, match=r"model\.norm takes one of rmsnorm, rmsnorm_1p, layernorm, got 'layer'"):
        tiny(norm="layer")
    with pytest.raises(ValueError, match=r"model\.attention\.qk_norm takes one of none, head, whole, got True"):
        tiny(attention=AttentionConfig(qk_norm=True))


def test_sinks_that_no_layer_would_see_are_refused():
    with pytest.raises(ValueError, match=r"model\.attention\.sinks=2 .* model\.layers=global has none; set sinks to 0"):
        tiny(attention=AttentionConfig(sinks=2))


@pytest.mark.parametrize("name", ["pattern", "attn_scores", "embed", "logits"])
def test_a_tap_that_a_block_does_not_hold_cannot_be_kept(name: str):
    with pytest.raises(ValueError, match=f"can't keep '{name}'"):
        tiny(remat=name)


def test_taps_are_listed_in_the_order_of_the_forward_pass():
    names = list(TAPS)
    assert names[0] == "embed"
    assert names[-1] == "logits"
    assert all(place.split("/")[-1] == name for name, place in TAPS.items())
