"""A run in a folder, opened to be used."""

from pathlib import Path

import numpy as np
import pytest

import llm_jax as lj
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
