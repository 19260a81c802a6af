"""Positions in a config.json are what transformers 5 computes, or are refused."""

from typing import Any

import numpy as np
import pytest
from architectures import LLAMA3, SIZES, YARN

from llm_jax.compat.families import FAMILIES
from llm_jax.ops.position import Rotary


def read(family: str = "llama", **changes: Any) -> Rotary:
    return FAMILIES[family].read(SIZES | changes, "there/config.json").rotary


def test_yarn_with_a_null_factor_is_as_much_longer_as_the_model_was_made():
    """64 positions now, 16 before."""
    assert read(rope_parameters=YARN | {"factor": None}) == read(rope_parameters=YARN | {"factor": 4.0})
    assert read(rope_scaling={"type": "yarn", "factor": None}, rope_theta=1e3).factor == 1.0
    outside = {"original_max_position_embeddings": 32, "rope_parameters": YARN | {"factor": None}}
    assert (read(**outside).factor, read(**outside).original_len) == (2.0, 32)


@pytest.mark.parametrize("given", [LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}])
@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_what_a_scaling_needs_is_not_guessed(given: dict[str, Any], where: str):
    kind = given["rope_type"]
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        if name in given:
            absent = {key: value for key, value in given.items() if key != name}
            with pytest.raises(ValueError, match=f"^there/config.json has rope_type={kind} and none for {name}; set"):
                read(**{where: absent})
        if name in given and kind != "yarn":
            with pytest.raises(ValueError, match=f"^there/config.json has rope_type={kind} and null for {name}; set"):
                read(**{where: given | {name: None}})
    with pytest.raises(ValueError, match=f"has rope_type={kind} and null for rope_theta"):
        read(**{where: given | {"rope_theta": None}})


def test_phi3_has_no_scaling_that_transformers_does_not_have_there():
    """It takes `yarn` for another kind, and does not load `linear`."""
    for given in (YARN, {"rope_type": "linear", "factor": 2.0}):
        with pytest.raises(ValueError, match=f"rope_type={given['rope_type']}"):
            read("phi3", rope_parameters=given)


@pytest.mark.slow
@pytest.mark.parametrize("factor", [None, 2.0, 8.0])
def test_the_frequencies_of_yarn_are_those_of_transformers(factor: float | None):
    transformers = pytest.importorskip("transformers")
    theirs = SIZES | {"hidden_size": 96, "rope_parameters": YARN | {"factor": factor}}
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(transformers.LlamaConfig(**theirs))
    ours = FAMILIES["llama"].read(theirs).rotary
    np.testing.assert_allclose(module.inv_freq.numpy(), ours.frequencies(16), rtol=1e-6)
    assert module.attention_scaling == pytest.approx(ours.scale)
