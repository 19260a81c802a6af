#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU (0.12.0.1 too): jax.lax.ragged_dot, the product of groups of rows with a matrix each.
#
# One would expect the work of what it says: each row is multiplied with the one matrix of its group.
# Seen: the work of multiplying all rows with all matrices. For 8 experts the compiled program counts 8 times the
# floating-point operations and has temporaries of at least 8 times the rows; a batched product of the same groups counts
# those needed once and takes less than a quarter of the CPU time.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
JAX_PLATFORMS=cpu "$folder/bin/python" - <<'PYTHON'
import time

import jax
import jax.numpy as jnp

ROWS, WIDTH, OUT, EXPERTS = 4096, 256, 512, 8
x, w = jax.random.normal(jax.random.key(0), (ROWS, WIDTH)), jnp.ones((EXPERTS, WIDTH, OUT))
sizes = jnp.full(EXPERTS, ROWS // EXPERTS, jnp.int32)


def batched(x, w, sizes):
    return (x.reshape(EXPERTS, ROWS // EXPERTS, WIDTH) @ w).reshape(ROWS, OUT)


def seconds(compiled) -> float:
    """CPU time of the fastest of ten calls."""
    taken = []
    for _ in range(10):
        start = time.process_time()
        jax.block_until_ready(compiled(x, w, sizes))
        taken.append(time.process_time() - start)
    return min(taken)


needed, counted, held, times = 2 * ROWS * WIDTH * OUT, {}, {}, {}
for name, function in {"ragged_dot": jax.lax.ragged_dot, "batched": batched}.items():
    compiled = jax.jit(function).lower(x, w, sizes).compile()
    counted[name] = compiled.cost_analysis()["flops"] / needed
    held[name] = compiled.memory_analysis().temp_size_in_bytes / x.nbytes
    times[name] = seconds(compiled)
    print(f"{name}: {counted[name]:.2f} times the operations needed, {held[name]:.0f} times the rows in temporaries")
print(f"ragged_dot takes {times['ragged_dot'] / times['batched']:.0f} times the CPU time of the batched product")
assert round(counted["ragged_dot"]) == EXPERTS
assert round(counted["batched"]) == 1
assert held["ragged_dot"] >= EXPERTS > 1 > held["batched"]
assert times["ragged_dot"] > 4 * times["batched"]
PYTHON
