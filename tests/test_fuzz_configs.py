"""Mutated config.json files: each is read as a finite model, or refused in one line that names the file."""

import copy
import json
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from architectures import CASES, config_json

from llm_jax.compat.huggingface import family_of
from llm_jax.config import from_dict, to_dict
from llm_jax.model.config import ModelConfig

COUNT, PATH = 6000, "there/config.json"
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 1024, 2**31 - 1, 2**31, 2**63, 10**12, 10**30, -(10**12)),
    *(0.0, -0.0, 0.5, 1.0, -1.5, 24.0, 1e-45, 1e-320, 1e38, 1e39, 1e308, math.inf, -math.inf, math.nan),
    *("", "24", "3", "true", "none", "silu", "full_attention", "yarn", "linear", "longrope", "x" * 300, "\ud800", "\n"),
    *([], [1], [None], ["full_attention"] * 3, [[[]]], list(range(5000)), {}, {"a": {}}, {"rope_type": "yarn"}),
)
NAMES = ("is_causal", "quantization_config", "no_such_key", "sliding_window", "rope_scaling", "rope_theta", "", "\n")


def mutated(config: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A copy with one to three values set, scaled, removed, moved or wrapped, at the top or inside of an object."""
    config = copy.deepcopy(config)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        inside = [value for value in config.values() if isinstance(value, dict) and value]
        where = rng.choice(inside) if inside and rng.random() < 0.4 else config
        key = rng.choice([*where, rng.choice(NAMES)])
        match rng.randrange(5):
            case 0 if key in where:
                del where[key]
            case 1 if isinstance(where.get(key), int | float):
                where[key] *= rng.choice((-1, 0, 0.5, 3, 10**9, 1e300))
            case 2 if key in where:
                where[key] = rng.choice(([where[key]], {key: where[key]}, str(where[key])))
            case 3:
                where[key] = copy.deepcopy(rng.choice(list(config.values())))
            case _:
                where[key] = copy.deepcopy(rng.choice(VALUES))
    return config


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def check_finite(model: ModelConfig) -> None:
    """All numbers of the model fit float32, or an index, and so do those that follow from it."""
    for number in numbers(to_dict(model)):
        assert abs(number) < (2**31 if isinstance(number, int) else 3.4e38), number
    assert model.n_layers <= 4096
    for rotary in (model.rotary, model.rotary.local) if model.positions == "rotary" else ():
        assert np.isfinite(np.append(np.ravel(rotary.frequencies(model.H)), rotary.scale)).all()
    assert from_dict(ModelConfig, json.loads(json.dumps(to_dict(model)))) == model


def outcome(theirs: dict[str, Any]) -> ModelConfig | str:
    """The model of a config, or why there is none."""
    try:
        return family_of(theirs, PATH).read(theirs, PATH)
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_a_config_is_a_finite_model_or_refused_in_one_line():
    rng, read, longest = random.Random(0), 0, 0.0
    originals = [config_json(case) for case in CASES]
    for number in range(COUNT):
        # as from a file: what JSON can't hold is gone
        theirs = json.loads(json.dumps(mutated(originals[number % len(originals)], rng)))
        begin = time.process_time()
        found = outcome(theirs)
        longest = max(longest, time.process_time() - begin)
        if isinstance(found, str):
            assert found.startswith(PATH), (found, theirs)
            assert "\n" not in found, (found, theirs)
            assert len(found) < 1200
        else:
            read += 1
            check_finite(found)
    assert 0.05 * COUNT < read < 0.9 * COUNT
    assert longest < 5


def test_a_small_part_of_the_same_is_done_each_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(globals(), "COUNT", 400)
    test_a_config_is_a_finite_model_or_refused_in_one_line()
