"""What others provide and may be missing: a library is named with its extra, a file of a model in one line."""

from pathlib import Path

import pytest

from llm_jax.compat.outside import optional, read_model_json


def test_a_library_that_is_missing_is_named_with_its_extra():
    assert optional("json").dumps([1]) == "[1]"
    with pytest.raises(ValueError, match=r"this needs no_such_library; install it: pip install 'llm-jax\[hf\]'"):
        optional("no_such_library")


def test_a_file_that_is_missing_asks_for_the_whole_folder(tmp_path: Path):
    with pytest.raises(ValueError, match=r"config.json is missing; name the folder of a model, with all of its files"):
        read_model_json(tmp_path / "config.json")
