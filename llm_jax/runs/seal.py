"""The seal of a checkpoint: all that decided its numbers, to be compared with what the run folder says now.

Checksums protect the weights; but the same weights with another `rotary.theta` or tokenizer are another model. So the
record of a checkpoint holds these values, not a hash of them: a difference can be named.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from llm_jax.config import differences, to_dict
from llm_jax.data.mixture import Mixture
from llm_jax.data.shards import Shards
from llm_jax.files import read_json
from llm_jax.runs import folder as run_folder
from llm_jax.train.config import RunConfig

Seal = dict[str, Any]

# What may change when a run resumes: how it is sharded and computed, not what is computed.
LAYOUT = (
    "mesh.",
    "pipeline.",
    "accumulate=",
    "offload=",
    "loss.chunk=",
    "model.remat=",
    "model.unroll=",
    "model.attention.implementation=",
)
# What decides no number of a step: how long, how often, and paths. Data and tokenizer are sealed by their content;
# `steps`, to which the schedule stretches, is reported when it changes.
FREE = (
    "steps=",
    "keep=",
    "patience=",
    "evaluate_every=",
    "checkpoint_every=",
    "sample_every=",
    "prompts=",
    "tensorboard=",
    "init_from=",
    "data.uri=",
    "data.tokenizer=",
    "data.epochs=",
)


def seal(
    config: RunConfig, tokenizer: str, data: Mapping[str, Any] | None, code: Mapping[str, Any] | None = None
) -> Seal:
    """Return what decides the numbers of a run: config, code, fingerprint of the tokenizer, identity of the data.

    And the machine, which decides the last bits. `data` is None where a run has none of its own; `code` records a
    caller's own loss and optimizer.
    """
    found = {"config": to_dict(config), "tokenizer": tokenizer, "machine": run_folder.machine()}
    if code:
        found["code"] = dict(code)
    if data is not None:
        found["data"] = run_folder.without_folders(data)
    return json.loads(json.dumps(found))


def seal_of(config: RunConfig, shards: Shards | Mixture, code: Mapping[str, Any] | None = None) -> Seal:
    """Return the seal of a run of `config` on `shards`, with a caller's own `code`."""
    return seal(config, shards.tokenizer.fingerprint, run_folder.data_identity(shards), code)


def seal_of_folder(folder: Path) -> Seal | None:
    """Return the seal of the run in `folder`, from its files; None for no run. Raise `ValueError` for damaged files."""
    if not run_folder.is_run(folder):
        return None
    path = folder / "data.json"
    data = read_json(path, advice=run_folder.ADVICE) if path.exists() else None
    code = run_folder.load_code(folder)
    return seal(run_folder.load_config(folder), run_folder.tokenizer_of_run(folder).fingerprint, data, code)


def changes(there: Seal, here: Seal) -> list[str]:
    """Return a phrase for each changed value that decides the numbers of a run."""
    before, now = (_plain(found["config"]) for found in (there, here))
    found = [phrase for phrase in differences(before, now) if not _key(phrase).startswith((*LAYOUT, *FREE))]
    found += differences({"tokenizer": there["tokenizer"]}, {"tokenizer": here["tokenizer"]})
    found += differences({"code": there.get("code", {})}, {"code": here.get("code", {})})
    if "data" in there and "data" in here:
        found += differences(there["data"], here["data"])
    return found


def moves(there: Seal, here: Seal) -> list[str]:
    """Return a phrase for each change in how a run is sharded or computed.

    Such changes affect the last bits only, except for `accumulate` where a microbatch has its own dropout or loss: the
    phrase says so.
    """
    before, now = (_plain(found["config"]) for found in (there, here))
    layout = [phrase for phrase in differences(before, now) if _key(phrase).startswith(LAYOUT)]
    own = _of_a_microbatch(now["model"])
    layout = [phrase + own * (_key(phrase) == "accumulate=") for phrase in layout]
    return layout + differences(*({"native": False} | found["machine"] for found in (there, here)))


def _of_a_microbatch(model: Mapping[str, Any]) -> str:
    """Say what changes beyond the last bits with other microbatches; empty where nothing does."""
    experts, found = model["experts"] or {}, []
    if model["dropout"] or model["attention"]["dropout"]:
        found.append("other dropout noise")
    if (experts.get("balance") == "loss" and experts["balance_weight"]) or experts.get("router_z_loss"):
        found.append("the experts' losses over other microbatches")
    return f" (not in its last bits alone: {' and '.join(found)})" if found else ""


def _plain(config: Mapping[str, Any], cls: Any = RunConfig) -> dict[str, Any]:
    """Fill in the defaults of keys that are newer than `config`. Keys and values that `cls` lacks are kept."""
    filled, hints = dict(config), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        inner = next(filter(dataclasses.is_dataclass, (hints[field.name], *get_args(hints[field.name]))), None)
        if field.name not in config:
            if field.default is not dataclasses.MISSING:
                filled[field.name] = _json(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                filled[field.name] = _json(field.default_factory())
        elif inner is not None and isinstance(config[field.name], Mapping):
            filled[field.name] = _plain(config[field.name], inner)
    return filled


def _json(value: Any) -> Any:
    return json.loads(json.dumps(to_dict(value) if dataclasses.is_dataclass(value) else value))


def _key(phrase: str) -> str:
    """Return the key that a phrase of `differences` is about, with the `=` that it has on the command line."""
    return f"{phrase.partition(' ')[0]}="
