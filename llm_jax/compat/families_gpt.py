"""The families after GPT-2, with LayerNorm and a feed-forward that is not gated: see `families.py`."""

from llm_jax.compat.family import Family
from llm_jax.compat.lenses import (
    SIZES,
    TIED,
    UNTIED,
    WIDTH,
    Lens,
    activation,
    heads,
    key,
    pattern_dropout,
    silent,
    window,
)
from llm_jax.compat.rope import rope
from llm_jax.compat.tensors import GPT2, GPT_BIGCODE, NEOX, STARCODER2

GPT2_KEYS = (
    key("vocab_size", "vocab_size"),
    key("n_embd", "d_model"),
    key("n_layer", "n_layers"),
    key("n_head", "n_heads"),
    key("n_positions", "max_seq_len", 1024),
    key("n_inner", "d_ff", None),
    key("layer_norm_epsilon", "norm_eps", 1e-5),
    key("scale_attn_weights", "attention.scale", True, {True: None}),
    pattern_dropout("attn_pdrop", 0.1),
    TIED,
)
GPT2_FIXED = {"positions": "learned", "norm": "layernorm", "gated": False, "bias": "all"}

GPTS = (
    Family(
        name="gpt2",
        architecture="GPT2LMHeadModel",
        models="GPT-2",
        tensors=GPT2,
        lenses=(*GPT2_KEYS, activation("gelu_new", "activation_function")),
        fixed=GPT2_FIXED,
    ),
    Family(
        name="gpt_neox",
        architecture="GPTNeoXForCausalLM",
        models="GPT-NeoX, Pythia",
        tensors=NEOX,
        lenses=(
            *SIZES,
            WIDTH,
            activation("gelu"),
            key("layer_norm_eps", "norm_eps", 1e-5),
            key("use_parallel_residual", "residual", True, {True: "parallel", False: "pre"}),
            key("attention_bias", "bias", True, {True: "all"}),
            rope(fraction=0.25, old=("rotary_emb_base", "rotary_pct", "rope_theta", "partial_rotary_factor")),
            UNTIED,
        ),
        fixed={"norm": "layernorm", "gated": False},
    ),
    Family(
        name="starcoder2",
        architecture="Starcoder2ForCausalLM",
        models="StarCoder 2",
        tensors=STARCODER2,
        lenses=(
            *SIZES,
            WIDTH,
            *heads(2),
            activation("gelu_pytorch_tanh"),
            key("norm_epsilon", "norm_eps", 1e-5),
            key("use_bias", "bias", True, {True: "all", False: "none"}),
            window(None),
            rope(),
            TIED,
        ),
        fixed={"norm": "layernorm", "gated": False},
    ),
    Family(
        name="gpt_bigcode",
        architecture="GPTBigCodeForCausalLM",
        models="StarCoder, SantaCoder",
        tensors=GPT_BIGCODE,
        lenses=(
            *GPT2_KEYS,
            activation("gelu_pytorch_tanh", "activation_function"),
            Lens(
                ("multi_query", "num_key_value_heads"),  # the second follows from the first
                lambda config: {"n_kv_heads": 1 if config.get("multi_query", True) else None},
                lambda c: {"multi_query": c.K == 1},
            ),
            silent(
                "attention_softmax_in_fp32",
                "scale_attention_softmax_in_fp32",
                "inference_runner",
                "validate_runner_input",
                "pad_key_length",
            ),
        ),
        fixed=GPT2_FIXED,
    ),
)
