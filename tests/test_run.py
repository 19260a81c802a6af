"""A run in a folder, opened to be used."""

import json
from pathlib import Path

import numpy as np
import pytest

import llm_jax as lj
from llm_jax.config import to_dict
from llm_jax.runs.run import columns


def test_rows_become_columns_with_nan_where_a_number_is_absent():
    rows = [{"step": 1, "loss": 2.0, "samples": []}, {"step": 2, "loss": 1, "heldout_loss": float("inf")}]
    found = columns(rows)
    assert list(found) == ["step", "loss", "heldout_loss"]
    assert found["step"].dtype == np.int64
    np.testing.assert_array_equal(found["heldout_loss"], [np.nan, np.inf])
    assert columns([])["step"].shape == (0,)


def test_a_folder_without_a_run_is_refused_with_what_to_do(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds no run \(no config.json\); start one with"):
        lj.Run.open(tmp_path)


def test_a_run_whose_layer_is_not_here_opens_and_says_what_is_missing(tmp_path: Path):
    config = lj.RunConfig(model=lj.ModelConfig(320, 64, 2, 4, 256))
    values = to_dict(config) | {"model": to_dict(config.model) | {"layers": ["nowhere:Mine"]}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "loss": 2.5}\n')
    run = lj.Run.open(tmp_path)
    assert (run.folder, run.metrics["loss"].tolist()) == (tmp_path, [2.5])
    assert str(run) == f"run {tmp_path}: no checkpoint yet, 7 of 1,000 steps, last loss 2.5000"
    with pytest.raises(ValueError, match=r"nowhere:Mine can't be imported here .*; start from the folder that holds"):
        _ = run.config
