#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU (0.12.0.1 too): jax.lax.ragged_dot, the product of groups of rows with a matrix each.
#
# One would expect the work of what it says: each row is multiplied with the one matrix of its group.
# Seen: all rows are multiplied with all matrices, against zeros. For 8 experts the compiled program counts 8 times the
# floating-point operations and holds all rows 8 times; a batched product of the same groups takes a tenth of its time.
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


needed, times = 2 * ROWS * WIDTH * OUT, {}
for name, function in {"ragged_dot": jax.lax.ragged_dot, "batched": batched}.items():
    compiled = jax.jit(function).lower(x, w, sizes).compile()
    operations, temporary = compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes
    times[name] = seconds(compiled)
    print(
        f"{name}: {operations / needed:.2f} times the operations needed, {temporary / x.nbytes:.0f} times x in temporaries"
    )
    assert (operations > 7.9 * needed) == (temporary >= EXPERTS * x.nbytes) == (name == "ragged_dot")
print(f"ragged_dot takes {times['ragged_dot'] / times['batched']:.0f} times the CPU time of the batched product")
assert times["ragged_dot"] > 4 * times["batched"]
PYTHON
