#!/usr/bin/env bash
# jax and jaxlib 0.10.2, libtpu 0.0.52: lax.scan over a stack of layers whose first axis, the layers, is split.
#
# Eight layers on eight devices, one each: one would expect that an iteration fetches the one layer it reads.
# Seen: every device gathers the whole stack, then slices a layer out of it: compiled for a CPU once, before the loop;
# for a TPU v5e in each of the eight iterations, which send eight times the stack. So a device that keeps an eighth of
# the weights needs room for all of them. Where the layers' own rows are split instead, an iteration gathers one layer.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.52
export JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_LOG_DIR=disabled TPU_SKIP_MDS_QUERY=1
export TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost TPU_WORKER_ID=0 # asked for by any target
"$folder/bin/python" - <<'PYTHON'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)
LAYERS, WIDTH = 8, 1024


def forward(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def gathered(devices: list, spec: tuple) -> tuple[list[str], list[str]]:
    """The shapes that all-gathers give, in the loop and outside of it."""
    mesh = Mesh(np.array(devices), ("x",))
    shapes = {(64, WIDTH): ("x",), (LAYERS, WIDTH, WIDTH): spec}
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
        for shape, axes in shapes.items()
    ]
    loop, outside = jax.jit(forward).lower(*arrays).compile().as_text().split("\nENTRY ")
    return tuple(re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text) for text in (loop, outside))


targets = {"cpu": jax.devices(), "v5e": topologies.get_topology_desc(topology_name="v5e:2x4", platform="tpu").devices}
found = {(name, spec): gathered(devices, spec) for name, devices in targets.items() for spec in (("x",), (None, "x"))}
for (name, spec), (loop, outside) in found.items():
    print(f"{name}, {'layers' if spec == ('x',) else 'rows'} split: gathered in an iteration {loop}, outside {outside}")
stack, layer = f"{LAYERS},{WIDTH},{WIDTH}", f"{WIDTH},{WIDTH}"
assert found["cpu", ("x",)] == ([], [stack])
assert found["v5e", ("x",)] == ([stack], [])
assert found["cpu", (None, "x")] == ([layer], [])
assert found["v5e", (None, "x")][0] in ([layer], ["1," + layer])
PYTHON
