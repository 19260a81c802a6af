"""Families of models that can't be imported, and what llm-jax lacks for each.

`python tests/architectures.py` writes the table into docs/architectures.md.
"""

ENCODER = "attention to later tokens, as an encoder has it"
ENCODER_DECODER = "an encoder, and attention of the decoder to it"
STATE_SPACE = "selective state-space layers"
LATENT = "latent attention, which keeps keys and values in few dimensions"
SIGMOID_ROUTER = "a sigmoid router with a bias for each expert"
VISION = "an encoder of images or sound"
GATED = "gated attention outputs"
GATED_DELTA = "gated delta layers with separate decay and one convolution"
SHORT_CONVOLUTION = "gated short convolutions as layers"

# `model_type` -> what its models have and ours lack.
LACKS: dict[str, tuple[str, ...]] = {
    "bamba": (STATE_SPACE,),
    "bart": (ENCODER_DECODER,),
    "bert": (ENCODER,),
    "bitnet": ("ternary weights and quantised activations",),
    "blt": ("byte patches of a learned length",),
    "clip": (VISION, ENCODER),
    "dbrx": ("clipped queries, keys and values", "experts in one fused tensor"),
    "deberta-v2": (ENCODER, "attention to relative positions"),
    "deepseek_v2": (LATENT, "experts picked by groups"),
    "deepseek_v3": (LATENT, SIGMOID_ROUTER),
    "deepseek_v32": (LATENT, SIGMOID_ROUTER, "an indexer that picks the keys to see"),
    "diffllama": ("differential attention",),
    "distilbert": (ENCODER,),
    "dots1": (SIGMOID_ROUTER,),
    "electra": (ENCODER,),
    "falcon_h1": (STATE_SPACE, "attention and state space in one layer", "multipliers inside of a layer"),
    "falcon_mamba": (STATE_SPACE,),
    "gemma3": (VISION,),
    "gemma3n": (VISION, "embeddings of each layer", "several residual streams", "keys and values shared among layers"),
    "gemma3n_text": ("embeddings of each layer", "several residual streams", "keys and values shared among layers"),
    "glm4_moe": (SIGMOID_ROUTER,),
    "gpt_oss": ("learned sinks", "clamped SwiGLU", "biases in experts and router", "experts in one fused tensor"),
    "granitemoehybrid": (STATE_SPACE,),
    "jamba": (STATE_SPACE,),
    "jetmoe": ("experts in attention",),
    "kimi_k2": (LATENT, SIGMOID_ROUTER),
    "kimi_linear": (LATENT, "Kimi delta attention", SIGMOID_ROUTER),
    "lfm2": (SHORT_CONVOLUTION,),
    "lfm2_moe": (SHORT_CONVOLUTION, SIGMOID_ROUTER),
    "llama4": (VISION, "a sigmoid router that scales the input of its experts", "chunked attention"),
    "llama4_text": ("a sigmoid router that scales the input of its experts", "chunked attention"),
    "llava": (VISION,),
    "longcat_flash": (LATENT, "experts that compute nothing", "two attentions in one layer"),
    "longformer": (ENCODER, "attention to chosen tokens"),
    "mamba": (STATE_SPACE,),
    "mamba2": (STATE_SPACE,),
    "mbart": (ENCODER_DECODER,),
    "minicpm3": (LATENT,),
    "minimax": ("lightning attention",),
    "minimax_m2": (SIGMOID_ROUTER,),
    "mistral3": (VISION,),
    "mllama": (VISION, "attention of the decoder to images"),
    "modernbert": (ENCODER,),
    "mt5": (ENCODER_DECODER, "learned biases of relative positions"),
    "nemotron_h": (STATE_SPACE,),
    "paligemma": (VISION,),
    "phi4_multimodal": (VISION,),
    "qwen2_5_omni": (VISION, "rotary positions in three axes"),
    "qwen2_5_vl": (VISION, "rotary positions in three axes"),
    "qwen2_vl": (VISION, "rotary positions in three axes"),
    "qwen3_5": (GATED, GATED_DELTA, VISION),
    "qwen3_next": (GATED, GATED_DELTA, "a gate on the shared expert"),
    "qwen3_vl": (VISION, "rotary positions in three axes"),
    "recurrent_gemma": ("gated linear recurrences",),
    "roberta": (ENCODER,),
    "rwkv": ("time mixing by channel",),
    "siglip": (VISION, ENCODER),
    "t5": (ENCODER_DECODER, "learned biases of relative positions"),
    "t5gemma": (ENCODER_DECODER,),
    "umt5": (ENCODER_DECODER, "learned biases of relative positions"),
    "vit": (VISION, ENCODER),
    "whisper": (VISION, ENCODER_DECODER),
    "xlm-roberta": (ENCODER,),
    "xlnet": ("permuted attention to relative positions",),
    "xlstm": ("matrix memories (mLSTM)",),
    "zamba2": (STATE_SPACE, "attention shared among layers"),
}


def lacking(name: str) -> str | None:
    """Return what llm-jax lacks for the family `name`, in words; None for a family that is not in this table."""
    if name not in LACKS:
        return None
    *others, last = LACKS[name]
    return f"{', '.join(others)} and {last}" if others else last
