"""Activation functions of the feed-forward layer, by the names that a config gives them."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from llm_jax.ops import native


def _smooth(name: str, plain: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Return `plain`, in native code where that runs."""
    return lambda x: native.activate(name, x) if native.covers(x) else plain(x)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": _smooth("gelu", jax.nn.gelu),  # the tanh form, as GPT-2 has it
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": _smooth("silu", jax.nn.silu),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),  # So et al. 2021, arXiv:2109.08668
}
