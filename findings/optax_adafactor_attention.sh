#!/usr/bin/env bash
# optax 0.2.8: adafactor, and the weights of attention with an axis for heads.
#
# Adafactor is chosen for its memory: of a matrix it keeps a number a row and a number a column (arXiv:1804.04235). One
# would expect that of the query projection of GPT-2, 768 to 12 heads of 64, which is a matrix of 768 by 768.
# Seen: scale_by_factored_rms takes the two largest axes of an array wherever they are, and factors only if both are
# at least 128 long. With an axis of heads nothing is factored, and the state is as large as that of RMSProp. In a stack
# of 128 layers the axis of layers counts as one of the two: a mean over layers is kept, which is another optimizer.
set -euo pipefail
folder=$(mktemp -d) && trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder" && "$folder/bin/pip" install -q jax==0.10.2 optax==0.2.8
JAX_PLATFORMS=cpu "$folder/bin/python" - <<'PYTHON'
import jax
import jax.numpy as jnp
import optax


def numbers(*shape: int) -> int:
    """How many numbers of second moments adafactor keeps for a weight of this shape."""
    state = jax.eval_shape(optax.scale_by_factored_rms().init, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)})
    return sum(leaf.size for leaf in jax.tree.leaves((state.v_row, state.v_col, state.v)))


flat, heads, stacked = numbers(768, 768), numbers(768, 12, 64), numbers(128, 768, 12, 64)
print(f"768 x 768: {flat:,} numbers for {768 * 768:,} weights")
print(f"768 x 12 x 64: {heads:,} numbers for the same weights")
print(f"128 layers of 768 x 12 x 64: {stacked:,} numbers; a factored matrix a layer would be {128 * flat:,}")
assert flat < 2_000
assert heads >= 768 * 768
state = jax.eval_shape(optax.scale_by_factored_rms().init, {"w": jax.ShapeDtypeStruct((128, 768, 12, 64), jnp.float32)})
shapes = {state.v_row["w"].shape, state.v_col["w"].shape}
print("kept:", *sorted(shapes))
assert shapes == {(128, 12, 64), (768, 12, 64)}  # the second one is a mean over layers
PYTHON
