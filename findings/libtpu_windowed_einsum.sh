#!/usr/bin/env bash
# jax and jaxlib 0.10.2 with libtpu 0.0.52, compiling for 16 chips of v5e: a batch times a weight, both split over
# chips.
#
# One would expect what the partitioner does on CPUs and GPUs: an all-gather of the weight, then one product.
# Seen: no all-gather. The product becomes a loop, a "windowed einsum": in each iteration collective-permutes bring the
# next shares of the weight from both neighbours while the last ones are multiplied. What counts all-gathers in the
# text of the program finds nothing sent, and the loop's products take twice the cycles, by the compiler's own
# estimate, of the product of the gathered weight; whether that pays depends on what else would hide the gather. One
# with_sharding_constraint that says that the weight is whole brings the all-gather back.
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
mesh = Mesh(np.array(devices), ("fsdp",))
split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
x = jax.ShapeDtypeStruct((64, 1024, 4096), jnp.bfloat16, sharding=split)
w = jax.ShapeDtypeStruct((4096, 11008), jnp.bfloat16, sharding=split)


def plain(x, w):
    return x @ w


def gathered(x, w):
    return x @ jax.lax.with_sharding_constraint(w, whole)


def cycles(text: str) -> int:
    return sum(int(number) for number in re.findall(r'"estimated_cycles":"(\d+)"', text))


def computation(text: str, name: str) -> str:
    return re.search(rf"^%{re.escape(name)} .*?^}}", text, re.MULTILINE | re.DOTALL)[0]


counts, estimates = {}, {}
for function in (plain, gathered):
    text = jax.jit(function, out_shardings=split).lower(x, w).compile().as_text()
    names = ("all-gather", "collective-permute-start", "while")
    counts[function] = {name: text.count(f" {name}(") for name in names}
    estimates[function] = cycles(text)
    if loop := re.search(r" while\(.*condition=%([\w.-]+), body=%([\w.-]+)", text):
        condition, body = (computation(text, name) for name in loop.groups())
        (limit,) = map(int, re.findall(r"constant\((\d+)\)", condition))
        step = 2  # the loop is unrolled by two
        estimates[function] += (limit // step - 1) * cycles(body)
    print(f"{function.__name__}: {counts[function]}, {estimates[function] / 1e6:.2f} million cycles of products")
assert counts[plain]["all-gather"] == 0 < counts[plain]["collective-permute-start"]
assert counts[plain]["while"] == 1
assert counts[gathered] == {"all-gather": 1, "collective-permute-start": 0, "while": 0}
assert estimates[plain] > 1.5 * estimates[gathered]
PYTHON
