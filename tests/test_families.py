"""Every family of models in and out: the same tensors, the same configs, and, with transformers, the same numbers.

The slow tests, which need torch and transformers, compare with them. `python tests/test_families.py` does so for all
families, or for those named behind it, and writes what it found into docs/architectures.md.
"""

import functools
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import CASES, LLAMA3, LONGROPE, PAGE, SIZES, YARN, config_json, lacking_table, record, table
from grid import tiny
from jaxtyping import PyTree

from llm_jax.compat import weights
from llm_jax.compat.families import FAMILIES
from llm_jax.compat.family import Family, Shapes
from llm_jax.compat.huggingface import choose, export_run, family_of, import_run
from llm_jax.compat.lenses import canonical
from llm_jax.compat.missing import LACKS
from llm_jax.compat.safetensors import open_file, write_file
from llm_jax.infer.generate import begin_rows, next_token
from llm_jax.model import count
from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.model.stack import unstack
from llm_jax.model.taps import capture
from llm_jax.model.transformer import Transformer
from llm_jax.ops.experts import Experts
from llm_jax.ops.position import Rotary
from llm_jax.ops.sampling import Sampling
from llm_jax.runs import restore

WRITTEN = 12  # tokens, greedily


def compare(case: str, folder: Path) -> float:
    """Imports and exports a random model of transformers; how far our logits and residuals are from its own.

    The largest difference, as a share of the largest value. Everything else must be equal, to the last bit, and what
    both write greedily too: rows are longer than every window.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs, there, here, back = config_json(case), folder / "theirs", folder / "run", folder / "back"
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**theirs), attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # scales of 1 and biases of 0 would hide what is left out
            parameter += torch.randn(parameter.shape) * (0.25 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5)
    model.save_pretrained(there)

    quiet = lambda _: None  # noqa: E731
    imported = import_run(str(there), here, tokenizer="byte", report=quiet)
    config = imported.model
    params, _ = restore.weights(here, restore.on_one_device(imported), report=quiet)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, 24))
    taps = capture(Transformer(config), params, jnp.asarray(tokens, jnp.int32))
    with torch.no_grad():
        out = model(torch.from_numpy(tokens), output_hidden_states=True)
    pairs = [(taps["logits"], out.logits), (taps["final"], out.hidden_states[-1])]
    for i in range(config.n_layers):
        pairs += [(taps["resid_pre"][i], out.hidden_states[i])]
        pairs += [(taps["resid_post"][i], out.hidden_states[i + 1])] if i + 1 < config.n_layers else []

    if config.rotary.scaling != "dynamic":  # where they leave the keys of before as they are: docs/architectures.md
        model.generation_config.eos_token_id = None
        written = model.generate(torch.from_numpy(tokens), do_sample=False, max_new_tokens=WRITTEN)[
            :, tokens.shape[1] :
        ]
        assert greedy(config, params, tokens).tolist() == written.tolist()

    assert export_run(here, params, back).name == theirs["model_type"]
    before, after = open_file(there / "model.safetensors"), open_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[name].read().tobytes() == after[name].read().tobytes() for name in before)
    again = transformers.AutoModelForCausalLM.from_pretrained(back, attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again(torch.from_numpy(tokens)).logits, out.logits)
    return max(distance(np.asarray(ours), theirs.numpy()) for ours, theirs in pairs)


def greedy(config: ModelConfig, params: PyTree, prompts: np.ndarray) -> np.ndarray:
    """The next WRITTEN tokens of each row, with a cache, token by token: a single program to compile."""
    rows, length = prompts.shape
    tree, ones = unstack(config, params), np.ones(rows, np.int32)
    state = begin_rows(config, length + WRITTEN, config.vocab_size, jax.random.split(jax.random.key(0), rows))
    tokens = prompts.astype(np.int32)
    for t in range(length + WRITTEN - 1):
        state, token = next_token(config, Sampling(temperature=0.0), tree, state, tokens[:, t : t + 1], ones)
        if t + 1 >= length:
            tokens = np.concatenate([tokens, np.asarray(token)[:, None]], axis=1)
    return tokens[:, length:]


def distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_imported_model_computes_what_transformers_computes(case: str, tmp_path: Path):
    assert compare(case, tmp_path) < 1e-5


@functools.cache
def model_of(case: str) -> tuple[Family, ModelConfig]:
    theirs = config_json(case)
    family = family_of(theirs)
    return family, family.read(theirs)


def random_file(case: str, path: Path, without: str = "", **more: tuple[int, ...]) -> None:
    """A safetensors file of the case's tensors, all numbers different; without one tensor, and with others."""
    family, config = model_of(case)
    shapes = weights.shapes_of(count.shapes(config))
    tensors = {tensor.name: tensor.format.shape for tensor in family.tensors_of(config, shapes)} | more
    tensors.pop(without, None)
    rng = np.random.default_rng(0)
    write_file(path, tensors, "float32", lambda name: rng.normal(size=tensors[name]).astype(np.float32))


