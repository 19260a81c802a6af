"""Identities and sums whose gradients XLA's CPU compiler would make slow. What they compute is what they say."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def settle(x: Array) -> Array:
    """`x`, and in the backward pass its gradient, computed once.

    On CPU a barrier keeps XLA from deriving a value with several readers anew in each of them: the residual stream
    with the whole chain above it, or the gradient of an activation function once for each matrix product that reads
    it. Other compilers do better without.
    """
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda y: y)


@jax.custom_vjp
def add_bias(x: Float[Array, "B L *O"], bias: Float[Array, "*O"]) -> Float[Array, "B L *O"]:
    """`x + bias`, whose bias gradient is a matrix product rather than a reduction."""
    return x + jnp.broadcast_to(bias, x.shape)


def _add_bias_backward(bias: Array, g: Array) -> tuple[Array, Array]:
    return g, over_tokens(g).astype(bias.dtype)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), bias), _add_bias_backward)


def over_tokens(x: Float[Array, "B L *O"]) -> Float[Array, "*O"]:
    """The sum over B and L as a product with ones: a CPU has fast matrix products and slow column sums."""
    return jnp.tensordot(jnp.ones(x.shape[:2], x.dtype), x, axes=2, preferred_element_type=jnp.float32)
