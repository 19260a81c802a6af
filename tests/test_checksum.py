"""A checksum tells a leaf from any other, by one bit, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.runs.checksum import checksums, not_finite
from llm_jax.sharding import MeshConfig, make_mesh


@given(
    st.sampled_from([np.float32, np.float16, jnp.bfloat16, np.int32]),
    st.integers(0, 15),
    st.integers(0, 59),
)
def test_every_flipped_bit_changes_the_checksum(dtype, bit: int, place: int):
    x = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(dtype)
    flipped = x.copy()
    flipped.view(f"uint{8 * x.itemsize}").reshape(-1)[place] ^= 1 << bit
    assert int(checksums({"x": x})["x"]) != int(checksums({"x": flipped})["x"])


def test_swapped_numbers_change_the_checksum():
    x = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    assert int(checksums({"x": x})["x"]) != int(checksums({"x": x[:, ::-1].copy()})["x"])


def test_the_checksum_is_the_same_on_every_mesh():
    x = jax.random.normal(jax.random.key(0), (16, 24))
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    for spec in (PartitionSpec("fsdp"), PartitionSpec("tensor", "fsdp"), PartitionSpec(None, "fsdp")):
        split = jax.device_put(x, NamedSharding(mesh, spec))
        assert int(checksums({"x": split})["x"]) == int(checksums({"x": x})["x"])


def test_flags_and_complex_numbers_have_checksums():
    """As the state of `optax.apply_if_finite`, and the parameters of some state-space layers."""
    flags, waves = jnp.array([True, False, True]), jnp.array([1 + 2j, 3 - 1j], jnp.complex64)
    found = checksums({"flags": flags, "waves": waves})
    assert {str(x.dtype) for x in found.values()} == {"uint32"}
    assert checksums({"flags": ~flags})["flags"] != found["flags"]
    assert checksums({"waves": waves.conj()})["waves"] != found["waves"]
    assert not_finite({"flags": flags, "waves": waves}) is None
