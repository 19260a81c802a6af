"""Of a config.json what changes nothing is passed over, and all else is read or refused, by its name and its file."""

from typing import Any

import pytest
from architectures import CASES, SIZES, config_json

from llm_jax.compat.config_json import NEUTRAL, all_full
from llm_jax.compat.families import FAMILIES
from llm_jax.compat.huggingface import family_of, ignored

# What transformers 4.57 writes into every config.json, beside what the family has.
EVERY = {
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "dtype": None,
    "pruned_heads": {},
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "prefix": None,
    "tie_encoder_decoder": False,
    "architectures": None,
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "task_specific_params": None,
    "problem_type": None,
    "tokenizer_class": None,
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "output_scores": False,
    "num_beam_groups": 1,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "diversity_penalty": 0.0,
    "_name_or_path": "",
    "transformers_version": "4.57.6",
    "tf_legacy_loss": False,
    "use_bfloat16": False,
    "initializer_range": 0.02,
    "use_cache": True,
}
NEOX = {
    "rotary_pct": 0.25,
    "partial_rotary_factor": 0.25,
    "rotary_emb_base": 5000,
    "rope_theta": 5000,
    "hidden_dropout": 0.0,
    "classifier_dropout": 0.1,
    "layer_norm_eps": 1e-05,
    "use_parallel_residual": True,
    "rope_scaling": None,
    "attention_bias": True,
}


def read(name: str, **changes: Any) -> Any:
    return FAMILIES[name].read(SIZES | changes, "there/config.json")


@pytest.mark.parametrize("value", [False, None, 0, "false"])
def test_a_model_that_sees_both_ways_is_refused(value: Any):
    assert read("llama", is_causal=True) == read("llama")
    with pytest.raises(ValueError, match=r"^there/config.json says is_causal=.*, which no llama .* after a token"):
        read("llama", is_causal=value)


def test_false_is_no_rule():
    with pytest.raises(ValueError, match="json says use_rotary=false, which no llama of llm-jax can do"):
        read("llama", use_rotary=False)
    with pytest.raises(ValueError, match="says clip_scores=null"):
        read("llama", clip_scores=None)


@pytest.mark.parametrize("name", sorted(NEUTRAL.keys() - FAMILIES["llama"].keys))
def test_what_is_listed_is_passed_over_at_its_neutral_values_alone(name: str):
    for value in NEUTRAL[name]:
        assert read("llama", **{name: ["full_attention"] * 3 if value is all_full else value}) == read("llama")
    with pytest.raises(ValueError, match=f"config.json says {name}="):
        read("llama", **{name: False if name == "is_causal" else ["sliding_attention"] * 3})
    if False in NEUTRAL[name]:
        with pytest.raises(ValueError, match=f"config.json says {name}=0,"):
            read("llama", **{name: 0})


@pytest.mark.parametrize("case", CASES)
def test_what_transformers_4_writes_into_every_config_changes_nothing(case: str):
    theirs = config_json(case)
    assert family_of(theirs).read(EVERY | theirs) == family_of(theirs).read(theirs)


def test_a_neox_as_transformers_4_writes_it_is_read():
    neox = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"} | {"hidden_size": 96}
    rotary = FAMILIES["gpt_neox"].read(EVERY | neox | NEOX).rotary
    assert (rotary.theta, rotary.fraction) == (5000, 0.25)
    for change in ({"rope_theta": 1e4}, {"partial_rotary_factor": 0.5}):
        with pytest.raises(ValueError, match=r"versions of transformers differ in which they take; set both"):
            FAMILIES["gpt_neox"].read(EVERY | neox | NEOX | change)


def test_what_is_passed_over_is_listed():
    theirs = config_json("llama llama3") | {"tokenizer_class": "X", "temperature": 0.6, "gradient_checkpointing": True}
    theirs |= {"layer_types": ["full_attention"] * 3, "torch_dtype": "bfloat16"}
    said = ignored(FAMILIES["llama"], theirs)
    assert said is not None
    assert said.endswith("computes: gradient_checkpointing, layer_types, temperature, tokenizer_class")
    assert ignored(FAMILIES["llama"], config_json("llama llama3")) is None


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "qwen2",
            {"use_sliding_window": "false"},
            "use_sliding_window=false, a string; expected a number",
        ),
        ("llama", {"attention_bias": "false"}, "attention_bias=false, a string"),
        ("llama", {"num_hidden_layers": "3"}, "num_hidden_layers=3, a string"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "rope_scaling.factor=2, a string"),
        ("llama", {"tie_word_embeddings": 1}, "has tie_word_embeddings=1: model.tied takes true or false"),
        ("llama", {"vocab_size": True}, "vocab_size=true; expected a whole number"),
        ("llama", {"hidden_size": 24.5}, "hidden_size=24.5; expected a whole number"),
        ("llama", {"hidden_size": [24]}, r"hidden_size=\[24\], a list; expected a number"),
        ("gemma2", {"hidden_size": -24}, "hidden_size=-24; expected 1 to"),
        ("gemma2", {"hidden_size": None}, "hidden_size=null; expected a whole number"),
        ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers=1,000,000,000,000; expected 4,096 at most"),
        ("llama", {"num_attention_heads": 2**31 - 1}, "num_attention_heads=2147483647; expected 1 to 16,384"),
        ("llama", {"vocab_size": 10**12}, "vocab_size=1,000,000,000,000; expected 2,147,483,647 at most"),
        (
            "llama",
            {"num_attention_heads": 5},
            "has hidden_size=24, num_attention_heads=5: model.n_heads=5 does not div",
        ),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps=nan; expected what float32 can hold"),
        ("llama", {"rope_theta": float("inf")}, "rope_theta=inf; expected what float32 can hold"),
        ("llama", {"rms_norm_eps": -1}, "has rms_norm_eps=-1: model.norm_eps=-1.0 must be positive"),
        ("gemma2", {"query_pre_attn_scalar": 1e-320}, r"query_pre_attn_scalar=1.0\d+e\+160; expected what float32"),
    ],
)
def test_a_value_that_can_not_be_is_refused_with_key_and_file(name: str, change: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=f"^there/config.json.*{says}"):
        read(name, **change)
