#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU (0.12.0.1 too): jnp.multiply.outer of an array whose second axis is split over
# devices.
#
# Each result is a product of two numbers, and lies where its row lies: one would expect that nothing is sent, as by
# the same product with a new axis.
# Seen: an all-gather of the whole array. (`outer` flattens both arguments first, and the split axis is not the outer one
# of the flat array.) Rotary angles, positions times frequencies, are such a product.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/bin/python" - <<'PYTHON'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)
mesh = Mesh(np.array(jax.devices()), ("context",))
positions = jax.ShapeDtypeStruct((4, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "context")))
frequencies = jax.ShapeDtypeStruct((16,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))


def sent(function) -> list[str]:
    """The shapes that collectives give in the compiled program."""
    text = jax.jit(function).lower(positions, frequencies).compile().as_text()
    return re.findall(r"= (\w+\[[\d,]*\])\S* (?:all-|collective-|reduce-scatter)", text)


outer, broadcast = sent(jnp.multiply.outer), sent(lambda a, b: a[..., None] * b)
print(f"jnp.multiply.outer: {outer}; a[..., None] * b: {broadcast}")
assert outer == ["f32[4,64]"]
assert broadcast == []
PYTHON
