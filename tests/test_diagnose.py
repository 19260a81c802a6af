"""The diagnosis of a loss that is not finite names what was planted."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import first_batches

from llm_jax import tree
from llm_jax.data.loader import Batch
from llm_jax.ops.experts import Experts
from llm_jax.runs.diagnose import diagnose
from llm_jax.sharding import MeshConfig
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program
from llm_jax.train.step import TrainState

FORWARD = "the first activation to go bad is "
BACKWARD = "the forward pass is finite; the first gradient to go bad is that of "
NORM = "no activation or gradient is bad alone, but their norm is; the largest gradient is that of "


@pytest.fixture(scope="module")
def program(config: RunConfig) -> Program:
    return Program.on(config)


@pytest.fixture(scope="module")
def batch(program: Program) -> Batch:
    return first_batches(program.config, 1)[0]


@pytest.fixture(scope="module")
def state(program: Program) -> TrainState:
    return program.init()


def planted(params: Any, values: dict[str, tuple[Any, float]]) -> Any:
    """`params` with, at each path, what stands at an index replaced by a number."""

    def one(path: str, x: jax.Array) -> jax.Array:
        index, value = values.get(path, (None, 0.0))
        return x if index is None else x.at[index].set(value)

    return tree.map_with_path(one, params)


@pytest.mark.slow
def test_in_a_pattern_of_layers_the_layer_is_the_one_that_stands_there(config: RunConfig, batch: Batch):
    """A period of two and a layer more: the second in the scan, and the one after it."""
    model = dataclasses.replace(
        config.model, layers=("delta", "global+moe"), n_layers=3, experts=Experts(number=4, d_ff=8), unroll=1
    )
    program = Program.on(dataclasses.replace(config, model=model))
    params = program.init().params
    for path, index, expected in (
        ("layers/1/experts/w_router", (0, 0, 0), "router of layer 1"),
        ("layers_2/attention/w_q", (0, 0, 0, 0), "q of layer 2"),
    ):
        assert diagnose(program, planted(params, {path: (index, jnp.nan)}), batch, 0) == FORWARD + expected


UP, GATE, DOWN = (f"layers/feedforward/w_{name}" for name in ("up", "gate", "down"))
PLANTS: list[tuple[dict[str, tuple[Any, float]], str]] = [
    ({"layers/attention/w_q": ((0, 0, 0, 0, 0), jnp.inf)}, FORWARD + "q of layer 0"),
    ({GATE: ((1, 0, 0), jnp.nan)}, FORWARD + "mlp_pre of layer 1"),
    ({DOWN: ((0, 0, 0), jnp.inf)}, FORWARD + "mlp_out of layer 0"),
    ({"final_norm/scale": (0, jnp.inf)}, FORWARD + "final"),
    # What is multiplied by nothing on the way forward comes back multiplied by 3e38, or with a square beyond 3e38.
    ({UP: (1, 0.0), DOWN: (1, 3e38)}, BACKWARD + UP + " of layer 1"),
    ({UP: (1, 0.0), DOWN: (1, 1e25)}, NORM + UP),
]


@pytest.mark.parametrize(("values", "expected"), PLANTS, ids=[expected for _, expected in PLANTS])
def test_the_first_number_to_go_bad_is_named(program, batch, state, values, expected: str):
    params = planted(state.params, values)
    assert diagnose(program, params, batch, 0) == expected
    _, metrics = program.train_step(jax.tree.map(jnp.copy, state.replace(params=params)), batch)
    assert metrics["skipped"]


def test_a_poisoned_row_of_the_embedding_is_found_by_a_rare_token(program, batch, state):
    config = program.config
    untied = dataclasses.replace(config, model=dataclasses.replace(config.model, tied=False))
    program = Program.on(untied)
    in_rows = {token: (batch.tokens == token).any(axis=1) for token in np.unique(batch.tokens).tolist()}
    token = next(token for token, rows in in_rows.items() if rows.any() and not rows[0])
    params = planted(state.params, {"embedding/table": (token, jnp.inf)})
    params |= {"unembedding": state.params["embedding"]}
    assert diagnose(program, params, batch, 0) == FORWARD + "embed"


@pytest.mark.slow
def test_in_rows_that_devices_share_the_layer_is_found_too(config: RunConfig, batch: Batch):
    program = Program.on(dataclasses.replace(config, mesh=MeshConfig(data=2, context=2, tensor=2)))
    params = planted(program.init().params, {"layers/attention/w_k": ((1, 0, 0, 0), float("nan"))})
    assert diagnose(program, params, batch, 0) == f"{FORWARD}k of layer 1"
