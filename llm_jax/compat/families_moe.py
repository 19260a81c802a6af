"""The families whose feed-forward is a mixture of experts, in some layers or in all: see `families.py`."""

from llm_jax.compat.family import Family
from llm_jax.compat.lenses import (
    ATTENTION_BIAS,
    SIZES,
    UNTIED,
    WIDTH,
    activation,
    experts,
    heads,
    key,
    rms_norm,
    sparse_layers,
    window,
)
from llm_jax.compat.rope import rope
from llm_jax.compat.tensors import BODY, EXPERTS, MIXTRAL_EXPERTS, NORMS_BEFORE

MIXTURES = (
    Family(
        name="mixtral",
        architecture="MixtralForCausalLM",
        models="Mixtral",
        tensors=BODY + NORMS_BEFORE + MIXTRAL_EXPERTS,
        lenses=(
            *SIZES,
            WIDTH,
            *heads(8),
            activation(),
            rms_norm(1e-5),
            window(None, "+moe"),
            key("num_local_experts", "experts.number", 8),
            key("num_experts_per_tok", "experts.active", 2),
            rope(1e6),
            UNTIED,
        ),
        fixed={},
    ),
    Family(
        name="qwen3_moe",
        architecture="Qwen3MoeForCausalLM",
        models="Qwen3 with experts",
        tensors=BODY + NORMS_BEFORE + EXPERTS,
        lenses=(
            *SIZES,
            WIDTH,
            *heads(4),
            activation(),
            rms_norm(1e-6),
            ATTENTION_BIAS,
            sparse_layers(experts(128, 8, width=768)),
            rope(),
            UNTIED,
        ),
        fixed={"attention.qk_norm": "head"},
    ),
    Family(
        name="olmoe",
        architecture="OlmoeForCausalLM",
        models="OLMoE",
        tensors=BODY + NORMS_BEFORE + EXPERTS,
        lenses=(*SIZES, WIDTH, *heads(), activation(), rms_norm(1e-5), experts(64, 8), ATTENTION_BIAS, rope(), UNTIED),
        fixed={"attention.qk_norm": "whole", "layers": ("global+moe",)},
    ),
)
