"""A family that can't be imported is named with what llm-jax lacks for it."""

from typing import Any

import pytest

from llm_jax.compat.families import FAMILIES
from llm_jax.compat.huggingface import family_of
from llm_jax.compat.missing import LACKS


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"model_type": "lama"}, "lama, an unknown family; known: arcee, .* starcoder2"),
        ({"model_type": "gemma3", "text_config": {}}, "an encoder of images or sound, .* save the text model alone"),
        ({}, "null, an unknown family"),
        ({"model_type": [1]}, r"\[1\], an unknown family"),
        (
            {"model_type": "gpt_oss"},
            "it needs learned sinks, clamped SwiGLU, biases in experts .*, which llm-jax lacks",
        ),
        ({"model_type": "deepseek_v3"}, "it needs latent attention, .* and a sigmoid router"),
        ({"model_type": "qwen3_next"}, "it needs gated attention outputs, gated delta layers .* and a gate"),
        ({"model_type": "bert"}, "it needs attention to later tokens"),
    ],
)
def test_a_family_without_a_map_is_named_with_what_it_needs(theirs: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=f"there/config.json has model_type=.*{says}") as error:
        family_of(theirs, "there/config.json")
    assert "did you mean" not in str(error.value)


def test_no_family_has_a_map_and_a_lack():
    assert FAMILIES.keys().isdisjoint(LACKS)
    assert all(isinstance(lacks, tuple) and lacks for lacks in LACKS.values())
