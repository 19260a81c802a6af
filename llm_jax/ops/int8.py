"""Weights as int8 numbers with one scale for each output channel: a quarter of the memory to read for each token."""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int8

LARGEST = 127  # -128 stays unused, so that the range is symmetric


@struct.dataclass
class Quantized:
    """A matrix: `values * scale`, where `scale` belongs to an output channel."""

    values: Int8[Array, "*IO"]
    scale: Float[Array, "*O"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return self.values.shape

    def astype(self, dtype: Any) -> "Quantized":
        """Return itself: layers cast their weights to the dtype of their input, and these are cast as they are read."""
        return self

    def reshape(self, inputs: int, outputs: int) -> "Quantized":
        """Return it with one axis that is summed over, and one of output channels."""
        return Quantized(self.values.reshape(inputs, outputs), self.scale.reshape(outputs))


def quantize(w: Float[Array, "*IO"], inputs: int) -> Quantized:
    """Round a matrix whose first `inputs` axes are summed over, each output channel to its own 255 steps."""
    wide = w.astype(jnp.float32)
    largest = jnp.abs(wide).max(tuple(range(inputs)), keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, 1)
    return Quantized(jnp.round(wide / scale).astype(jnp.int8), scale.reshape(w.shape[inputs:]))
