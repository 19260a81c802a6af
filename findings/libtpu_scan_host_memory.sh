#!/usr/bin/env bash
# jax and jaxlib 0.10.2 with libtpu 0.0.52: Adam's moments in host memory, for a stack of 16 layers, updated by a scan.
#
# A scan reads a layer of its inputs and writes a layer of its outputs in each iteration, and the arguments are donated.
# One would expect it to move one layer at a time and to need next to nothing beside, as the loop that it is.
# Seen: `scan` with the moments as inputs and outputs sets 0.99 GB of the device apart and a second copy of the moments
# (1.44 GB) on the host. A fori_loop that carries the same stacks, slices a layer and puts it back sets 0.23 GB apart,
# most of it for two layers on their way, and no copy. The update written without a loop takes 2.89 GB, twice the
# moments. (v5e:2x2, layers of 4096 x 11008 in float32 over four chips.)
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.52
export JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_LOG_DIR=disabled TPU_SKIP_MDS_QUERY=1
export TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost TPU_WORKER_ID=0 # asked for by any target
"$folder/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

LAYERS, GB = 16, 1e9
devices = topologies.get_topology_desc(topology_name="v5e:2x2", platform="tpu").devices
on_device = NamedSharding(Mesh(np.array(devices), ("fsdp",)), PartitionSpec(None, "fsdp"))
on_host = on_device.with_memory_kind("pinned_host")


def stack(where, dtype=jnp.float32):
    return jax.ShapeDtypeStruct((LAYERS, 4096, 11008), dtype, sharding=where)


def moved(tree, space):
    return jax.tree.map(lambda x: jax.device_put(x, space), tree)


def update(weight, moments, gradient):
    """Adam on a layer, or on all: the moments come to the device and go back."""
    gradient = gradient.astype(jnp.float32)
    mean, square = moved(moments, jax.memory.Space.Device)
    mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
    weight = weight - 1e-3 * mean / (jnp.sqrt(square) + 1e-8)
    return weight, moved((mean, square), jax.memory.Space.Host)


def scan(*stacks):
    return jax.lax.scan(lambda _, layer: (None, update(*layer)), None, stacks)[1]


def fori_loop(weights, moments, gradients):
    def at(i, stacks):
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacks)

    def one(i, carried):
        new = update(*at(i, carried), at(i, gradients))
        return jax.tree.map(lambda x, layer: jax.lax.dynamic_update_index_in_dim(x, layer, i, 0), carried, new)

    return jax.lax.fori_loop(0, LAYERS, one, (weights, moments))


arguments = (stack(on_device), (stack(on_host), stack(on_host)), stack(on_device, jnp.bfloat16))
device, host = {}, {}
for function in (update, scan, fori_loop):
    jitted = jax.jit(function, donate_argnums=(0, 1), out_shardings=(on_device, (on_host, on_host)))
    found = jitted.lower(*arguments).compile().memory_analysis()
    device[function], host[function] = found.temp_size_in_bytes, found.host_temp_size_in_bytes
    print(
        f"{function.__name__}: temporaries {device[function] / GB:.2f} GB on the device, {host[function] / GB:.2f} on the host"
    )
moments = found.host_argument_size_in_bytes
assert device[update] > 1.9 * moments
assert device[scan] > 3 * device[fori_loop]
assert host[scan] >= moments > host[update] == host[fori_loop] == 0
PYTHON
