"""Hugging Face's families of models in our terms: for each a declarative map, used in both directions.

A family is a table of tensors (`tensors.py`) and a list of lenses (`lenses.py`). A lens translates one or a few keys of
config.json to fields of `ModelConfig` and back. A new family is one more entry at the end.
"""

from llm_jax.compat.families_gpt import GPTS
from llm_jax.compat.families_moe import MIXTURES
from llm_jax.compat.family import Family
from llm_jax.compat.lenses import (
    ATTENTION_BIAS,
    SIZES,
    TIED,
    UNTIED,
    WHOLE_HEADS,
    WIDTH,
    Lens,
    Theirs,
    activation,
    biases,
    exaone_layers,
    heads,
    key,
    known,
    layer_types,
    no_rope_layers,
    pattern_dropout,
    rms_norm,
    sliding_window,
    window,
)
from llm_jax.compat.rope import PHI3_SCALINGS, rope, rope_by_type
from llm_jax.compat.tensors import (
    ATTENTION,
    BODY,
    FUSED_FEEDFORWARD,
    GLM4_NORMS,
    NORMS_AFTER,
    NORMS_AROUND,
    NORMS_BEFORE,
    PHI3,
    TABLES,
)

LLAMA = (*SIZES, WIDTH, activation(), rms_norm(1e-6))
BIASES = biases(
    {"none": (False, False), "attention": (True, False), "all": (True, True)}, attention_bias=False, mlp_bias=False
)


def every_fourth(config: Theirs, i: int) -> bool:
    """Return whether the i-th layer has a window, if all but the last of every four have one."""
    return (i + 1) % 4 != 0


# In Qwen the layers from `max_window_layers` on have the window, if there is one.
QWEN_LAYERS = layer_types(
    lambda config, i: sliding_window(config) is not None and i >= config.get("max_window_layers", 28),
    ("use_sliding_window", "max_window_layers"),
    use=True,
)
GEMMA = (
    *SIZES,
    WIDTH,
    Lens((), lambda config: {"embedding_scale": config["hidden_size"] ** 0.5}, lambda c: {}),
    rms_norm(1e-6),
    ATTENTION_BIAS,
    TIED,
    WHOLE_HEADS,
)
GEMMA_SCALE = Lens(
    ("query_pre_attn_scalar",),
    lambda config: {"attention.scale": config.get("query_pre_attn_scalar", 256) ** -0.5},
    lambda c: {"query_pre_attn_scalar": round(c.scores.factor(c.H) ** -2)},
)
# The first Gemma uses the tanh form of GELU under any name.
GEMMA_ACTIVATION = Lens(
    ("hidden_act", "hidden_activation"),
    lambda config: {
        "activation": known(
            "hidden_act", {"gelu": "gelu", "gelu_pytorch_tanh": "gelu"}, config.get("hidden_act", "gelu_pytorch_tanh")
        )
    },
    lambda c: {"hidden_act": "gelu_pytorch_tanh"},
)
GEMMA_FIXED = {"norm": "rmsnorm_1p", "residual": "sandwich"}
# Seed-OSS has separate keys for queries, keys and values, for the output of attention, and for the feed-forward.
SEED_BIASES = biases(
    {
        "none": (False, False, False),
        "qkv": (True, False, False),
        "attention": (True, True, False),
        "all": (True, True, True),
    },
    attention_bias=True,
    attention_out_bias=False,
    mlp_bias=False,
)
GLM = (
    *SIZES,
    WIDTH,
    *heads(2, 128),
    activation(),
    rms_norm(1.5625e-7),
    key("attention_bias", "bias", True, {True: "qkv", False: "none"}),
    rope(fraction=0.5, old=("rope_theta", "partial_rotary_factor")),
)
# The default positions of CWM.
CWM_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

