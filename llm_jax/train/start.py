"""A run that trains on from another one: which config it has."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from llm_jax.config import override, to_dict
from llm_jax.data.tokenizer import NAMED, build
from llm_jax.train.run import RunConfig, differences, load_config, load_tokenizer


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
    start = [f"init_from={folder}"]
    if not any(text.startswith("data.tokenizer=") for text in assignments):
        start.append(f"data.tokenizer={Path(folder) / 'tokenizer'}")
    config = override(recipe, [*start, *assignments], model=model)
    for owner, other, line in (
        (recipe.model, model, f"the model is that of {folder}, in place of the recipe's"),
        (config.model, model, f"the model of {folder} is changed by hand"),
    ):
        if changed := differences(to_dict(other), to_dict(owner), "model."):
            more = f"; and {len(changed) - 3} more" if len(changed) > 3 else ""
            report(f"{line}: {'; '.join(changed[:3])}{more}")
    return config
