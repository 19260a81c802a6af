"""Every family of models in and out: the same tensors, the same configs, and, with transformers, the same numbers.

The slow tests, which need torch and transformers, compare with them. `python tests/test_families.py` does so for all
families, or for those named after it, and writes what it found into docs/architectures.md.
"""

import functools
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import CASES, PAGE, config_json, lacking_table, record, table
from arrays import quiet
from jaxtyping import PyTree

from llm_jax.compat.families import FAMILIES
from llm_jax.compat.family import Family
from llm_jax.compat.huggingface import export_run, family_of, import_run
from llm_jax.compat.safetensors import open_file, write_file
from llm_jax.infer.decode import Request, continuations, prepare
from llm_jax.model import count
from llm_jax.model.config import ModelConfig
from llm_jax.model.taps import capture
from llm_jax.model.transformer import Transformer
from llm_jax.ops.experts import Experts
from llm_jax.ops.position import Rotary
from llm_jax.ops.sampling import Sampling, filters
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
    """The next WRITTEN tokens of each row."""
    keys = jax.random.split(jax.random.key(0), len(prompts))
    request = Request(list(prompts), keys, filters(Sampling(temperature=0)), WRITTEN, config.vocab_size)
    return np.concatenate([np.array(new) for new in continuations(config, prepare(config, params), request)], axis=1)


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
    shapes = count.parameter_shapes(config)
    tensors = {tensor.name: tensor.format.shape for tensor in family.tensors_of(config, shapes)} | more
    tensors.pop(without, None)
    rng = np.random.default_rng(0)
    write_file(path, tensors, "float32", lambda name: rng.normal(size=tensors[name]).astype(np.float32))


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
