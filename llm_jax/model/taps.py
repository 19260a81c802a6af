"""Named activations: look at them, or put something else in their place.

    taps = capture(model, params, tokens)              # {"resid_pre": [N, B, L, D], ..., "logits": [B, L, V]}
    logits = edit(model, params, tokens, {"attn_out": jnp.zeros((N, B, L, D))})

Both are pure: they return what they found and change nothing. A tap that nobody asks for leaves no trace in the
jaxpr.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from llm_jax.config import nearest
from llm_jax.model.config import TAPS
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
    """Every named activation of one forward pass; those inside blocks carry a leading N.

    They come in the order of `TAPS`, which `jax.jit` would sort by name.
    """
    _, state = _run(model, {"params": params}, tokens, mutable=["taps"], **inputs)
    found = {path.rsplit("/")[-1]: x for path, x in leaves(state["taps"]).items()}
    return {name: found[name] for name in TAPS}


def edit(model: nn.Module, params: Any, tokens: Array, edits: Mapping[str, Array], **inputs: Any) -> Array:
    """The logits with each named activation, in all layers at once, replaced by `edits[name]`.

    An entry has the shape that `capture` shows. Raises `ValueError` for another shape, or a name that no
    activation has.
    """
    nested: dict[str, Any] = {}
    for name, value in edits.items():
        if name not in TAPS:
            raise ValueError(f"no activation is called {name!r}; {nearest(name, TAPS)}")
        *modules, leaf = TAPS[name].split("/")
        branch = nested
        for module in modules:
            branch = branch.setdefault(module, {})
        branch[leaf] = value
    return _run(model, {"params": params, "edits": nested}, tokens, **inputs).logits


def _run(model: nn.Module, variables: Mapping[str, Any], tokens: Array, **inputs: Any) -> Any:
    if not getattr(model, "stacked", True):
        raise ValueError("activations are read from stacked layers; use Transformer(config) and its own parameters")
    return model.apply(variables, tokens, **inputs)
