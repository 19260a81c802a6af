#!/usr/bin/env bash
# jax and jaxlib 0.10.2 (0.12.0.1 too): a gradient taken inside jax.shard_map, of a function that contains a psum.
#
# check_vma reads as a check that may be turned off: one would expect the same numbers with and without it.
# Seen: it decides the gradient. Of the square of a sum over 8 devices (56 for each value) check_vma=False gives 448,
# eight times as much: the transpose of psum is psum again, since nothing records that its result is the same on all
# devices. The gradient of a weight that all devices share is their sum with check_vma=True, and each device's own
# share without.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

jax.config.update("jax_num_cpu_devices", 8)
mesh = Mesh(np.array(jax.devices()), ("data",))
split, whole = PartitionSpec("data"), PartitionSpec()
x = jnp.arange(8.0)


def of_square(check_vma: bool) -> jax.Array:
    def local(x):
        return jax.grad(lambda x: jax.lax.psum(x.sum(), "data") ** 2)(x)

    return jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split, check_vma=check_vma)(x)


def of_shared_weight(check_vma: bool) -> list[float]:
    def local(w, x):
        gradient = jax.grad(lambda w: (w * x).sum())(w)
        return gradient.reshape(1) if not check_vma else jax.lax.pcast(gradient.reshape(1), "data", to="varying")

    found = jax.shard_map(local, mesh=mesh, in_specs=(whole, split), out_specs=split, check_vma=check_vma)(
        jnp.float32(1), x
    )
    return found.tolist()


right = jax.grad(lambda x: x.sum() ** 2)(x)
for check_vma in (True, False):
    print(
        f"check_vma={check_vma}: square of the sum {of_square(check_vma)[0]:g}; shared weight {of_shared_weight(check_vma)}"
    )
print(f"without shard_map: square of the sum {right[0]:g}; shared weight {x.sum():g}")
assert np.array_equal(of_square(True), right)
assert np.array_equal(of_square(False), 8 * right)
assert of_shared_weight(True) == [28.0] * 8
assert of_shared_weight(False) == x.tolist()
PYTHON
