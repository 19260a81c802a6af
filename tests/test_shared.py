"""What several verbs share: strict JSON on standard output, and the config of a recipe, a file or a run."""

import io
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from llm_jax.cli.main import main
from llm_jax.cli.shared import config_or_run_of


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_object_is_printed_whatever_the_letters_of_the_output(encoding: str, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out := io.TextIOWrapper(io.BytesIO(), encoding))
        assert main(["tokenize", "naïve 🐈", "--json"]) == 0
    assert json.loads(out.buffer.getvalue().decode(encoding))["text"] == "naïve 🐈"


def test_a_run_and_the_file_that_it_was_made_from_have_one_config(workspace: Path):
    run, file = (config_or_run_of(Namespace(config=name, assignments=["steps=9"])) for name in ("runs/tiny", "tiny.py"))
    assert run == file
    assert run.steps == 9
