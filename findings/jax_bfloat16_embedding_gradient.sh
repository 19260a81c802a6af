#!/usr/bin/env bash
# jax and jaxlib 0.10.2 (0.12.0.1 too): the gradient of looking rows up in a bfloat16 table.
#
# jnp.sum and jnp.cumsum of a thousand bfloat16 ones give 1000: JAX adds in float32 and rounds once. One would expect
# the same of a gradient that is a sum over a thousand tokens.
# Seen: 256. The scatter-add of the backward pass adds in bfloat16, where 256 + 1 rounds to 256: however often a token
# occurs, its row hears no more than 256 equal terms. jax.ops.segment_sum does the same. No warning.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp

ids = jnp.zeros(1000, jnp.int32)
ones = jnp.ones(1000, jnp.bfloat16)


def gradient(dtype) -> float:
    return float(jax.jit(jax.grad(lambda table: table[ids].sum()))(jnp.ones((4, 1), dtype))[0, 0])


found = {"sum": ones.sum(), "cumsum": ones.cumsum()[-1], "segment_sum": jax.ops.segment_sum(ones, ids, 4)[0]}
for name, value in found.items():
    print(f"{name} of 1000 bfloat16 ones: {float(value):g}")
print(
    f"gradient of a row read 1000 times: {gradient(jnp.float32):g} in float32, {gradient(jnp.bfloat16):g} in bfloat16"
)
assert found["sum"] == found["cumsum"] == gradient(jnp.float32) == 1000
assert found["segment_sum"] == gradient(jnp.bfloat16) == 256
PYTHON
