"""The families of models with every switch that they have turned on, and what the tests found about each.

`python tests/architectures.py` writes the tables of docs/architectures.md anew, that of results from
`golden/architectures.json`.
"""

import json
import re
from pathlib import Path
from typing import Any

from llm_jax.compat.families import FAMILIES
from llm_jax.compat.missing import LACKS

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "architectures.md", ROOT / "tests" / "golden" / "architectures.json"
COLUMNS = {"parity": "parity", "round_trip": "round trip", "twin": "twin"}

# All sizes differ, windows are shorter than the rows, and a layer is left over after the last whole period.
SIZES: dict[str, Any] = {
    "vocab_size": 270,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
}
NEOX = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"} | {"hidden_size": 96}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 16}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e3,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.5, 3.0, 6.0],
}

# Case -> config.json; its family is the first word.
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 270, "n_embd": 24, "n_layer": 3, "n_head": 6, "n_positions": 40, "n_inner": 20},
    "llama llama3": SIZES | {"head_dim": 8, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
    "llama linear tied": SIZES
    | {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "mistral yarn": SIZES
    | {"sliding_window": 5, "rope_parameters": YARN | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 0.5}},
    "mixtral": SIZES | {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7},
    "qwen2 yarn": SIZES
    | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "rope_parameters": YARN},
    "qwen3": SIZES
    | {
        "head_dim": 8,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gemma2": SIZES
    | {
        "head_dim": 8,
        "sliding_window": 5,
        "query_pre_attn_scalar": 10,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": SIZES
    | {
        "num_hidden_layers": 8,
        "head_dim": 8,
        "sliding_window": 5,
        "query_pre_attn_scalar": 10,
        "final_logit_softcapping": 4.0,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
    },
    "olmo2": SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "gpt_neox": NEOX | {"hidden_act": "gelu"},
    "gpt_neox one after the other": NEOX | {"use_parallel_residual": False, "tie_word_embeddings": True},
    "phi3": SIZES
    | {
        "hidden_size": 48,
        "sliding_window": 6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    # Heads of 8, of which 6 are rotated: rows of 24 are longer than 16, and shorter than 48.
    "phi3 long": SIZES | {"hidden_size": 48, "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    "phi3 short": SIZES
    | {"hidden_size": 48, "original_max_position_embeddings": 48, "rope_parameters": LONGROPE | {"factor": 3.0}},
    "llama dynamic": SIZES
    | {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e3, "factor": 3.0}},
    "smollm3": SIZES
    | {
        "num_hidden_layers": 5,
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", *["full_attention"] * 4],
        "tie_word_embeddings": False,
    },
    "gemma": SIZES
    | {"head_dim": 8, "attention_bias": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1e3}},
    "olmo3": SIZES
    | {
        "num_hidden_layers": 6,
        "sliding_window": 5,
        "rope_parameters": {
            "full_attention": YARN | {"rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
        },
    },
    "exaone4": SIZES | {"num_hidden_layers": 6, "sliding_window": 5, "rope_parameters": LLAMA3},
    "exaone4 without windows": SIZES | {"sliding_window": None, "layer_types": ["full_attention"] * 3},
    "starcoder2": SIZES | {"sliding_window": 5, "tie_word_embeddings": False},
    "starcoder2 without biases": SIZES | {"use_bias": False},
    "seed_oss": SIZES | {"head_dim": 8},
    "seed_oss everywhere": SIZES | {"head_dim": 8, "attention_out_bias": True, "mlp_bias": True},
    "arcee": SIZES | {"rope_parameters": YARN, "mlp_bias": True, "attention_bias": True},
    "gpt_bigcode": {"vocab_size": 270, "n_embd": 24, "n_layer": 3, "n_head": 6, "n_positions": 40, "n_inner": 20},
    "gpt_bigcode every head": {"vocab_size": 270, "n_embd": 24, "n_layer": 3, "n_head": 6, "n_positions": 40}
    | {"multi_query": False, "tie_word_embeddings": False},
    "cwm": SIZES | {"num_hidden_layers": 6, "head_dim": 8, "sliding_window": 5, "rope_parameters": LLAMA3},
    "llama biased attention": SIZES | {"attention_bias": True, "attention_dropout": 0.2},
    "granite": SIZES
    | {
        "embedding_multiplier": 3.0,
        "logits_scaling": 4.0,
        "residual_multiplier": 0.3,
        "attention_multiplier": 0.4,
        "attention_bias": True,
    },
    "glm": SIZES | {"head_dim": 12, "rope_parameters": {"rope_type": "default", "rope_theta": 1e3}},
    "glm4": SIZES | {"head_dim": 8, "attention_bias": False},
    "ernie4_5": SIZES | {"head_dim": 8, "use_bias": True, "tie_word_embeddings": False},
    "qwen3_moe": SIZES
    | {
        "num_hidden_layers": 4,
        "head_dim": 8,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "use_sliding_window": True,
        "sliding_window": 5,
    },
    "qwen3_moe every other": SIZES
    | {
        "num_hidden_layers": 5,
        "head_dim": 8,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "decoder_sparse_step": 2,
    },
    "olmoe": SIZES | {"attention_bias": True, "num_experts": 5, "num_experts_per_tok": 2},
}


def config_json(case: str) -> dict[str, Any]:
    """The config.json of a case, with its family and ids of tokens that it has."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    return {"model_type": case.split()[0], **ids, **CASES[case]}


def record(family: str, **columns: Any) -> None:
    """Writes down what was found about a family, in its columns and no other, and the table with it."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[family] = results.get(family, {}) | columns
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    write_table()


def table() -> str:
    """The table of docs/architectures.md."""
    results = json.loads(RESULTS.read_text())
    lines = [f"| models | family | {' | '.join(COLUMNS.values())} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for family in FAMILIES.values():
        cells = [results.get(family.name, {}).get(column, "") for column in COLUMNS]
        lines.append(f"| {family.models} | `{family.name}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def lacking_table() -> str:
    """The table of docs/architectures.md of families without a map."""
    lines = ["| family | what it needs that llm-jax lacks |", "|---|---|"]
    lines += [f"| `{name}` | {'; '.join(lacks)} |" for name, lacks in LACKS.items() if name not in FAMILIES]
    return "\n".join(lines) + "\n"


def write_table() -> None:
    """Puts the tables into the page."""
    text = PAGE.read_text()
    for name, rows in (("table", table()), ("lacking", lacking_table())):
        marks = rf"(?<=<!-- begin {name} -->\n).*?(?=<!-- end {name} -->)"
        before, after = re.split(marks, text, flags=re.DOTALL)
        text = before + rows + after
    PAGE.write_text(text)


if __name__ == "__main__":
    write_table()
