"""`llm-jax configs`, `llm-jax show` and `llm-jax plan` as a user types them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from llm_jax.cli.main import main
from llm_jax.recipes import recipe_docstring, recipes


@pytest.mark.slow
def test_what_is_shown_of_a_run_is_what_is_shown_of_its_config(output: Any):
    assert output("show", "runs/tiny", "steps=9") == output("show", "tiny.py", "steps=9")
    assert json.loads(output("show", "runs/tiny", "--json"))["sizes"]["F"] == 16


def test_every_recipe_is_listed_with_its_first_line(output: Any):
    listed = json.loads(output("configs", "--json"))
    assert list(listed) == list(recipes())
    for name, path in recipes().items():
        assert re.search(rf"^{name} +{re.escape(listed[name])}$", output("configs"), re.MULTILINE)
        assert recipe_docstring(path).startswith(listed[name])
        assert listed[name].endswith(".")


@pytest.mark.parametrize("words", [["configs", "quickstart"], ["show", "quickstart", "--config"]], ids=" ".join)
def test_every_key_of_a_recipe_is_shown_as_it_is_typed_with_its_meaning(
    words: list[str], capsys: pytest.CaptureFixture[str]
):
    assert main(words) == 0
    out = capsys.readouterr().out
    assert re.search(r"^optimizer\.name=muon +adamw +the update rule. One of adamw, lion, adafactor, muon", out, re.M)
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["optimizer.name"]["value"] == "muon"
    assert found["steps"]["default"] == 1000
    assert all(key["meaning"] for key in found.values())
    assert [name for name in found if f"{name}=" not in out] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compiles", "3"], "--compiles 3 limits those of --search; add --search"),
        (["--search", "--compiles", "0"], "--compiles 0 .* at least 1"),
        (["--price", "-1"], "--price -1.0 must be 0 or more, for one chip and hour"),
    ],
)
def test_options_that_mean_nothing_are_refused(words: list[str], message: str, capsys):
    assert main(["plan", "quickstart", "--topology", "cpu:8", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_verb_prints_its_plan_for_machines(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    recipe = Path(__file__).parents[1] / "configs" / "quickstart.py"
    small = ["model.n_layers=1", "model.d_model=32", "model.vocab_size=264", "data.batch_size=8", "data.seq_len=32"]
    argv = ["plan", str(recipe), "--topology", "cpu:8", *small, "--json"]
    assert main(argv) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["fits"]
    assert written["devices"] == 8
    assert {"parameters", "traffic", "seconds", "tokens_per_day"} <= set(written)
    assert main([*argv[:-1]]) == 0
    assert "fits" in capsys.readouterr().out
