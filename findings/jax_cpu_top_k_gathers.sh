#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU: jax.lax.top_k of the last axis, where the first one is split over devices.
#
# Each row is chosen from by itself: one would expect that each device chooses for its rows and nothing is sent, as with
# argmax and sort of the same array.
# Seen: an all-gather of all rows to every device. For a router over tokens this is the whole batch.
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
mesh = Mesh(np.array(jax.devices()), ("data",))
rows = jax.ShapeDtypeStruct((64, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))


def sent(function) -> list[str]:
    """The shapes that collectives give in the compiled program."""
    text = jax.jit(function).lower(rows).compile().as_text()
    return re.findall(r"= (\w+\[[\d,]*\])\S* (?:all-|collective-|reduce-scatter)", text)


gathered, none = sent(lambda x: jax.lax.top_k(x, 2)), [sent(lambda x: x.argmax(-1)), sent(lambda x: jnp.sort(x, -1))]
print(f"top_k: {gathered}; argmax, sort: {none}")
assert gathered == ["f32[64,16]"]
assert none == [[], []]
PYTHON
