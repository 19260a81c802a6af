"""Hugging Face's families of models in our terms: for each, one declarative map, read in both directions.

A family is a table of tensors and a list of lenses. A row of the table is one of their tensors, in every layer `{i}`
and of every expert `{e}`: its name, its layout (`layout.py`), and which of our parameters it holds; rows of parameters
that a model does not have are passed over. A lens is a key of config.json, or a few, and what they say in fields of
`ModelConfig`. The next family is one more entry at the end.
"""

from llm_jax.compat.family import Family, table
from llm_jax.compat.lenses import (
    WHOLE_HEADS,
    Lens,
    key,
    known,
    layer_types,
    no_rope_layers,
    window,
)
from llm_jax.compat.rope import rope, rope_by_type

# ---- tensors

BODY = table("""
    model.embed_tokens.weight                 VD      embedding/table
    model.norm.weight                         D       final_norm/scale
    lm_head.weight                            VD      unembedding/table
    model.layers.{i}.self_attn.q_proj.weight  (KGH)D  attention/w_q
    model.layers.{i}.self_attn.k_proj.weight  (KH)D   attention/w_k
    model.layers.{i}.self_attn.v_proj.weight  (KH)D   attention/w_v
    model.layers.{i}.self_attn.o_proj.weight  D(KGH)  attention/w_o
    model.layers.{i}.self_attn.q_proj.bias    (KGH)   attention/b_q
    model.layers.{i}.self_attn.k_proj.bias    (KH)    attention/b_k
    model.layers.{i}.self_attn.v_proj.bias    (KH)    attention/b_v
    model.layers.{i}.self_attn.o_proj.bias    D       attention/b_o
    model.layers.{i}.self_attn.q_norm.weight  H       attention/q_norm/scale
    model.layers.{i}.self_attn.k_norm.weight  H       attention/k_norm/scale
    model.layers.{i}.mlp.gate_proj.weight     FD      feedforward/w_gate
    model.layers.{i}.mlp.up_proj.weight       FD      feedforward/w_up
    model.layers.{i}.mlp.down_proj.weight     DF      feedforward/w_down
    model.layers.{i}.mlp.gate_proj.bias       F       feedforward/b_gate
    model.layers.{i}.mlp.up_proj.bias         F       feedforward/b_up
    model.layers.{i}.mlp.down_proj.bias       D       feedforward/b_down
""")

NORMS_BEFORE = table("""
    model.layers.{i}.input_layernorm.weight           D  attention_norm/scale
    model.layers.{i}.post_attention_layernorm.weight  D  feedforward_norm/scale
""")

NORMS_BEHIND = table("""
    model.layers.{i}.post_attention_layernorm.weight    D  attention_out_norm/scale
    model.layers.{i}.post_feedforward_layernorm.weight  D  feedforward_out_norm/scale
""")

NORMS_AROUND = NORMS_BEHIND + table("""
    model.layers.{i}.input_layernorm.weight            D  attention_norm/scale
    model.layers.{i}.pre_feedforward_layernorm.weight  D  feedforward_norm/scale
""")

EXPERTS = table("""
    model.layers.{i}.block_sparse_moe.gate.weight            ED  experts/w_router
    model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight  FD  experts/w_gate
    model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight  FD  experts/w_up
    model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight  DF  experts/w_down
""")

PHI3 = table("""
    model.embed_tokens.weight                   VD            embedding/table
    model.norm.weight                           D             final_norm/scale
    lm_head.weight                              VD            unembedding/table
    model.layers.{i}.self_attn.qkv_proj.weight  [KGH|KH|KH]D  attention/w_q attention/w_k attention/w_v
    model.layers.{i}.self_attn.o_proj.weight    D(KGH)        attention/w_o
    model.layers.{i}.mlp.gate_up_proj.weight    [F|F]D        feedforward/w_gate feedforward/w_up
    model.layers.{i}.mlp.down_proj.weight       DF            feedforward/w_down
""")

