#!/usr/bin/env bash
# jax and jaxlib 0.10.2 with libtpu 0.0.52, compiling for a TPU v5p of 64 chips: jax.make_mesh with two axes of eight.
#
# 64 chips are 8 x 8: one would expect a mesh, as on a v5e or on CPU devices, or an argument to ask for one.
# Seen: NotImplementedError. A 4x4x4 torus has axes of four, and make_mesh wants each mesh axis to be a product of whole
# ones: of the seven ways to write 64 as a x b three are refused. mesh_utils.create_device_mesh takes all seven with
# allow_split_physical_axes=True, which make_mesh does not pass on.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2 libtpu==0.0.52
export JAX_PLATFORMS=cpu ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_LOG_DIR=disabled TPU_SKIP_MDS_QUERY=1
export TPU_ACCELERATOR_TYPE=v5litepod-4 TPU_WORKER_HOSTNAMES=localhost TPU_WORKER_ID=0 # asked for by any target
"$folder/bin/python" - <<'PYTHON'
import inspect

import jax
from jax.experimental import mesh_utils, topologies

devices = topologies.get_topology_desc(topology_name="v5p:4x4x4", platform="tpu").devices
refused = []
for size in (1, 2, 4, 8, 16, 32, 64):
    shape = (size, 64 // size)
    assert mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True).shape == shape
    try:
        jax.make_mesh(shape, ("data", "fsdp"), devices=devices, axis_types=(jax.sharding.AxisType.Auto,) * 2)
    except NotImplementedError as error:
        refused.append(shape)
        print(f"{shape[0]} x {shape[1]}: {str(error)[:100]} ...")
print(f"refused: {refused}")
assert refused == [(2, 32), (8, 8), (32, 2)]
assert "split" not in str(inspect.signature(jax.make_mesh))
PYTHON
