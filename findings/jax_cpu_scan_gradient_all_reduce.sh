#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU (0.12.0.1 too): gradients of microbatches, added up in a scan, rows split over
# devices.
#
# A sum of sums: one would expect that each device adds up its own gradients, and that the devices sum once, after the
# loop. The compiler sees the whole program and may change the order.
# Seen: an all-reduce in each iteration: four microbatches send four times the gradients. With the scan inside a
# shard_map and a psum after it they are sent once.
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
split, whole = PartitionSpec(None, "data"), PartitionSpec()
weight = jax.ShapeDtypeStruct((32, 32), jnp.float32, sharding=NamedSharding(mesh, whole))
batches = jax.ShapeDtypeStruct((4, 64, 32), jnp.float32, sharding=NamedSharding(mesh, split))


def gradients(w, batches):
    def add(total, x):
        return total + jax.grad(lambda w: (jnp.tanh(x @ w) ** 2).sum())(w), None

    return jax.lax.scan(add, jnp.zeros_like(w), batches)[0]


def summed_once(w, batches):
    def local(w, batches):
        return jax.lax.psum(gradients(w, batches), "data")

    return jax.shard_map(local, mesh=mesh, in_specs=(whole, split), out_specs=whole, check_vma=False)(w, batches)


def all_reduces(function) -> tuple[int, int]:
    """How many stand in the program, and how many of them in its loop."""
    text = jax.jit(function).lower(weight, batches).compile().as_text()
    body = re.search(r"body=%([\w.-]+)", text)[1]
    inside = re.search(rf"^%{re.escape(body)} .*?^}}", text, re.MULTILINE | re.DOTALL)[0]
    return text.count(" all-reduce("), inside.count(" all-reduce(")


plain, once = all_reduces(gradients), all_reduces(summed_once)
print(f"all-reduces, and those inside the loop of four: {plain}; summed after the loop: {once}")
assert plain == (1, 1)
assert once == (1, 0)
PYTHON
