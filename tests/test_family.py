"""Which family expresses a model of ours, and what keeps a model out of all of them."""

from typing import Any

import pytest
from grid import tiny

from llm_jax.compat.family import Shapes
from llm_jax.compat.huggingface import choose
from llm_jax.model import count
from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.ops.experts import Experts
from llm_jax.ops.position import Rotary


def shapes_of(config: ModelConfig) -> Shapes:
    return count.parameter_shapes(config)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "llama"),
        ({"tied": False, "n_kv_heads": None, "head_dim": 10}, "llama"),
        ({"layers": ("global", "global")}, "llama"),
        ({"bias": "all"}, "llama"),
        ({"bias": "qkv"}, "qwen2"),
        ({"bias": "attention"}, "llama"),
        ({"rotary": Rotary(pairs="interleaved"), "bias": "all"}, "ernie4_5"),
        ({"rotary": Rotary(pairs="interleaved", fraction=0.5)}, "glm"),
        ({"residual_scale": 0.5}, "granite"),
        ({"logit_scale": 0.5}, "granite"),
        ({"attention": AttentionConfig(qk_norm="head")}, "qwen3"),
        ({"layers": ("local",), "attention": AttentionConfig(window=4)}, "mistral"),
        ({"layers": ("local", "global"), "attention": AttentionConfig(window=4)}, "smollm3"),
        ({"layers": ("global+moe",), "experts": Experts(number=4, d_ff=12)}, "mixtral"),
        ({"residual": "output", "attention": AttentionConfig(qk_norm="whole")}, "olmo2"),
        (
            {"positions": "learned", "norm": "layernorm", "gated": False, "bias": "all", "n_kv_heads": None}
            | {"activation": "gelu"},
            "gpt2",
        ),
        ({"rotary": Rotary(fraction=0.5)}, "phi3"),
    ],
)
def test_a_model_is_exported_as_the_family_that_expresses_it(changes: dict[str, Any], name: str):
    config = tiny(**changes)
    assert choose(config, shapes_of(config), None).name == name


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"positions": "alibi"}, r"closest, llama, lacks model.positions=alibi \(there: rotary\)"),
        ({"residual": "post"}, r"lacks model.residual=post \(there: pre\)\."),
        ({"layers": ("delta", "global")}, r"lacks model.layers=\['delta', 'global'\]"),
        (
            {"layers": ("global+moe",), "experts": Experts(balance="bias")},
            "closest, mixtral, lacks the parameter layers/experts/router_bias",
        ),
    ],
)
def test_what_no_family_expresses_is_named(changes: dict[str, Any], says: str):
    config = tiny(**changes)
    with pytest.raises(ValueError, match=says):
        choose(config, shapes_of(config), None)