@pytest.mark.parametrize("case", CASES)
def test_tensors_come_back_byte_for_byte(case: str, tmp_path: Path):
    family, config = model_of(case)
    random_file(case, tmp_path / "model.safetensors")
    params = weights.read_parameters(tmp_path, family, config)
    weights.write_parameters(tmp_path / "back.safetensors", family, config, params, "float32")
    there, back = (open_file(tmp_path / f"{name}.safetensors") for name in ("model", "back"))
    assert list(there) == list(back)
    assert all(there[name].read().tobytes() == back[name].read().tobytes() for name in there)


@pytest.mark.parametrize("case", CASES)
def test_a_config_comes_back_as_the_same_model(case: str):
    family, config = model_of(case)
    assert canonical(family.read(family.write(config))) == canonical(config)
    assert family.misfits(config, weights.shapes_of(count.shapes(config))) == []


def test_every_switch_of_the_cases_reaches_the_model():
    """A lens that reads nothing would come back as it went."""
    read = {case: model_of(case)[1] for case in CASES}
    assert read["llama llama3"].rotary == Rotary(5e5, 1.0, "llama3", 8.0, 16, 1.0, 4.0)
    assert read["llama linear tied"].rotary == Rotary(1e4, 1.0, "linear", 3.0)
    assert read["mistral yarn"].rotary == Rotary(1e3, 1.0, "yarn", 4.0, 16, 0.5, 8.0, 1.3)
    assert (read["llama llama3"].bias, read["qwen2 yarn"].bias, read["qwen3"].bias) == ("all", "qkv", "none")
    assert (read["llama linear tied"].tied, read["llama llama3"].tied) == (True, False)
    assert (read["mistral yarn"].layers, read["mistral yarn"].attention.window) == (("local",), 5)
    assert (read["mixtral"].layers, read["mixtral"].experts) == (("local+moe",), Experts(number=5, active=2))
    assert read["qwen2 yarn"].layers == ("global", "local", "local")
    assert (read["qwen3"].layers, read["qwen3"].attention.qk_norm) == (("local", "global"), "head")
    assert (read["gemma2"].layers, read["gemma2"].embedding_scale) == (("local", "global"), 24**0.5)
    assert (read["gemma2"].attention.softcap, read["gemma2"].logit_softcap) == (1.5, 4.0)
    assert (read["gemma2"].attention.scale, read["gemma2"].residual) == (10**-0.5, "sandwich")
    assert read["gemma3_text"].layers == (*["local"] * 5, "global")
    assert read["gemma3_text"].rotary == Rotary(1e6, 1.0, "linear", 8.0, local_theta=1e3)
    assert (read["olmo2"].residual, read["olmo2"].attention.qk_norm) == ("output", "whole")
    assert (read["gpt2"].positions, read["gpt2"].activation, read["gpt2"].gated) == ("learned", "gelu", False)
    assert (read["gpt_neox"].residual, read["gpt_neox"].rotary.fraction) == ("parallel", 0.25)
    assert (read["phi3"].rotary.fraction, read["phi3"].attention.window) == (0.5, 6)
    lists = {"short_factors": (1.0, 1.5, 2.0), "long_factors": (1.5, 3.0, 6.0)}
    assert read["phi3 long"].rotary == Rotary(1e3, 0.75, "longrope", 4.0, 16, **lists)
    assert read["phi3 short"].rotary == Rotary(1e3, 0.75, "longrope", 3.0, 48, **lists)
    assert read["llama dynamic"].rotary == Rotary(1e3, 1.0, "dynamic", 3.0, 16)
    assert read["llama dynamic"].max_seq_len == 48
    assert (read["gemma"].embedding_scale, read["gemma"].bias) == (24**0.5, "attention")
    dropped = [read[case].attention.dropout for case in ("llama biased attention", "seed_oss", "gpt2", "gpt_neox")]
    assert dropped == [0.2, 0.1, 0.1, 0.0]
    assert (read["granite"].embedding_scale, read["granite"].attention.scale) == (3.0, 0.4)
    assert (read["granite"].residual_scale, read["granite"].logit_scale) == (0.3, 0.25)
    assert (read["glm"].rotary, read["glm"].bias) == (Rotary(1e3, 0.5, pairs="interleaved"), "qkv")
    assert (read["glm4"].residual, read["glm4"].rotary.pairs, read["glm4"].bias) == ("sandwich", "interleaved", "none")
    assert (read["ernie4_5"].rotary.pairs, read["ernie4_5"].bias) == ("interleaved", "all")
    assert read["olmo3"].layers == ("local", "local", "local", "global")
    assert read["olmo3"].rotary == Rotary(5e5, 1.0, "yarn", 4.0, 16, local_theta=5e5)
    assert read["exaone4"].layers == ("local", "local", "local", "nope")
    assert read["exaone4 without windows"].layers == ("global",)
    assert (read["seed_oss"].bias, read["seed_oss everywhere"].bias, read["starcoder2"].bias) == ("qkv", "all", "all")
    assert (read["arcee"].activation, read["arcee"].gated) == ("relu2", False)
    assert (read["gpt_bigcode"].K, read["gpt_bigcode every head"].K) == (1, 6)
    assert read["cwm"].layers == ("global", "local", "local", "local")
    assert read["qwen3_moe"].layers == ("local+moe", "local", "local+moe")
    assert read["qwen3_moe"].experts == Experts(number=5, active=2, d_ff=12)
    assert read["qwen3_moe every other"].layers == ("global", "global+moe")
    assert read["olmoe"].experts == Experts(number=5, active=2, renormalise=False)
    assert read["smollm3"].layers == ("local", "nope", "global", "nope", "global")


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
            "rotary.short_factors has 2 numbers where head_dim=8 x rotary.fraction=0.75 has 3 pairs; give one for each",
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
        ("gemma2", {"query_pre_attn_scalar": None}, "has query_pre_attn_scalar=null, which is no such value"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "has .*sliding_window_pattern=0, which is no such value"),
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


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"model_type": "lama"}, "lama, a family without a map; known: arcee, .* starcoder2"),
        ({"model_type": "gemma3", "text_config": {}}, "an encoder of images or sound, .* save the text model alone"),
        ({}, "null, a family"),
        ({"model_type": [1]}, r"\[1\], a family"),
        (
            {"model_type": "gpt_oss"},
            "it needs learned sinks, clamped SwiGLU, biases in experts .*, which llm-jax lacks",
        ),
        ({"model_type": "deepseek_v3"}, "it needs latent attention, .* and a sigmoid router"),
        ({"model_type": "qwen3_next"}, "it needs gated attention outputs, gated delta layers .* and a gate"),
        ({"model_type": "bert"}, "it needs attention to later tokens"),
    ],
)
def test_a_family_without_a_map_is_named_with_what_it_needs(theirs: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=f"there/config.json has model_type=.*{says}") as error:
        family_of(theirs, "there/config.json")
    assert "did you mean" not in str(error.value)


