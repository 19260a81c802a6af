"""Which config a run starts with: that of a recipe, or of a recipe on top of another run."""

import contextlib
import dataclasses
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_jax.config import checked, differences, nearest, replace, to_dict
from llm_jax.data.tokenizer import NAMED, build
from llm_jax.log import Report
from llm_jax.recipes import recipes
from llm_jax.runs.folder import load_config, tokenizer_of_run
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


def recipe(name: str, /, *assignments: str | Mapping[str, Any], **changes: Any) -> RunConfig:
    """Return the config of a recipe, with changes as `replace` takes them.

    `name` is one of `llm-jax configs`, or a Python file that sets `config = RunConfig(...)`.

        recipe("quickstart", "steps=200", "data.batch_size=16")
        recipe("quickstart", {"steps": 200, "data.batch_size": 16})

    Raise `ValueError` for a recipe or a key that is none, with the nearest that is.
    """
    return replace(load_recipe(name), *assignments, **changes)


def config_from(
    folder: str | Path,
    recipe: RunConfig,
    /,
    *assignments: str | Mapping[str, Any],
    report: Report = print,
    **changes: Any,
) -> RunConfig:
    """Return the config of a run that trains the run in `folder` further: on top of it, all else of `recipe`.

        config = config_from("runs/smollm", recipe("fairytales"), "steps=500", {"data.batch_size": 4})

    Model, tokenizer and weights are those of the run. How the model is trained is the recipe's: `model.dropout`,
    `model.attention.dropout` and `model.remat`. Changes are as `replace` takes them, of the model as well. `report`
    gets a line for what of the recipe's own model gives way, and one for what the changes are to that of `folder`.

    Raise `ValueError` where the changes name other weights, or a tokenizer that is another, or would be learned anew,
    and as `replace` does.
    """
    given = dict(changes)
    for found in assignments:
        key, _, text = found.partition("=") if isinstance(found, str) else ("", "", "")
        given |= found if isinstance(found, Mapping) else {key: text}
    if "init_from" in given:
        raise ValueError(
            f"the weights are those of {folder} (--from), and init_from={given['init_from']} says others; keep one "
            "of them"
        )
    theirs, coder, spec = load_config(folder).model, tokenizer_of_run(folder), given.get("data.tokenizer")
    # One by name need not be fetched to be compared; one that learns is given nothing here, and differs.
    named = spec == coder.name and spec in NAMED
    if spec is not None and not named and build(spec, tuple).fingerprint != coder.fingerprint:
        raise ValueError(f"a run from {folder} reads the tokens of {folder}: leave out data.tokenizer={spec}")
    drops = any(layer.has("pattern") for layer in theirs.period)
    rate = recipe.model.attention.dropout if drops else 0.0
    attention = dataclasses.replace(theirs.attention, dropout=rate)
    model = dataclasses.replace(theirs, attention=attention, dropout=recipe.model.dropout, remat=recipe.model.remat)
    start = {"model": model, "init_from": str(folder)}
    if spec is None:
        start["data.tokenizer"] = str(Path(folder) / "tokenizer")
    config = replace(recipe, start, *assignments, **changes)
    for owner, other, line in (
        (recipe.model, model, f"the model is that of {folder}, in place of the recipe's"),
        (config.model, model, f"the model of {folder} is changed"),
    ):
        if changed := differences(to_dict(other), to_dict(owner), "model."):
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            report(f"{line}: {'; '.join(changed[:3])}{more}")
    return config
