"""Matrix products in C++: `product.h`."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llm_jax.ops.native.build import call


def matmuls(
    x: Float[Array, "M K"],
    weights: Sequence[Float[Array, "..."]],
    biases: Sequence[Float[Array, "..."] | None],
    *,
    transposed: bool = False,
) -> list[Float[Array, "M ..."]]:
    """Return `x @ w + bias` for each weight [K N], or `transposed`, `x @ w.T + bias` for each that is stored as [N K].

    Together they cost less: there is one gradient of `x`, which is not added up in memory.
    """
    return _linear(transposed, x, list(weights), [jnp.zeros(0, x.dtype) if b is None else b for b in biases])


def matmul(x: Float[Array, "M K"], w: Float[Array, "..."], *, transposed: bool = False) -> Float[Array, "M N"]:
    """Return `x @ w`, or `x @ w.T`: `matmuls` with one weight."""
    return matmuls(x, [w], [None], transposed=transposed)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(transposed: bool, x: Array, weights: list[Array], biases: list[Array]) -> list[Array]:
    return _linear_forward(transposed, x, weights, biases)[0]


def _linear_forward(
    transposed: bool, x: Array, weights: list[Array], biases: list[Array]
) -> tuple[list[Array], tuple[Array, list[Array], list[Array]]]:
    out = [jax.ShapeDtypeStruct((len(x), w.shape[0 if transposed else 1]), x.dtype) for w in weights]
    return call("linear", out, x, *weights, *biases, transposed=transposed), (x, weights, biases)


def _linear_backward(
    transposed: bool, saved: tuple[Array, list[Array], list[Array]], g: list[Array]
) -> tuple[Array, list[Array], list[Array]]:
    x, weights, biases = saved
    dx, *rest = call("linear_backward", [x, *weights, *biases], x, *weights, *g, transposed=transposed)
    return dx, rest[: len(weights)], rest[len(weights) :]


_linear.defvjp(_linear_forward, _linear_backward)


def products(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Keep products of `matmuls` for the backward pass: a policy of `jax.checkpoint`."""
    return primitive.name == "ffi_call" and parameters.get("target_name") == "llm_jax_linear"
