"""Keys of a config.json and fields of ours translate in both directions, and what contradicts itself is refused."""

from typing import Any

import pytest
from architectures import CASES, LLAMA3, LONGROPE, SIZES, YARN, config_json
from test_families import model_of

from llm_jax.compat.families import FAMILIES
from llm_jax.compat.huggingface import family_of
from llm_jax.compat.lenses import canonical
from llm_jax.model import count
from llm_jax.ops.position import Rotary


@pytest.mark.parametrize("case", CASES)
def test_a_config_comes_back_as_the_same_model(case: str):
    family, config = model_of(case)
    assert canonical(family.read(family.write(config))) == canonical(config)
    assert family.misfits(config, count.parameter_shapes(config)) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}}, Rotary(1e6, 1.0, "linear", 2.0)),
        ({"rope_theta": 7e3, "rope_scaling": None}, Rotary(7e3)),
        ({}, Rotary(1e4)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 7e3}},
            Rotary(1e4, 1.0, "linear", 2.0),
        ),
        (
            {"rope_parameters": LLAMA3, "original_max_position_embeddings": 32},
            Rotary(5e5, 1.0, "llama3", 8.0, 32, 1.0, 4.0),
        ),
    ],
)
def test_the_names_of_before_are_read_too(old: dict[str, Any], new: Rotary):
    assert FAMILIES["llama"].read(SIZES | old).rotary == new


def test_what_stands_in_the_config_files_of_the_hub_is_read():
    """Keys as in the files of Pythia, NeoX-20B, Gemma 3, SmolLM2, SmolLM3, Qwen2.5 and Phi-3 mini, in small sizes."""
    pythia = {"rotary_emb_base": 10_000, "rotary_pct": 0.25, "use_parallel_residual": True, "torch_dtype": "float16"}
    assert FAMILIES["gpt_neox"].read(CASES["gpt_neox"] | pythia).rotary == Rotary(1e4, 0.25)
    neox = {"hidden_act": "gelu_fast", "attention_dropout_prob": 0, "hidden_dropout_prob": 0, "rotary_pct": 0.25}
    assert FAMILIES["gpt_neox"].read(CASES["gpt_neox"] | neox).activation == "gelu"
    gemma = {"rope_theta": 1e6, "rope_local_base_freq": 2e4, "sliding_window_pattern": 2, "rope_scaling": None}
    gemma |= {"cache_implementation": "hybrid", "attn_logit_softcapping": None, "sliding_window": 4, "head_dim": 8}
    read = FAMILIES["gemma3_text"].read(SIZES | gemma)
    assert (read.layers, read.rotary) == (("local", "global"), Rotary(1e6, local_theta=2e4))
    smol = {"rope_interleaved": False, "is_llama_config": True, "transformers.js_config": {}, "rope_theta": 100_000}
    assert FAMILIES["llama"].read(SIZES | smol).rotary.theta == 1e5
    smol = {"max_window_layers": 28, "use_sliding_window": False, "sliding_window": None, "no_rope_layers": [1, 1, 0]}
    smol |= {"layer_types": ["full_attention"] * 3, "mlp_bias": False, "attention_bias": False, "rope_theta": 5e6}
    assert FAMILIES["smollm3"].read(SIZES | smol).layers == ("global", "global", "nope")
    qwen = {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21, "use_mrope": False}
    assert FAMILIES["qwen2"].read(SIZES | qwen).attention.window is None
    phi = {"original_max_position_embeddings": 4096, "attention_bias": False, "embd_pdrop": 0.0, "rope_scaling": None}
    assert FAMILIES["phi3"].read(SIZES | phi).layers == ("global",)


def test_what_a_config_leaves_out_is_what_transformers_takes():
    """Its defaults for (num_key_value_heads, head_dim), as transformers 5.23 has them; null is ours."""
    defaults = {"llama": (None, None), "mistral": (8, None), "mixtral": (8, None), "qwen2": (32, None)}
    defaults |= {"qwen3": (32, 128), "gemma2": (4, 256), "gemma3_text": (4, 256), "olmo2": (None, None)}
    defaults |= {"phi3": (None, None), "smollm3": (4, None), "gemma": (16, 256), "olmo3": (None, None)}
    defaults |= {"exaone4": (32, None), "starcoder2": (2, None), "seed_oss": (8, 128), "arcee": (None, None)}
    defaults |= {"cwm": (8, 128), "granite": (None, None), "glm": (2, 128), "glm4": (2, 128), "ernie4_5": (2, 128)}
    defaults |= {"qwen3_moe": (4, None), "olmoe": (None, None)}
    sizes = SIZES | {"num_attention_heads": 32, "hidden_size": 128}
    absent = {name: size for name, size in sizes.items() if name != "num_key_value_heads"}
    for name, expected in defaults.items():
        read = FAMILIES[name].read(absent)
        assert (read.n_kv_heads, read.head_dim) == expected, name
        read = FAMILIES[name].read(sizes | {"num_key_value_heads": None, "head_dim": None})
        assert (read.K, read.H) == (32, 4), name