def test_no_family_has_a_map_and_a_lack():
    assert FAMILIES.keys().isdisjoint(LACKS)
    assert all(isinstance(lacks, tuple) and lacks for lacks in LACKS.values())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"without": "model.norm.weight"}, "missing: model.norm.weight. Are"),
        ({"model.extra.weight": (3,)}, "without a place: model.extra.weight. Are"),
        ({"model.norm.weight": (23,)}, r"of another shape: model.norm.weight \[23\] instead of \[24\]"),
        (
            {"without": "model.layers.2.self_attn.k_proj.weight", "more": (1,)},
            "missing: model.*; without a place: more",
        ),
    ],
)
def test_tensors_that_are_not_the_models_are_named(change: dict[str, Any], says: str, tmp_path: Path):
    random_file("olmo2", tmp_path / "model.safetensors", **change)
    with pytest.raises(ValueError, match=f"not those of the olmo2 in config.json; {says}"):
        weights.read_parameters(tmp_path, *model_of("olmo2"))


def test_old_files_are_read_buffers_missing_prefix_and_all(tmp_path: Path):
    """GPT-2 lies on the hub without the prefix `transformer.`, and with its causal masks."""
    random_file("gpt2", tmp_path / "new.safetensors")
    new = open_file(tmp_path / "new.safetensors")
    old = {name.removeprefix("transformer."): tensor.read() for name, tensor in new.items()}
    old |= {"h.0.attn.bias": np.ones((1, 1, 40, 40), np.float32), "h.0.attn.masked_bias": np.zeros((), np.float32)}
    write_file(tmp_path / "model.safetensors", {n: a.shape for n, a in old.items()}, "float32", old.__getitem__)
    params = weights.read_parameters(tmp_path, *model_of("gpt2"))
    np.testing.assert_array_equal(params["embedding"]["table"], old["wte.weight"])