GPT2 = table("""
    transformer.wte.weight                VD            embedding/table
    transformer.wpe.weight                SD            positions/table
    transformer.ln_f.weight               D             final_norm/scale
    transformer.ln_f.bias                 D             final_norm/bias
    lm_head.weight                        VD            unembedding/table
    transformer.h.{i}.ln_1.weight         D             attention_norm/scale
    transformer.h.{i}.ln_1.bias           D             attention_norm/bias
    transformer.h.{i}.attn.c_attn.weight  D[KGH|KH|KH]  attention/w_q attention/w_k attention/w_v
    transformer.h.{i}.attn.c_attn.bias    [KGH|KH|KH]   attention/b_q attention/b_k attention/b_v
    transformer.h.{i}.attn.c_proj.weight  (KGH)D        attention/w_o
    transformer.h.{i}.attn.c_proj.bias    D             attention/b_o
    transformer.h.{i}.ln_2.weight         D             feedforward_norm/scale
    transformer.h.{i}.ln_2.bias           D             feedforward_norm/bias
    transformer.h.{i}.mlp.c_fc.weight     DF            feedforward/w_up
    transformer.h.{i}.mlp.c_fc.bias       F             feedforward/b_up
    transformer.h.{i}.mlp.c_proj.weight   FD            feedforward/w_down
    transformer.h.{i}.mlp.c_proj.bias     D             feedforward/b_down
""")

NEOX = table("""
    gpt_neox.embed_in.weight                              VD            embedding/table
    gpt_neox.final_layer_norm.weight                      D             final_norm/scale
    gpt_neox.final_layer_norm.bias                        D             final_norm/bias
    embed_out.weight                                      VD            unembedding/table
    gpt_neox.layers.{i}.input_layernorm.weight            D             attention_norm/scale
    gpt_neox.layers.{i}.input_layernorm.bias              D             attention_norm/bias
    gpt_neox.layers.{i}.attention.query_key_value.weight  (K[GH|H|H])D  attention/w_q attention/w_k attention/w_v
    gpt_neox.layers.{i}.attention.query_key_value.bias    (K[GH|H|H])   attention/b_q attention/b_k attention/b_v
    gpt_neox.layers.{i}.attention.dense.weight            D(KGH)        attention/w_o
    gpt_neox.layers.{i}.attention.dense.bias              D             attention/b_o
    gpt_neox.layers.{i}.post_attention_layernorm.weight   D             feedforward_norm/scale
    gpt_neox.layers.{i}.post_attention_layernorm.bias     D             feedforward_norm/bias
    gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight          FD            feedforward/w_up
    gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias            F             feedforward/b_up
    gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight          DF            feedforward/w_down
    gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias            D             feedforward/b_down
""")

# ---- configs

ACTIVATIONS = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu2",
    "swish": "silu",
}

SIZES = (
    key("vocab_size", "vocab_size"),
    key("hidden_size", "d_model"),
    key("num_hidden_layers", "n_layers"),
    key("num_attention_heads", "n_heads"),
    key("max_position_embeddings", "max_seq_len"),
)
WIDTH = key("intermediate_size", "d_ff")
UNTIED = key("tie_word_embeddings", "tied", False)
TIED = key("tie_word_embeddings", "tied", True)
ACTIVATION = key("hidden_act", "activation", "silu", ACTIVATIONS)


def heads(kv: int | None = None, size: int | None = None) -> tuple[Lens, ...]:
    """What the absence of these keys means; null is one for each query head, and their share of the width."""
    return key("num_key_value_heads", "n_kv_heads", kv), key("head_dim", "head_dim", size)


def rms_norm(eps: float) -> Lens:
    return key("rms_norm_eps", "norm_eps", eps)


