"""`llm-jax import` and `llm-jax export` as a user types them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from architectures import config_json
from test_huggingface import save_model

from llm_jax.cli.main import main
from llm_jax.compat import safetensors


def test_the_verbs_say_what_they_made(tmp_path: Path, capsys: Any):
    llama = save_model(tmp_path / "llama", config_json("llama llama3"))
    a_run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert main(["import", str(llama), "--run", a_run, "--tokenizer", "byte", "--json"]) == 0
    count = sum(np.prod(tensor.shape) for tensor in safetensors.open_folder(llama).values())
    assert json.loads(capsys.readouterr().out) == {"run": a_run, "parameters": count}
    assert main(["export", a_run, "--out", out, "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"out": out, "family": "llama", "step": 0}
    assert {tensor.dtype for tensor in safetensors.open_folder(Path(out)).values()} == {"BF16"}
    files = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(out)) == files
