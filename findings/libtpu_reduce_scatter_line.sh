#!/usr/bin/env bash
# jax and jaxlib 0.10.2 with libtpu 0.0.52, compiling for 16 chips of v5e: lax.psum_scatter over all of them.
#
# Each chip keeps a sixteenth of the sum. One would expect a reduce-scatter, which sends half of what an all-reduce
# does.
# Seen: an all-reduce, of which each chip then keeps its share. Along one line of four chips, either way, it is a
# reduce-scatter; over the two lines of the 4x4 torus at once it is not. The memory and the communication that the
# scatter was meant to save are spent.
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

devices = topologies.get_topology_desc(topology_name="v5e:4x4", platform="tpu").devices
mesh = Mesh(np.array(devices).reshape(4, 4), ("y", "x"))
x = jax.ShapeDtypeStruct((2048, 32000), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))


def collectives(axes) -> list[str]:
    def local(x):
        return jax.lax.psum_scatter(x, axes, tiled=True)

    scattered = jax.shard_map(
        local, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(axes), check_vma=False
    )
    return re.findall(r" (reduce-scatter|all-reduce)\(", jax.jit(scattered).lower(x).compile().as_text())


found = {axes: collectives(axes) for axes in ("x", "y", ("y", "x"))}
for axes, names in found.items():
    print(f"psum_scatter over {axes}: {names}")
assert found == {"x": ["reduce-scatter"], "y": ["reduce-scatter"], ("y", "x"): ["all-reduce"]}
PYTHON
