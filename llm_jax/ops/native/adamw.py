"""AdamW in C++: `adamw.h`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from llm_jax.ops.native.build import call


def global_norm(arrays: Sequence[Array]) -> Float[Array, ""]:
    """Return the square root of the sum of the squares of all numbers."""
    return call("global_norm", jax.ShapeDtypeStruct((), jnp.float32), *arrays)


@struct.dataclass
class Moments:
    """Parameters, and the running means of their gradients and of the squares of these."""

    params: list[Array]
    first: list[Array]
    second: list[Array]


def adamw(
    state: Moments,
    gradients: Sequence[Array],
    finite: Bool[Array, ""],
    scale: Float[Array, ""],
    rate: Float[Array, ""],
    steps: Int[Array, ""],
    *,
    b1: float,
    b2: float,
    eps: float,
    decay: Sequence[float],
) -> tuple[Moments, Bool[Array, ""]]:
    """Return the state after a step of AdamW (arXiv:1711.05101) and whether it was taken; `state` is overwritten.

    Where `finite` is false, or the norm of the new parameters would not be finite, the state stays as it is.

    Args:
      scale: of the gradients, as the sum over tokens and clipping ask for.
      steps: how many with this one.
      decay: the weight decay of each array.
    """
    n = steps.astype(jnp.float32)
    now = jnp.stack([finite.astype(jnp.float32), scale, rate, 1 / (1 - b1**n), 1 / (1 - b2**n)])
    kept, tree = jax.tree.flatten(state)
    like = [jax.ShapeDtypeStruct((), jnp.float32), *kept]
    constants = {
        "b1": np.float32(b1),
        "b2": np.float32(b2),
        "eps": np.float32(eps),
        "decay": np.asarray(decay, np.float32),
    }
    aliases = {i: i for i in range(1, len(like))}
    done, *new = call("adamw", like, now, *kept, *gradients, aliases=aliases, **constants)
    return tree.unflatten(new), done > 0
