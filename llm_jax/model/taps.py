"""Named activations: look at them, or replace them.

    taps = capture(model, params, tokens)              # {"resid_pre": [N, B, L, D], ..., "logits": [B, L, V]}
    logits = edit(model, params, tokens, {"attn_out": jnp.zeros((N, B, L, D))})

Both are pure: they return what they found and change nothing. A tap that nobody asks for leaves no trace in the
jaxpr.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from llm_jax.config import nearest
from llm_jax.model.config import TAPS
from llm_jax.model.pattern import rows_by_path
from llm_jax.model.stack import gather
from llm_jax.tree import leaves


def tap(module: nn.Module, name: str, x: Array, kept: tuple[str, ...] = ()) -> Array:
    """Return `x`, or the entry `name` of the `edits` collection instead; sow it to `taps` if that is collected.

    `kept` are the names that rematerialization keeps: those, and only those, are marked for `jax.checkpoint`. Raise
    `ValueError` for an edit of another shape.
    """
    if module.has_variable("edits", name):
        x = _replacement(name, x, module.get_variable("edits", name))
    newest: Any = lambda _, new: new  # noqa: E731 (not the tuple of all that Linen would make)
    module.sow("taps", name, x, init_fn=lambda: None, reduce_fn=newest)
    return checkpoint_name(x, name) if name in kept else x


def _replacement(name: str, x: Array, new: Array) -> Array:
    if new.shape != x.shape:
        raise ValueError(
            f"the edit of {name!r} has shape {new.shape} where the activation has {x.shape}; "
            "`capture` shows the shape, with a leading N inside blocks"
        )
    return new.astype(x.dtype)


def scores_are_tapped(module: nn.Module) -> bool:
    """Return whether scores or pattern of the attention `module` are collected or edited."""
    return module.is_mutable_collection("taps") or any(
        module.has_variable("edits", name) for name in ("attn_scores", "pattern")
    )


def capture(model: nn.Module, params: Any, tokens: Array, **inputs: Any) -> dict[str, Array]:
    """Return every named activation of one forward pass, by name, in the order of `TAPS`.

    Those inside blocks have a leading N, of the layers that have them. `jax.jit` would sort them by name. Raise
    `ValueError` for an unstacked model, and for tokens that are no rows of ids.
    """
    _, state = _run(model, {"params": params}, tokens, mutable=["taps"], **inputs)
    found, taps = leaves(state["taps"]), {}
    for name in TAPS:
        where = rows_by_path(model.config, name)
        stacks = [
            found[path] if rows is None or path.startswith("layers/") else found[path][None]
            for path, rows in where.items()
        ]
        if where:
            taps[name] = stacks[0] if len(stacks) == 1 else gather(stacks, [rows or [] for rows in where.values()])
    return taps


def edit(model: nn.Module, params: Any, tokens: Array, edits: Mapping[str, Array] | Any, **inputs: Any) -> Array:
    """Return the logits with each named activation, in all layers at once, replaced by `edits[name]`.

    An entry has the shape that `capture` shows. Raise `ValueError` for another shape, for a name that no activation
    of this model has, and for an unstacked model.
    """
    nested: dict[str, Any] = {}
    if not hasattr(edits, "items"):
        raise ValueError(f"edits= takes {{name: array}}, got {type(edits).__name__}")
    for name, value in edits.items():
        if name not in TAPS:
            raise ValueError(f"no activation is called {name!r}; {nearest(name, TAPS)}")
        if not hasattr(value, "shape"):
            what, way = type(value).__name__, "jnp.array(...)"
            if callable(value):
                what, way = "function", f"f(capture(...)[{name!r}])"
            raise ValueError(f"the edit of {name!r} is a {what}, not an array; give {way}")
        where = rows_by_path(model.config, name)
        if not where:
            raise ValueError(f"no layer of model.layers={','.join(model.config.layers)} has the activation {name!r}")
        count = sum(len(rows) for rows in where.values() if rows is not None)
        if count and value.shape[:1] != (count,):
            raise ValueError(
                f"the edit of {name!r} has shape {value.shape}, and its first axis is the layers that have it, "
                f"{count}; `capture` shows the shape"
            )
        for path, rows in where.items():
            *modules, leaf = path.split("/")
            branch = nested
            for module in modules:
                branch = branch.setdefault(module, {})
            branch[leaf] = value if rows is None else value[np.array(rows) if path.startswith("layers/") else rows[0]]
    return _run(model, {"params": params, "edits": nested}, tokens, **inputs).logits


def _run(model: nn.Module, variables: Mapping[str, Any], tokens: Array, **inputs: Any) -> Any:
    if not getattr(model, "stacked", True):
        raise ValueError("activations are read from stacked layers; use Transformer(config) and its own parameters")
    return model.apply(variables, tokens, **inputs)
