"""The keys of a config.json: which change nothing, and what the values of the others may be.

A key is read by a lens of its family, or is listed here, or is refused by its name. No rule covers all: `false` often
means off, but `is_causal: false` means attention in both directions.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from llm_jax.config import nearest

# Whatever their values, the model computes the same logits: how the file was written, ids of tokens, training,
# generation, further outputs, and heads for other tasks.
SILENT = re.compile(
    r"_?name_or_path|_commit_hash|_(attn|experts)_implementation(_autoset|_internal)?|_sliding_window_pattern|auto_map"
    r"|architectures|model_type|(torch_)?dtype|transformers_version|transformers\.js_config|unsloth_(version|fixed)"
    r"|is_llama_config|is_decoder|torchscript|tf_legacy_loss|use_bfloat16|tokenizer_class|.*_token_id|prefix"
    r"|.*dropout(_prob)?|.*_pdrop|initializer_(range|std|factor)|gradient_checkpointing|use_reentrant|pretraining_tp"
    r"|router_(aux_loss_coef|jitter_noise)|aux_loss_alpha|seq_aux|reorder_and_upcast_attn|chunk_size_feed_forward"
    r"|use_cache|cache_implementation|return_dict(_in_generate)?|keys_to_ignore_at_inference|tie_last_hidden_states"
    r"|output_(hidden_states|attentions|scores|router_logits|past)|max_sequence_length"
    r"|temperature|top_[kp]|typical_p|(repetition|length|diversity|encoder_repetition)_penalty|do_sample|early_stopping"
    r"|(max|min)_(length|new_tokens)|(encoder_)?no_repeat_ngram_size|num_(return_sequences|beams|beam_groups)"
    r"|bad_words_ids|(begin_)?suppress_tokens|exponential_decay_length_penalty|remove_invalid_values"
    r"|task_specific_params|finetuning_task|summary_.*|id2label|label2id|num_labels|problem_type"
    r"|n_ctx|hidden_act"  # unless a lens reads them: GPT-2 and Gemma have other names for both
)

OFF = (False, None)
ABSENT = (None,)


def all_full(kinds: Any) -> bool:
    """Return whether `layer_types` has full attention in every layer, as a family without the key does."""
    return isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)


# Unless a lens reads them, these change nothing if they have one of these values, or meet a condition.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": OFF,
    "alibi": OFF,
    "attention_bias": OFF,
    "attn_logit_softcapping": ABSENT,
    "attn_output_gate": OFF,
    "bias": OFF,
    "clip_qkv": ABSENT,
    "cross_attention_hidden_size": ABSENT,
    "embedding_multiplier": (1, None),
    "final_logit_softcapping": ABSENT,
    "head_dim": ABSENT,
    "hidden_activation": ABSENT,
    "intermediate_size": ABSENT,
    "is_causal": (True,),  # there null means false
    "is_encoder_decoder": OFF,
    "layer_types": (None, all_full),
    "lm_head_bias": OFF,
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "max_window_layers": ABSENT,
    "mlp_bias": OFF,
    "no_rope_layers": ABSENT,
    "num_key_value_heads": ABSENT,
    "original_max_position_embeddings": ABSENT,
    "parallel_attn": OFF,
    "partial_rotary_factor": (1, None),
    "per_layer_config": ABSENT,
    "pruned_heads": (None, {}),
    "qk_layernorm": OFF,
    "qkv_bias": OFF,
    "quantization_config": ABSENT,
    "residual_multiplier": (1, None),
    "rope_interleaved": OFF,
    "rope_parameters": ABSENT,
    "rope_scaling": ABSENT,
    "scale_attn_by_inverse_layer_idx": OFF,
    "sliding_window": ABSENT,
    "sliding_window_pattern": ABSENT,
    "tie_encoder_decoder": OFF,
    "transformers_weights": ABSENT,
    "use_bias": OFF,
    "use_bidirectional_attention": OFF,
    "use_mrope": OFF,
    "use_qk_norm": OFF,
    "use_sliding_window": OFF,
}

# Keys whose values are strings, lists or objects, also in `rope_parameters`; all others are numbers or booleans.
WORDS = {
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "layer_types",
    "mlp_layer_types",
    "rope_type",
    "type",
}
LISTS = {"layer_types", "no_rope_layers", "mlp_layer_types", "mlp_only_layers", "short_factor", "long_factor"}
OBJECTS = {"rope_parameters", "rope_scaling", "full_attention", "sliding_attention"}
PLAIN = "a number, true, false or null"

HUGE = 3e38  # float32 holds less than 3.4e38
LARGEST = 2**31 - 1  # the largest JAX index
LAYERS = 4096  # more are a mistake, and would take long to list
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Fields of `ModelConfig` that are sizes of arrays, and the largest plausible values.
SIZES = {"n_layers": LAYERS, "d_model": 2**20, "n_heads": 2**14, "n_kv_heads": 2**14, "head_dim": 2**16, "d_ff": 2**24}
SIZES |= {"vocab_size": 2**26, "max_seq_len": LARGEST, "attention.window": LARGEST, "rotary.original_len": LARGEST}
SIZES |= {"experts.number": 2**14, "experts.active": 2**14, "experts.d_ff": 2**24}
REQUIRED = {"vocab_size", "d_model", "n_layers", "n_heads", "max_seq_len"}

ADVICE = {
    "quantization_config": "save the model dequantised, in bfloat16, and import that",
    "is_causal": "llm-jax has no model that sees the tokens after a token",
    "use_bidirectional_attention": "llm-jax has no model that sees the tokens after a token",
    "is_encoder_decoder": "llm-jax has only decoders",
    "transformers_weights": "name that file model.safetensors, and delete the key",
    "clip_qkv": "llm-jax does not clip queries, keys and values",
}


def check_known(theirs: Mapping[str, Any], known: Collection[str], family: str) -> None:
    """Raise `ValueError` for a key that no lens reads but that may change what the model computes."""
    strange = [name for name, value in theirs.items() if name not in known and not _changes_nothing(name, value)]
    if strange:
        said = ", ".join(f"{name}={short(theirs[name])}" for name in strange[:6])
        advice = ADVICE.get(strange[0]) or f"{nearest(strange[0], known)} If it changes nothing, delete it there"
        raise ValueError(f"config.json says {said}, which no {family} of llm-jax can do; {advice}")


def _changes_nothing(name: str, value: Any) -> bool:
    return bool(SILENT.fullmatch(name)) or any(_is(value, neutral) for neutral in NEUTRAL.get(name, ()))


def _is(value: Any, neutral: Any) -> bool:
    """Return whether the values are the same, where 1 is not true and 0 is not false."""
    if callable(neutral):
        return bool(neutral(value))
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def check_values(theirs: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise `ValueError` for a value of one of the keys `known` that is impossible in any family.

    That is a string instead of a number or boolean, an unexpected list or object, and a number that is not finite or
    too large.
    """
    for name in theirs:
        if name in known:
            _check_value(name, theirs[name], name)


