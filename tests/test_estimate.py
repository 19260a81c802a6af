"""Arithmetic about a config on a mesh agrees with shardings, and with what compiled programs send (test_budget.py)."""

import dataclasses
from pathlib import Path

import pytest
from tiny_run import tiny

from llm_jax.config import replace
from llm_jax.plan import hlo
from llm_jax.plan.estimate import flops_a_token, gradient_bytes, numbers_here, rate_along
from llm_jax.plan.plan import bytes_here
from llm_jax.plan.topology import parse_topology
from llm_jax.plan.traffic import traffic_of
from llm_jax.sharding import MeshConfig
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

CPU = parse_topology("cpu:8")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return dataclasses.replace(tiny(Path("nowhere")), mesh=MeshConfig(data=2, fsdp=4), accumulate=1)


def test_letters_and_shardings_give_a_device_the_same_parameters(config):
    experts = {"model.layers": ("global+moe",), "model.experts.number": 4}
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    program = Program.on(replace(config, mesh=mesh, **experts), CPU.devices())
    params = program.abstract_state.params
    assert 4 * numbers_here(params, program.mesh.shape) == bytes_here(params)


def test_gradients_are_float32_where_microbatches_add_up(config):
    half = replace(config, **{"model.dtype": "bfloat16"})
    alone, stages = {"pipeline": 1}, {"pipeline": 2}
    assert gradient_bytes(half, alone) == 2
    assert gradient_bytes(half, stages) == gradient_bytes(replace(half, accumulate=2), alone) == 4


def test_only_stages_that_there_are_compute_their_layers_again(config):
    left = replace(config, **{"mesh.data": 1, "mesh.pipeline": -1})
    one, two = (flops_a_token(left, {"pipeline": stages}) for stages in (1, 2))
    assert one["with recomputation"] == one["model"]
    head = 6 * config.model.vocab_size * config.model.d_model
    assert two["with recomputation"] == pytest.approx(one["model"] + (one["model"] - head) / 3)


def test_bytes_between_slices_go_at_the_rate_of_their_network():
    two = parse_topology("v5e:2x2", slices=2)
    assert (two.n_devices, two.island, str(two)) == (8, 4, "2 slices of v5e:2x2")
    text = """\
ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %a = f32[256]{0} all-reduce(%x), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %b = f32[256]{0} all-reduce(%a), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""
    mesh = {"data": 2, "fsdp": 4}
    found = {one.axes: one for one in traffic_of(hlo.collectives(hlo.parse(text), mesh), mesh, two)}
    assert found["data"].seconds == found["data"].bytes / two.chip.network_rate
    assert found["fsdp"].seconds == found["fsdp"].bytes / two.chip.link_rate
    assert rate_along(["fsdp"], {"data": 1, "fsdp": 8}, two) == two.chip.network_rate
    assert rate_along(["data"], {"data": 1, "fsdp": 8}, two) == two.chip.link_rate