@pytest.mark.parametrize(
    ("case", "change", "says"),
    [
        (
            "llama llama3",
            {"hidden_sise": 3},
            r"config.json says hidden_sise=3, .* did you mean 'hidden_size'\? .*delete it",
        ),
        ("llama llama3", {"clip_qkv": 0.0}, "says clip_qkv=0.0, which no llama of llm-jax"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "says attn_logit_softcapping=50.0, which no gemma3_text"),
        ("qwen3", {"quantization_config": {"bits": 4}}, "says quantization_config="),
        ("qwen3", {"mlp_bias": True}, "says mlp_bias=true"),
        (
            "llama llama3",
            {"attention_bias": False},
            r"attention_bias, mlp_bias=\(False, True\), .* known: \(False, False\), \(True, False\), \(True, True\)",
        ),
        (
            "llama llama3",
            {"rope_parameters": {"rope_type": "proportional"}},
            "rope_type=proportional, .* known: default, linear",
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_type=linear, .* known: default, longr",
        ),
        (
            "phi3 long",
            {"rope_parameters": LONGROPE | {"short_factor": [1.0, 2.0]}},
            "model.rotary.short_factors has 2 numbers where model.head_dim=8 x model.rotary.fraction=0.75 has 3 pairs",
        ),
        ("mistral yarn", {"rope_parameters": YARN | {"truncate": False}}, "rope_type=yarn comes with truncate"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": YARN}}, "positions of sliding_attention by yarn"),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}},
            "rope_parameters for=rope_type, .* known: full_attention, sliding_attention",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_theta": 1e3, "factor": 2.0}}},
            "rope_type=default comes with factor; known: rope_theta",
        ),
        ("qwen3", {"layer_types": ["full_attention"] * 2}, "has 2 layer_types for num_hidden_layers=3; give one"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "has 2 no_rope_layers for num_hidden_layers=5; give one"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False, .* known: True"),
        ("gpt2", {"activation_function": "mish"}, "activation_function=mish, .* known: gelu_new"),
        ("gpt2", {"n_head": 5}, "model.n_heads=5 does not divide model.d_model=24"),
        ("llama llama3", {"rope_parameters": "linear"}, "has rope_parameters=linear, a string; expected an object"),
        ("llama llama3", {"hidden_act": ["silu"]}, r'has hidden_act=\["silu"\], a list; expected a string'),
        ("llama llama3", {"num_hidden_layers": 0}, "num_hidden_layers=0; expected 1 to 4,096"),
        ("qwen3", {"num_hidden_layers": 0, "layer_types": None}, "num_hidden_layers=0; expected 1 to 4,096"),
        ("gemma2", {"query_pre_attn_scalar": None}, "has query_pre_attn_scalar=null, which is not a valid value"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "has .*sliding_window_pattern=0, which is not a valid value"),
        ("gpt2", {"n_head": "five"}, "n_head=five, a string; expected a number"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 5}, "a window and without positions"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "linear_attention", "x"]},
            "layer_types=linear_attention, .* known",
        ),
    ],
)
def test_a_config_that_we_can_not_follow_says_which_key_and_what_is_known(case: str, change: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        family_of(config_json(case)).read(config_json(case) | change)


WINDOWS = ["sliding_attention", "full_attention", "full_attention"]


NO_WINDOW = "has layers of sliding_attention and no window for them .*; make all full_attention there"


REFUSED = [  # by transformers too
    ("qwen2 yarn", {"use_sliding_window": False, "layer_types": WINDOWS}, NO_WINDOW),
    ("qwen3", {"use_sliding_window": False, "sliding_window": 4, "layer_types": WINDOWS}, NO_WINDOW),
    ("qwen3", {"use_sliding_window": True, "sliding_window": None, "layer_types": WINDOWS}, NO_WINDOW),
    ("olmo3", {"sliding_window": None, "layer_types": [*WINDOWS, *WINDOWS]}, NO_WINDOW),
    ("qwen3", {"use_sliding_window": None}, "has use_sliding_window=null; expected true or false"),
    ("seed_oss", {"attention_bias": None}, "has attention_bias=null; expected true or false"),
    ("seed_oss", {"mlp_bias": 1}, "has mlp_bias=1; expected true or false"),
    ("llama llama3", {"layer_types": ["full_attention"]}, "has 1 layer_types for 3 layers; give one for each"),
    ("mistral yarn", {"layer_types": []}, "has 0 layer_types for 3 layers; give one for each"),
]


@pytest.mark.parametrize(("case", "change", "says"), REFUSED)
def test_a_config_that_contradicts_itself_is_refused(case: str, change: dict[str, Any], says: str):
    theirs = config_json(case) | change
    with pytest.raises(ValueError, match=says):
        family_of(theirs).read(theirs)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "change", "says"), REFUSED)
def test_such_a_config_is_refused_by_transformers_too(case: str, change: dict[str, Any], says: str):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")

    def compute() -> None:
        config = transformers.AutoConfig.for_model(**config_json(case) | change)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model(torch.zeros((1, 4), dtype=torch.long), use_cache=False)

    with pytest.raises(Exception, match=r"`sliding_window`|expected bool|must be equal to the number of"):
        compute()


def test_a_window_that_is_off_is_none_in_any_layer():
    changes = {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1, "layer_types": None}
    theirs = config_json("qwen3") | changes
    assert FAMILIES["qwen3"].read(theirs).layers == ("global",)


def test_a_config_without_its_sizes_names_the_key():
    with pytest.raises(ValueError, match=r"config.json of a llama lacks 'hidden_size'"):
        FAMILIES["llama"].read({"vocab_size": 8})
