"""What cross-entropy reads of logits, in C++: `softmax.h`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from llm_jax.ops.native.build import call


@jax.custom_vjp
def log_z_and_picked(
    logits: Float[Array, "*T V"], targets: Int[Array, "*T"]
) -> tuple[Float[Array, "*T"], Float[Array, "*T"]]:
    """Return logsumexp of each row, and the logit of its target; 0 for a target that is none of the V."""
    return _forward(logits, targets)[0]


def _forward(logits: Array, targets: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    row, targets = jax.ShapeDtypeStruct(targets.shape, jnp.float32), targets.astype(jnp.int32)
    log_z, picked = call("log_z", (row, row), logits, targets)
    return (log_z, picked), (logits, targets, log_z)


def _backward(saved: tuple[Array, Array, Array], g: tuple[Array, Array]) -> tuple[Array, None]:
    return call("log_z_backward", saved[0], *saved, *g), None


log_z_and_picked.defvjp(_forward, _backward)