def test_a_tied_head_may_be_in_the_file_if_it_is_the_embedding(tmp_path: Path):
    family, config = model_of("llama linear tied")
    random_file("llama linear tied", tmp_path / "one.safetensors")
    tensors = {name: tensor.read() for name, tensor in open_file(tmp_path / "one.safetensors").items()}
    for head, fits in ((tensors["model.embed_tokens.weight"], True), (1 + tensors["model.embed_tokens.weight"], False)):
        tensors["lm_head.weight"] = head
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        write_file(tmp_path / "model.safetensors", shapes, "float32", tensors.__getitem__)
        if fits:
            weights.read_parameters(tmp_path, family, config)
        else:
            with pytest.raises(ValueError, match=r"ties lm_head.weight to model.embed_tokens.weight, but they differ"):
                weights.read_parameters(tmp_path, family, config)


def shapes_of(config: ModelConfig) -> Shapes:
    return weights.shapes_of(count.shapes(config))


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
def test_a_model_of_ours_is_exported_as_the_family_that_can_say_it(changes: dict[str, Any], name: str):
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
def test_what_no_family_can_say_is_named(changes: dict[str, Any], says: str):
    config = tiny(**changes)
    with pytest.raises(ValueError, match=says):
        choose(config, shapes_of(config), None)


def test_the_page_has_the_results_of_every_family():
    assert table() in PAGE.read_text(), "run python tests/architectures.py"
    assert lacking_table() in PAGE.read_text(), "run python tests/architectures.py"
    for family in FAMILIES.values():
        found = rf"\| `{family.name}` \| [\d.]+e-\d+ \| byte-equal \| [\d.]+e-\d+, curve [\d.]+e-\d+ \|"
        assert re.search(found, PAGE.read_text()), family.name


if __name__ == "__main__":
    for name in sys.argv[1:] or FAMILIES:
        worst = 0.0
        for case in CASES:
            if case.split()[0] == name:
                with tempfile.TemporaryDirectory() as folder:
                    found = compare(case, Path(folder))
                    print(f"{case:32} {found:.1e}", flush=True)
                    worst = max(worst, found)
        record(name, parity=f"{worst:.1e}", round_trip="byte-equal")
