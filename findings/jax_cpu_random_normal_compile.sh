#!/usr/bin/env bash
# jax and jaxlib 0.10.2 on a CPU (0.12.0.1 too): how long one jax.random.normal of a fixed shape takes to compile.
#
# It is one line, drawn once: one would expect it to compile faster than the gradient of a feed-forward layer.
# Seen: it takes more than three times as long. Most of it is the hash that draws the bits: jax.random.bits takes more
# than half of a normal, and more than three times what the inverse error function takes. LLVM optimizes it anew for
# each shape: eight leaves of eight shapes take more than three times as long as one. Without LLVM's optimizations those
# eight take less than a third; eight draws inside lax.map, of one shape, less than half.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 jaxlib==0.10.2
cat >"$folder/compile.py" <<'PYTHON'
import json
import time

import jax
import jax.numpy as jnp

key = jax.random.key(0)


def seconds(function, *args) -> float:
    """CPU time of compiling; tracing and lowering are not in it."""
    lowered = jax.jit(function).lower(*args)
    start = time.process_time()
    lowered.compile()
    return time.process_time() - start


def draw(key, width=16):
    return jax.random.normal(key, (8, 32, width))


def eight_shapes(key):
    return [draw(key, 16 + i) for i, key in enumerate(jax.random.split(key, 8))]


def in_a_map(key):
    return jax.lax.map(draw, jax.random.split(key, 8))


def feedforward(x, w_in, w_out):
    return (jax.nn.gelu(x @ w_in) @ w_out).sum()


seconds(jnp.sin, 1.0)  # the first compile of a process starts the compiler
ones = [jnp.ones(shape) for shape in ((32, 64), (64, 256), (256, 64))]
print(
    json.dumps(
        {
            "gradient": seconds(jax.grad(feedforward, (1, 2)), *ones),
            "erf_inv": seconds(jax.lax.erf_inv, jnp.ones((8, 32, 16))),
            "bits": seconds(lambda key: jax.random.bits(key, (8, 32, 15)), key),
            "normal": seconds(draw, key),
            "eight_shapes": seconds(eight_shapes, key),
            "in_a_map": seconds(in_a_map, key),
        }
    )
)
PYTHON
export JAX_PLATFORMS=cpu
unset XLA_FLAGS JAX_COMPILATION_CACHE_DIR
"$folder/bin/python" "$folder/compile.py" >"$folder/optimized"
XLA_FLAGS=--xla_backend_optimization_level=0 "$folder/bin/python" "$folder/compile.py" >"$folder/plain"
"$folder/bin/python" - "$folder/optimized" "$folder/plain" <<'PYTHON'
import json
import sys
from pathlib import Path

optimized, plain = (json.loads(Path(name).read_text()) for name in sys.argv[1:])
one = optimized["normal"]
for name, value in optimized.items():
    print(f"{name}: {value / one:.2f} of one normal; {plain[name] / one:.2f} without LLVM's optimizations")
assert one > 3 * optimized["gradient"]
assert optimized["bits"] > max(one / 2, 3 * optimized["erf_inv"])
assert optimized["eight_shapes"] > 3 * one
assert optimized["eight_shapes"] > 3 * plain["eight_shapes"]
assert optimized["in_a_map"] < optimized["eight_shapes"] / 2
PYTHON
