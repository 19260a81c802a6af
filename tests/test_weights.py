"""Parameters come from the tensors of a family and go back to the byte; tensors of another model are named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import CASES
from test_families import model_of, random_file

from llm_jax.compat import weights
from llm_jax.compat.safetensors import open_file, write_file


@pytest.mark.parametrize("case", CASES)
def test_tensors_come_back_byte_for_byte(case: str, tmp_path: Path):
    family, config = model_of(case)
    random_file(case, tmp_path / "model.safetensors")
    params = weights.read_parameters(tmp_path, family, config)
    weights.write_parameters(tmp_path / "back.safetensors", family, config, params, "float32")
    there, back = (open_file(tmp_path / f"{name}.safetensors") for name in ("model", "back"))
    assert list(there) == list(back)
    assert all(there[name].read().tobytes() == back[name].read().tobytes() for name in there)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"without": "model.norm.weight"}, "missing: model.norm.weight. Are"),
        ({"model.extra.weight": (3,)}, "unknown: model.extra.weight. Are"),
        ({"model.norm.weight": (23,)}, r"of another shape: model.norm.weight \[23\] instead of \[24\]"),
        (
            {"without": "model.layers.2.self_attn.k_proj.weight", "more": (1,)},
            "missing: model.*; unknown: more",
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
