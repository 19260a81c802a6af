"""Every key has a meaning, and whoever types another name for it is told the one that works."""

import ast
import dataclasses
import re
from collections import Counter
from pathlib import Path

import pytest

import llm_jax
from llm_jax.config import override, plain
from llm_jax.keys import REQUIRED, SYNONYMS, choices, keys, meanings, suggestions, value_at
from llm_jax.ops.attention import ACROSS, IMPLEMENTATIONS
from llm_jax.runs.start import load_recipe
from llm_jax.train.config import RunConfig

KEYS = {key.name: key for key in keys(RunConfig)}


def test_every_key_says_what_it_means():
    assert [name for name, key in KEYS.items() if not key.meaning] == []


def test_a_docstring_explains_no_field_that_is_not_there():
    classes = {RunConfig} | {key.group for key in KEYS.values() if key.group is not None}
    unknown = {cls.__name__: meanings(cls).keys() - {f.name for f in dataclasses.fields(cls)} for cls in classes}
    assert {name: found for name, found in unknown.items() if found} == {}


# Names in an error that are no keys of a config where it is raised: arguments of a function, a field of a mask.
ARGUMENTS = {
    "compat/huggingface.py": {"tokenizer"},
    "data/sources.py": {"column", "separator"},
    "ops/fast_attention.py": {"window"},
    "ops/linear_attention.py": {"chunk"},
    "runs/data.py": {"column", "end_of_text"},
    "runs/run.py": {"column"},
}


def words(error: ast.Call) -> str:
    """Return the text of an error as it is written, with `{}` for what is computed."""
    pieces = [piece for text in error.args for piece in getattr(text, "values", [text])]
    return "".join(str(piece.value) if isinstance(piece, ast.Constant) else "{}" for piece in pieces)


def test_a_key_that_an_error_names_is_written_in_full():
    package, wrong = Path(llm_jax.__file__).parent, []
    last = {name.rpartition(".")[2] for name in KEYS}
    for path in package.rglob("*.py"):
        calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        errors = [words(call) for call in calls if ast.unparse(call.func) in ("ValueError", "Declined")]
        for name in re.findall(r"(?<![\w.}])((?:\w+\.)*(?:\w+|{}))=", " ".join(errors)):
            group, _, word = name.rpartition(".")
            known = name in KEYS or (word == "{}" and group in {"", *(key.rpartition(".")[0] for key in KEYS)})
            if not known and word in {"{}", *last} - ARGUMENTS.get(str(path.relative_to(package)), set()):
                wrong.append(f"{path.relative_to(package)}: {name}")
    assert wrong == []


def test_no_two_keys_of_a_group_share_a_meaning():
    said = Counter((name.rpartition(".")[0], key.meaning) for name, key in KEYS.items())
    assert [pair for pair, times in said.items() if times > 1] == []


def test_enumerated_values_are_listed_and_a_misspelt_one_is_answered():
    config = load_recipe("quickstart")
    few = {name: choices(key.kind) for name, key in KEYS.items() if choices(key.kind)}
    assert few["model.attention.implementation"] == (*IMPLEMENTATIONS, *ACROSS)
    for name, values in few.items():
        assert all(value in KEYS[name].meaning for value in values), name
        for value in values:
            with pytest.raises(ValueError, match=rf"{name} takes one .* got '{value}x'; did you mean {name}=\w+\?$"):
                override(config, [f"{name}={value}x"])


def test_a_misspelt_value_in_a_recipe_is_answered_too():
    model = load_recipe("quickstart").model
    with pytest.raises(ValueError, match=r"takes one of reference, .*, got 'flahs'; did you mean .*=flash\?$"):
        dataclasses.replace(model.attention, implementation="flahs")


def test_every_other_name_leads_to_a_key():
    assert set(SYNONYMS) <= set(KEYS)
    for key, others in SYNONYMS.items():
        for other in others:
            assert key in suggestions(other, RunConfig), other


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr", "optimizer.learning_rate"),
        ("model.lr", "optimizer.learning_rate"),
        ("learning-rate", "optimizer.learning_rate"),
        ("batch_size", "data.batch_size"),
        ("bs", "data.batch_size"),
        ("n_layers", "model.n_layers"),
        ("model.nlayers", "model.n_layers"),
        ("layers", "model.n_layers"),
        ("n_layer", "model.n_layers"),
        ("heads", "model.n_heads"),
        ("hidden_size", "model.d_model"),
        ("context", "data.seq_len"),
        ("epochs", "data.epochs"),
        ("step", "steps"),
        ("moddel.d_ff", "model.d_ff"),
        ("experts.d_ff", "model.d_ff"),
        ("model.experts.dff", "model.experts.d_ff"),
        ("optimizer.lerning_rate", "optimizer.learning_rate"),
        ("warmup_step", "optimizer.warmup_steps"),
    ],
)
def test_another_name_is_answered_with_the_key_that_is_meant(typed: str, meant: str):
    assert suggestions(typed, RunConfig)[0] == meant


def test_nothing_is_guessed_where_nothing_is_close():
    assert suggestions("zzzz", RunConfig) == suggestions("", RunConfig) == suggestions("x" * 10**6, RunConfig) == []


def test_what_is_answered_works_when_it_is_typed():
    config = load_recipe("quickstart")
    with pytest.raises(ValueError, match=r"unknown config key 'lr'; did you mean optimizer\.learning_rate=3e-4\?$"):
        override(config, ["lr=3e-4"])
    assert override(config, ["optimizer.learning_rate=3e-4"]).optimizer.learning_rate == 3e-4


def test_every_key_with_its_value_is_the_same_config_again():
    config = load_recipe("classify")
    values = {key.name: value_at(config, key) for key in keys(RunConfig) if key.group is None}
    given = [f"{name}={plain(value)}" for name, value in values.items() if not name.startswith("model.experts.")]
    assert override(config, [word for word in given if ".sparse." not in word]) == config
    assert values["model.experts.number"] == 8
    assert KEYS["model.d_model"].default is REQUIRED
