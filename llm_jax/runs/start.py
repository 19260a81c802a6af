"""Which config a run starts with: that of a recipe, or of a recipe on top of another run."""

import contextlib
import dataclasses
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llm_jax.config import checked, differences, nearest, override, replace, to_dict
from llm_jax.data.tokenizer import NAMED, build
from llm_jax.recipes import recipes
from llm_jax.runs.folder import load_config, load_tokenizer
from llm_jax.train.config import RunConfig


def load_recipe(name: str) -> RunConfig:
    """Return the config of a recipe, by its name or by the path of a Python file that sets `config = RunConfig(...)`.

    Raise `ValueError` where there is no such recipe, or it sets no config.
    """
    path = recipes().get(name, Path(name))
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"no recipe or Python file is called {name!r}; {nearest(name, recipes())}")
    with contextlib.redirect_stdout(sys.stderr):  # what is asked for is no recipe's to print
        config = runpy.run_path(str(path)).get("config")
    if not isinstance(config, RunConfig):
        raise ValueError(f"{path} must set `config = RunConfig(...)`; got {type(config).__name__}")
    return checked(config)


def recipe(name: str, /, *assignments: str, **changes: Any) -> RunConfig:
    """Return the config of a recipe, with changes as `replace` takes them.

    `name` is one of `llm-jax configs`, or a Python file that sets `config = RunConfig(...)`.

        recipe("quickstart", "steps=200", "data.batch_size=16")
        recipe("quickstart", steps=200, **{"data.batch_size": 16})

    Raise `ValueError` for a recipe or a key that is none, with the nearest that is.
    """
    return replace(load_recipe(name), *assignments, **changes)


def config_from(
    folder: str | Path, recipe: RunConfig, assignments: Sequence[str], report: Callable[[str], object] = print
) -> RunConfig:
    """Return the config of a run with the model, tokenizer and weights of the run in `folder`, all else of `recipe`.

    How the model is trained is the recipe's too: `model.dropout`, `model.attention.dropout` and `model.remat`.
    `assignments` change fields, those of the model as well. `report` gets a line for what of the recipe's own model
    gives way, and one for what the assignments change in that of `folder`. Raises `ValueError` where they name other
    weights, or a tokenizer that is another, or would be learned anew.
    """
    if given := [text for text in assignments if text.startswith("init_from=")]:
        raise ValueError(f"--from {folder} and {given[0]} both say where the weights come from; keep one of them")
    theirs, coder = load_config(folder).model, load_tokenizer(folder)
    for spec in (text.removeprefix("data.tokenizer=") for text in assignments if text.startswith("data.tokenizer=")):
        # One by name need not be fetched to be compared; one that learns is given nothing here, and differs.
        if not (spec == coder.name and spec in NAMED) and build(spec, tuple).fingerprint != coder.fingerprint:
            raise ValueError(f"--from {folder} reads the tokens of {folder}: leave out data.tokenizer={spec}")
    drops = any(layer.has("pattern") for layer in theirs.period)
    rate = recipe.model.attention.dropout if drops else 0.0
    attention = dataclasses.replace(theirs.attention, dropout=rate)
    model = dataclasses.replace(theirs, attention=attention, dropout=recipe.model.dropout, remat=recipe.model.remat)
    start = {"model": model, "init_from": str(folder)}
    if not any(text.startswith("data.tokenizer=") for text in assignments):
        start["data.tokenizer"] = str(Path(folder) / "tokenizer")
    config = override(recipe, assignments, **start)
    for owner, other, line in (
        (recipe.model, model, f"the model is that of {folder}, in place of the recipe's"),
        (config.model, model, f"the model of {folder} is changed by the command line"),
    ):
        if changed := differences(to_dict(other), to_dict(owner), "model."):
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            report(f"{line}: {'; '.join(changed[:3])}{more}")
    return config