FAMILIES = {
    family.name: family
    for family in (
        Family(
            name="llama",
            architecture="LlamaForCausalLM",
            models="Llama 2, Llama 3, SmolLM, SmolLM2",
            tensors=BODY + NORMS_BEFORE,
            lenses=(*LLAMA, *heads(), BIASES, rope(), UNTIED, WHOLE_HEADS),
            fixed={},
        ),
        Family(
            name="mistral",
            architecture="MistralForCausalLM",
            models="Mistral",
            tensors=BODY + NORMS_BEFORE,
            lenses=(*LLAMA, *heads(8), window(4096), rope(), UNTIED),
            fixed={},
        ),
        Family(
            name="qwen2",
            architecture="Qwen2ForCausalLM",
            models="Qwen2, Qwen2.5",
            tensors=BODY + NORMS_BEFORE,
            lenses=(*LLAMA, *heads(32), QWEN_LAYERS, rope(), UNTIED),
            fixed={"bias": "qkv"},
        ),
        Family(
            name="qwen3",
            architecture="Qwen3ForCausalLM",
            models="Qwen3",
            tensors=BODY + NORMS_BEFORE,
            lenses=(*LLAMA, *heads(32, 128), ATTENTION_BIAS, QWEN_LAYERS, rope(), UNTIED),
            fixed={"attention.qk_norm": "head"},
        ),
        Family(
            name="gemma2",
            architecture="Gemma2ForCausalLM",
            models="Gemma 2",
            tensors=BODY + NORMS_AROUND,
            lenses=(
                *GEMMA,
                *heads(4, 256),
                activation("gelu_pytorch_tanh", "hidden_activation"),
                GEMMA_SCALE,
                layer_types(lambda config, i: i % 2 == 0, ()),
                rope(),
                key("attn_logit_softcapping", "attention.softcap", 50.0),
                key("final_logit_softcapping", "logit_softcap", 30.0),
            ),
            fixed=GEMMA_FIXED,
        ),
        Family(
            name="gemma3_text",
            architecture="Gemma3ForCausalLM",
            models="Gemma 3, text only",
            tensors=BODY + NORMS_AROUND,
            lenses=(
                *GEMMA,
                *heads(4, 256),
                activation("gelu_pytorch_tanh", "hidden_activation"),
                GEMMA_SCALE,
                layer_types(
                    lambda config, i: (i + 1) % config.get("sliding_window_pattern", 6) != 0,
                    ("sliding_window_pattern",),
                ),
                rope_by_type(1e6, 1e4, "rope_local_base_freq"),
                key("final_logit_softcapping", "logit_softcap", None),
            ),
            fixed={**GEMMA_FIXED, "attention.qk_norm": "head"},
        ),
        Family(
            name="olmo2",
            architecture="Olmo2ForCausalLM",
            models="OLMo 2",
            tensors=BODY + NORMS_AFTER,
            lenses=(*SIZES, WIDTH, *heads(), activation(), rms_norm(1e-5), ATTENTION_BIAS, rope(), UNTIED),
            fixed={"residual": "output", "attention.qk_norm": "whole"},
        ),
        Family(
            name="phi3",
            architecture="Phi3ForCausalLM",
            models="Phi-3, Phi-4, with long texts too",
            tensors=PHI3 + NORMS_BEFORE,
            lenses=(
                *SIZES,
                WIDTH,
                *heads(),
                activation(),
                rms_norm(1e-5),
                window(None),
                rope(fraction=1.0, old=("rope_theta", "partial_rotary_factor"), scalings=PHI3_SCALINGS, original=4096),
                UNTIED,
            ),
            fixed={},
        ),
        Family(
            name="smollm3",
            architecture="SmolLM3ForCausalLM",
            models="SmolLM3",
            tensors=BODY + NORMS_BEFORE,
            lenses=(*LLAMA, *heads(4), BIASES, no_rope_layers(), rope(2e6), TIED),
            fixed={},
        ),
        Family(
            name="gemma",
            architecture="GemmaForCausalLM",
            models="Gemma",
            tensors=BODY + NORMS_BEFORE,
            lenses=(*GEMMA, *heads(16, 256), GEMMA_ACTIVATION, rope()),
            fixed={"norm": "rmsnorm_1p"},
        ),
        Family(
            name="olmo3",
            architecture="Olmo3ForCausalLM",
            models="OLMo 3",
            tensors=BODY + NORMS_AFTER,
            lenses=(
                *SIZES,
                WIDTH,
                *heads(),
                activation(),
                rms_norm(1e-5),
                ATTENTION_BIAS,
                layer_types(every_fourth, ()),
                rope_by_type(5e5),
                UNTIED,
            ),
            fixed={"residual": "output", "attention.qk_norm": "whole"},
        ),
        Family(
            name="exaone4",
            architecture="Exaone4ForCausalLM",
            models="EXAONE 4",
            tensors=BODY + NORMS_AFTER,
            lenses=(*SIZES, WIDTH, *heads(32), activation(), rms_norm(1e-5), exaone_layers(), rope(), UNTIED),
            fixed={"residual": "output", "attention.qk_norm": "head"},
        ),
        Family(
            name="seed_oss",
            architecture="SeedOssForCausalLM",
            models="Seed-OSS",
            tensors=BODY + NORMS_BEFORE,
            lenses=(*LLAMA, *heads(8, 128), SEED_BIASES, pattern_dropout("attention_dropout", 0.1), rope(), UNTIED),
            fixed={},
        ),
        Family(
            name="arcee",
            architecture="ArceeForCausalLM",
            models="Arcee AFM",
            tensors=BODY + NORMS_BEFORE,
            lenses=(*SIZES, WIDTH, *heads(), activation("relu2"), rms_norm(1e-5), BIASES, rope(), UNTIED),
            fixed={"gated": False},
        ),
        Family(
            name="cwm",
            architecture="CwmForCausalLM",
            models="Code World Model",
            tensors=BODY + NORMS_BEFORE,
            lenses=(
                *SIZES,
                WIDTH,
                *heads(8, 128),
                activation(),
                rms_norm(1e-5),
                layer_types(lambda config, i: i % 4 != 0, ()),
                rope(1e6, absent=CWM_ROPE),
                UNTIED,
            ),
            fixed={},
        ),
        Family(
            name="granite",
            architecture="GraniteForCausalLM",
            models="Granite 3",
            tensors=BODY + NORMS_BEFORE,
            lenses=(
                *LLAMA,
                *heads(),
                BIASES,
                key("embedding_multiplier", "embedding_scale", 1.0),
                key("residual_multiplier", "residual_scale", 1.0),
                key("attention_multiplier", "attention.scale", 1.0),
                Lens(
                    ("logits_scaling",),
                    lambda config: {"logit_scale": 1 / config.get("logits_scaling", 1.0)},
                    lambda c: {"logits_scaling": 1 / c.logit_scale},
                ),
                rope(counted=False),
                UNTIED,
            ),
            fixed={},
        ),
        Family(
            name="glm",
            architecture="GlmForCausalLM",
            models="GLM-4",
            tensors=TABLES + ATTENTION + FUSED_FEEDFORWARD + NORMS_BEFORE,
            lenses=(*GLM, UNTIED),
            fixed={"rotary.pairs": "interleaved"},
        ),
        Family(
            name="glm4",
            architecture="Glm4ForCausalLM",
            models="GLM-4-0414",
            tensors=TABLES + ATTENTION + FUSED_FEEDFORWARD + GLM4_NORMS,
            lenses=(*GLM, UNTIED),
            fixed={"rotary.pairs": "interleaved", "residual": "sandwich"},
        ),
        Family(
            name="ernie4_5",
            architecture="Ernie4_5ForCausalLM",
            models="ERNIE 4.5, dense",
            tensors=BODY + NORMS_BEFORE,
            lenses=(
                *SIZES,
                WIDTH,
                *heads(2, 128),
                activation(),
                rms_norm(1e-5),
                key("use_bias", "bias", False, {False: "none", True: "all"}),
                rope(5e5),
                TIED,
            ),
            fixed={"rotary.pairs": "interleaved"},
        ),
        *GPTS,
        *MIXTURES,
    )
}
