"""The dtype that a model computes in: one cast of the whole tree, but for the few numbers that are too delicate."""

import re
from typing import Any

from jaxtyping import Array, PyTree

from llm_jax.tree import map_with_path

# What moves by less than bfloat16 can tell, or is read through an exponential. They are small, and stay float32.
DELICATE = r"/(router_bias|log_rate|b_decay)$"


def in_dtype(params: PyTree, dtype: Any) -> PyTree:
    """Return the parameters in `dtype`, but for `DELICATE` ones."""

    def one(path: str, x: Array) -> Array:
        return x if re.search(DELICATE, path) else x.astype(dtype)

    return map_with_path(one, params)
