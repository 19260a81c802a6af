"""The tensors of Hugging Face's families: their names, their formats, and which of our parameters each holds.

A row is one of their tensors, in every layer `{i}` and of every expert `{e}`. Its format is written in the letters of
`tensor_format.py`. Rows of parameters that a model does not have are skipped.
"""

from llm_jax.compat.family import table

TABLES = table("""
    model.embed_tokens.weight  VD  embedding/table
    model.norm.weight          D   final_norm/scale
    lm_head.weight             VD  unembedding/table
""")

ATTENTION = table("""
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
""")

FEEDFORWARD = table("""
    model.layers.{i}.mlp.gate_proj.weight  FD  feedforward/w_gate
    model.layers.{i}.mlp.up_proj.weight    FD  feedforward/w_up
    model.layers.{i}.mlp.down_proj.weight  DF  feedforward/w_down
    model.layers.{i}.mlp.gate_proj.bias    F   feedforward/b_gate
    model.layers.{i}.mlp.up_proj.bias      F   feedforward/b_up
    model.layers.{i}.mlp.down_proj.bias    D   feedforward/b_down
""")

FUSED_FEEDFORWARD = table("""
    model.layers.{i}.mlp.gate_up_proj.weight  [F|F]D  feedforward/w_gate feedforward/w_up
    model.layers.{i}.mlp.down_proj.weight     DF      feedforward/w_down
""")

BODY = TABLES + ATTENTION + FEEDFORWARD  # what most families call them

NORMS_BEFORE = table("""
    model.layers.{i}.input_layernorm.weight           D  attention_norm/scale
    model.layers.{i}.post_attention_layernorm.weight  D  feedforward_norm/scale
""")

NORMS_AFTER = table("""
    model.layers.{i}.post_attention_layernorm.weight    D  attention_out_norm/scale
    model.layers.{i}.post_feedforward_layernorm.weight  D  feedforward_out_norm/scale
""")

NORMS_AROUND = NORMS_AFTER + table("""
    model.layers.{i}.input_layernorm.weight            D  attention_norm/scale
    model.layers.{i}.pre_feedforward_layernorm.weight  D  feedforward_norm/scale
""")

GLM4_NORMS = table("""
    model.layers.{i}.input_layernorm.weight           D  attention_norm/scale
    model.layers.{i}.post_self_attn_layernorm.weight  D  attention_out_norm/scale
    model.layers.{i}.post_attention_layernorm.weight  D  feedforward_norm/scale
    model.layers.{i}.post_mlp_layernorm.weight        D  feedforward_out_norm/scale
""")

MIXTRAL_EXPERTS = table("""
    model.layers.{i}.block_sparse_moe.gate.weight            ED  experts/w_router
    model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight  FD  experts/w_gate
    model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight  FD  experts/w_up
    model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight  DF  experts/w_down
""")

EXPERTS = table("""
    model.layers.{i}.mlp.gate.weight                    ED  experts/w_router
    model.layers.{i}.mlp.experts.{e}.gate_proj.weight   FD  experts/w_gate
    model.layers.{i}.mlp.experts.{e}.up_proj.weight     FD  experts/w_up
    model.layers.{i}.mlp.experts.{e}.down_proj.weight   DF  experts/w_down
""")

PHI3 = (
    TABLES
    + table("""
    model.layers.{i}.self_attn.qkv_proj.weight  [KGH|KH|KH]D  attention/w_q attention/w_k attention/w_v
    model.layers.{i}.self_attn.o_proj.weight    D(KGH)        attention/w_o
""")
    + FUSED_FEEDFORWARD
)

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

# GPT-2's, but a linear map is (out, in), and each key/value head has its queries, its key and its value together.
LINEAR = {"D[KGH|KH|KH]": "(K[GH|H|H])D", "[KGH|KH|KH]": "(K[GH|H|H])", "(KGH)D": "D(KGH)", "DF": "FD", "FD": "DF"}
GPT_BIGCODE = tuple((name, LINEAR.get(letters, letters), leaves) for name, letters, leaves in GPT2)

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

STARCODER2 = (
    TABLES
    + ATTENTION
    + NORMS_BEFORE
    + table("""
    model.norm.bias                                 D   final_norm/bias
    model.layers.{i}.input_layernorm.bias           D   attention_norm/bias
    model.layers.{i}.post_attention_layernorm.bias  D   feedforward_norm/bias
    model.layers.{i}.mlp.c_fc.weight                FD  feedforward/w_up
    model.layers.{i}.mlp.c_fc.bias                  F   feedforward/b_up
    model.layers.{i}.mlp.c_proj.weight              DF  feedforward/w_down
    model.layers.{i}.mlp.c_proj.bias                D   feedforward/b_down
""")
)