def _check_value(name: str, value: Any, where: str) -> None:
    inside, words = name in OBJECTS, name in WORDS
    wrong = {
        "a string": isinstance(value, str) and not words,
        "an object": isinstance(value, dict) and not inside,
        "a list": isinstance(value, list) and name not in LISTS,
    }
    for kind in (kind for kind, found in wrong.items() if found):
        expected = "an object" if inside else "a list" if name in LISTS else "a string" if words else PLAIN
        raise ValueError(f"config.json has {where}={short(value)}, {kind}; expected {expected}")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_value(key, item, f"{where}.{key}")
    elif isinstance(value, list):
        if len(value) > LAYERS:
            raise ValueError(f"config.json has {len(value):,} entries in {where}; expected {LAYERS:,} at most")
        for item in value:
            if isinstance(item, list | dict):
                raise ValueError(f"config.json has {where}={short(value)}; expected a list of numbers or names")
            _check_value(name, item, where)
    elif isinstance(value, int | float):
        _check_number(value, where, LAYERS if name in LAYER_COUNTS else LARGEST)


def _check_number(value: float | int, where: str, most: int) -> None:
    if isinstance(value, float) and not abs(value) < HUGE:  # also refuses NaN
        raise ValueError(f"config.json has {where}={value}; expected what float32 can hold")
    if isinstance(value, int) and abs(value) > most:
        raise ValueError(f"config.json has {where}={value:,}; expected {most:,} at most")


def check_field(name: str, value: Any, keys: Collection[str]) -> None:
    """Raise `ValueError` for a field of `ModelConfig`, read from `keys`, that is no possible size or finite number."""
    said = f"config.json has {', '.join(keys) or name}={short(value)}"
    if isinstance(value, float) and not abs(value) < HUGE:
        raise ValueError(f"{said}; expected what float32 can hold")
    if name not in SIZES or (value is None and name not in REQUIRED):
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{said}; expected a whole number")
    if not 1 <= value <= SIZES[name]:
        raise ValueError(f"{said}; expected 1 to {SIZES[name]:,}")


def short(value: Any) -> str:
    """Return a JSON value as in the file, shortened to 60 characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
