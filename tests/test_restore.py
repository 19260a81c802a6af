"""The weights of a run come to the devices that are here, whatever it was trained on."""

import dataclasses

import jax
from tiny_run import tiny

from llm_jax.runs.restore import on_all_devices, on_one_device, on_the_host
from llm_jax.sharding import MeshConfig


def test_a_mesh_that_does_not_fit_here_gives_way_to_one_device(tmp_path):
    config = tiny(tmp_path)
    assert on_all_devices(dataclasses.replace(config, mesh=MeshConfig(fsdp=4))).mesh.size == jax.device_count()
    assert on_all_devices(dataclasses.replace(config, mesh=MeshConfig(data=3))).mesh.size == 1
    assert on_one_device(config).mesh.devices.ravel().tolist() == jax.devices()[:1]


def test_the_host_holds_all_of_a_model_that_waits_there_in_training(tmp_path):
    program = on_the_host(dataclasses.replace(tiny(tmp_path), offload="state"))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(program.abstract_state)} == {
        jax.devices()[0].default_memory().kind
    }
