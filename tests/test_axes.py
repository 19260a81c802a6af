"""The sizes of a mesh: what is left, and what does not fit, with the numbers."""

import pytest

from llm_jax.axes import MeshConfig, mesh_sizes


def test_a_size_of_minus_one_is_what_the_others_leave():
    assert mesh_sizes(MeshConfig(fsdp=2, tensor=2), 8) == {
        "pipeline": 1,
        "data": 2,
        "fsdp": 2,
        "expert": 1,
        "context": 1,
        "tensor": 2,
    }
    assert mesh_sizes(MeshConfig(), 3)["data"] == 3


def test_sizes_that_do_not_fit_the_devices_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="'tensor': 3} takes a multiple of 3 devices, but there are 8; choose"):
        mesh_sizes(MeshConfig(tensor=3), 8)
    with pytest.raises(ValueError, match="takes 2 devices, but there are 8; choose"):
        mesh_sizes(MeshConfig(data=2), 8)
    with pytest.raises(ValueError, match="takes a multiple of 16 devices, but there are 8"):
        mesh_sizes(MeshConfig(tensor=16), 8)
    for wrong in ({"data": 0}, {"tensor": -2}, {"data": -1, "fsdp": -1}):
        with pytest.raises(ValueError, match="mesh sizes are positive, and at most one is -1"):
            MeshConfig(**wrong)
