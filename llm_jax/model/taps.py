"""Named activations: look at them, or put something else in their place.

    taps = capture(model, params, tokens)              # {"resid_pre": [N, B, L, D], ..., "logits": [B, L, V]}
    logits = edit(model, params, tokens, {"attn_out": jnp.zeros((N, B, L, D))})

Both are pure: they return what they found and change nothing. A tap that nobody asks for leaves no trace in the
jaxpr.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from llm_jax.config import nearest
from llm_jax.model.config import TAPS, ModelConfig
from llm_jax.tree import leaves


def tap(module: nn.Module, name: str, x: Array, kept: tuple[str, ...] = ()) -> Array:
    """`x`, or the entry `name` of the `edits` collection in its place; sown to `taps` where that is collected.

    `kept` are the names that rematerialization keeps: those, and only those, are marked for `jax.checkpoint`.
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


def tapped(module: nn.Module) -> bool:
    """Whether anything inside the attention of `module` is looked at or edited."""
    return module.is_mutable_collection("taps") or any(
        module.has_variable("edits", name) for name in ("attn_scores", "pattern")
    )


def capture(model: nn.Module, params: Any, tokens: Array, **inputs: Any) -> dict[str, Array]:
    """Every named activation of one forward pass; those inside blocks carry a leading N, of the layers that have it.

    They come in the order of `TAPS`, which `jax.jit` would sort by name.
    """
    _, state = _run(model, {"params": params}, tokens, mutable=["taps"], **inputs)
    found = leaves(state["taps"])
    taps = {}
    for name in TAPS:
        places = homes(model.config, name)
        parts = [
            found[path] if rows is None or path.startswith("layers/") else found[path][None] for path, rows in places
        ]
        if places:
            taps[name] = parts[0] if len(places) == 1 else in_order(parts, [rows or [] for _, rows in places])
    return taps


def edit(model: nn.Module, params: Any, tokens: Array, edits: Mapping[str, Array], **inputs: Any) -> Array:
    """The logits with each named activation, in all layers at once, replaced by `edits[name]`.

    An entry has the shape that `capture` shows. Raises `ValueError` for another shape, or a name that no activation
    of this model has.
    """
    nested: dict[str, Any] = {}
    for name, value in edits.items():
        if name not in TAPS:
            raise ValueError(f"no activation is called {name!r}; {nearest(name, TAPS)}")
        found = homes(model.config, name)
        if not found:
            raise ValueError(f"no layer of model.layers={','.join(model.config.layers)} has the activation {name!r}")
        for path, rows in found:
            *modules, leaf = path.split("/")
            branch = nested
            for module in modules:
                branch = branch.setdefault(module, {})
            branch[leaf] = value if rows is None else value[np.array(rows) if path.startswith("layers/") else rows[0]]
    return _run(model, {"params": params, "edits": nested}, tokens, **inputs).logits


def in_order(parts: Sequence[Array], rows: Sequence[Sequence[int]]) -> Array:
    """Arrays of some layers each, as one of all: `rows[i]` says which layers the leading axis of `parts[i]` holds."""
    return jnp.concatenate(parts)[np.argsort(np.concatenate(rows))]


def homes(c: ModelConfig, name: str) -> list[tuple[str, list[int] | None]]:
    """Where the activation `name` stands in the module tree, and which rows of all that there are of it; None: it is
    not in layers.
    """
    if not TAPS[name].startswith("layers/"):
        return [(TAPS[name], None)]
    homes: dict[str, list[int]] = {}
    for row, layer in enumerate(c.layers_with(name)):
        homes.setdefault(TAPS[name].replace("layers", c.home(layer)[0], 1), []).append(row)
    return list(homes.items())


def _run(model: nn.Module, variables: Mapping[str, Any], tokens: Array, **inputs: Any) -> Any:
    if not getattr(model, "stacked", True):
        raise ValueError("activations are read from stacked layers; use Transformer(config) and its own parameters")
    return model.apply(variables, tokens, **inputs)
