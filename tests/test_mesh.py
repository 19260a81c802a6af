"""What a config needs of a mesh is checked before anything is traced, and the nearest that works is named."""

import dataclasses
from pathlib import Path

import pytest
from tiny_run import tiny

from llm_jax.model.config import AttentionConfig
from llm_jax.ops.experts import Experts
from llm_jax.sharding import MeshConfig
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program
from llm_jax.train.step import LossConfig


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (None, r"mesh.expert=4 has no experts to split; set mesh.expert=1, and mesh.data 4 times as large"),
        (
            Experts(number=6),
            r"model.experts.number=6 does not divide over mesh.expert=4; use mesh.expert=2 or model.experts.number=8",
        ),
    ],
    ids=["none", "six"],
)
def test_experts_that_do_not_divide_are_refused_with_what_does(experts: Experts | None, message: str):
    config = tiny(Path("nowhere"), mesh=MeshConfig(expert=4))
    layers = ("global",) if experts is None else ("global+moe",)
    model = dataclasses.replace(config.model, layers=layers, experts=experts)
    with pytest.raises(ValueError, match=message):
        Program.on(dataclasses.replace(config, model=model))


@pytest.mark.parametrize(
    ("mesh", "model", "changes", "message"),
    [
        ({"tensor": 4}, {}, {}, "2 key/value heads do not divide over mesh.tensor=4; use mesh.tensor=2 or model.n_kv"),
        ({"tensor": 2}, {"vocab_size": 267}, {}, "V=267 does not divide over mesh axis tensor=2; .* pad V to 268"),
        ({"tensor": 2}, {"d_ff": 33}, {}, "F=33 does not divide over mesh axis tensor=2"),
        (
            {"context": 8, "tensor": 1},
            {"seq_len": 24},
            {},
            "=24 .*context=8 .*= 8 devices, .*two slices.* zigzag; .*=16 or 32",
        ),
        ({"context": 4, "tensor": 2}, {}, {"loss": LossConfig(chunk=4)}, "loss.chunk=4 .* 8 devices.*loss.chunk=8"),
        ({"context": 2}, {"layers": ("delta", "linear")}, {}, "delta and linear layers .*; use mesh.context=1"),
        ({"context": 2}, {"how": "flash"}, {}, "flash takes whole rows, .*; use one of ring, zigzag, ulysses"),
        ({"context": 4}, {"how": "ulysses"}, {}, "splits 2 key/value heads a device over mesh.context=4"),
        ({"context": 2}, {"how": "ulysses", "positions": "alibi"}, {}, "ulysses has no alibi"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_what_a_mesh_can_not_split_is_refused_with_the_nearest_that_it_can(
    config: RunConfig, mesh, model, changes, message
):
    data = dataclasses.replace(config.data, seq_len=model.pop("seq_len", 32))
    attention = AttentionConfig(implementation=model.pop("how", None))
    model = dataclasses.replace(config.model, attention=attention, **model)
    config = dataclasses.replace(config, mesh=MeshConfig(**mesh), model=model, data=data, **changes)
    with pytest.raises(ValueError, match=message):
        _ = Program.on(config).abstract_state


def test_a_microbatch_that_does_not_divide_is_an_error_with_the_numbers(config: RunConfig):
    message = (
        r"4 rows \(data.batch_size=16 / accumulate=4\) does not divide over data x fsdp x expert = 8 .*"
        r"use data.batch_size=32"
    )
    with pytest.raises(ValueError, match=message):
        Program.on(tiny(Path("nowhere"), accumulate=4))