BIAS = {(False, False): "none", (True, True): "all"}
LLAMA = (*SIZES, WIDTH, ACTIVATION, rms_norm(1e-6))
BIASES = Lens(
    ("attention_bias", "mlp_bias"),
    lambda config: {"bias": known("attention_bias, mlp_bias", BIAS, tuple(bool(config.get(k)) for k in BIASES.keys))},
    lambda c: {"attention_bias": c.bias == "all", "mlp_bias": c.bias == "all"},
)
# What Qwen lets see a window only: the layers from `max_window_layers` on.
QWEN_LAYERS = layer_types(
    lambda config, i: bool(config.get("use_sliding_window")) and i >= config.get("max_window_layers", 28),
    ("use_sliding_window", "max_window_layers"),
    use=True,
)
GEMMA = (
    *SIZES,
    WIDTH,
    *heads(4, 256),
    key("hidden_activation", "activation", "gelu_pytorch_tanh", ACTIVATIONS),
    Lens((), lambda config: {"embedding_scale": config["hidden_size"] ** 0.5}, lambda c: {}),
    Lens(
        ("query_pre_attn_scalar",),
        lambda config: {"attention.scale": config.get("query_pre_attn_scalar", 256) ** -0.5},
        lambda c: {"query_pre_attn_scalar": round(c.scores.factor(c.H) ** -2)},
    ),
    rms_norm(1e-6),
    TIED,
    WHOLE_HEADS,
)
GEMMA_FIXED = {"norm": "rmsnorm_1p", "residual": "sandwich"}


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
            name="mixtral",
            architecture="MixtralForCausalLM",
            models="Mixtral",
            tensors=BODY + NORMS_BEFORE + EXPERTS,
            lenses=(
                *SIZES,
                WIDTH,
                *heads(8),
                ACTIVATION,
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
            lenses=(*LLAMA, *heads(32, 128), QWEN_LAYERS, rope(), UNTIED),
            fixed={"attention.qk_norm": "head"},
        ),
        Family(
            name="gemma2",
            architecture="Gemma2ForCausalLM",
            models="Gemma 2",
            tensors=BODY + NORMS_AROUND,
            lenses=(
                *GEMMA,
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
            tensors=BODY + NORMS_BEHIND,
            lenses=(*SIZES, WIDTH, *heads(), ACTIVATION, rms_norm(1e-5), rope(), UNTIED),
            fixed={"residual": "output", "attention.qk_norm": "whole"},
        ),
        Family(
            name="gpt2",
            architecture="GPT2LMHeadModel",
            models="GPT-2",
            tensors=GPT2,
            lenses=(
                key("vocab_size", "vocab_size"),
                key("n_embd", "d_model"),
                key("n_layer", "n_layers"),
                key("n_head", "n_heads"),
                key("n_positions", "max_seq_len", 1024),
                key("n_inner", "d_ff", None),
                key("activation_function", "activation", "gelu_new", {"gelu_new": "gelu"} | ACTIVATIONS),
                key("layer_norm_epsilon", "norm_eps", 1e-5),
                key("scale_attn_weights", "attention.scale", True, {True: None}),
                TIED,
            ),
            fixed={"positions": "learned", "norm": "layernorm", "gated": False, "bias": "all"},
        ),
        Family(
            name="gpt_neox",
            architecture="GPTNeoXForCausalLM",
            models="GPT-NeoX, Pythia",
            tensors=NEOX,
            lenses=(
                *SIZES,
                WIDTH,
                key("hidden_act", "activation", "gelu", ACTIVATIONS),
                key("layer_norm_eps", "norm_eps", 1e-5),
                key("use_parallel_residual", "residual", True, {True: "parallel", False: "pre"}),
                key("attention_bias", "bias", True, {True: "all"}),
                rope(fraction=0.25, old=("rotary_emb_base", "rotary_pct", "rope_theta", "partial_rotary_factor")),
                UNTIED,
            ),
            fixed={"norm": "layernorm", "gated": False},
        ),
        Family(
            name="phi3",
            architecture="Phi3ForCausalLM",
            models="Phi-3, Phi-4",
            tensors=PHI3 + NORMS_BEFORE,
            lenses=(
                *SIZES,
                WIDTH,
                *heads(),
                ACTIVATION,
                rms_norm(1e-5),
                window(None),
                rope(fraction=1.0, old=("rope_theta", "partial_rotary_factor"), kinds=("default", "longrope")),
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
    )
}
