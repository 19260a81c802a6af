"""Find where a NaN or infinity in the loss or gradient comes from: the first bad array in order of computation."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PyTree

from llm_jax import tree as trees
from llm_jax.data.loader import IGNORE, Batch
from llm_jax.model.config import TAPS
from llm_jax.model.pattern import layers_at, layers_with
from llm_jax.model.taps import capture
from llm_jax.model.transformer import Transformer
from llm_jax.paths import first_match
from llm_jax.sharding import batch_sharding, row_shards
from llm_jax.train.program import Program
from llm_jax.train.step import cast

# The order in which the backward pass reaches the parameters of a layer, and those outside all layers.
BACKWARD = (
    (r"/mixer/", 6),
    (r"^(unembedding|classes)/", 0),
    (r"^final_norm/", 1),
    (r"/(feedforward|experts|shared)/._down$", 2),
    (r"/(feedforward|experts)/", 3),
    (r"/feedforward(_out)?_norm/", 4),
    (r"/attention/._o$", 5),
    (r"/attention/", 6),
    (r"/attention(_out)?_norm/", 7),
    (r"^(positions|embedding)/", 8),
)


def diagnose(program: Program, params: PyTree, batch: Batch, step: int, opt_state: PyTree = None) -> str:
    """Say, in a clause, which array is the first with a NaN or infinity on `batch`, all its rows, after `step` steps.

    With `opt_state` the update is checked too, where loss and gradient are finite.
    """
    return _in_forward_pass(program, params, batch) or _in_backward_pass(program, params, batch, step, opt_state)


def _in_forward_pass(program: Program, params: PyTree, batch: Batch) -> str | None:
    rows = np.flatnonzero(~np.isfinite(program.score(params, batch).nll).all(axis=1))
    if not len(rows):
        return None
    # One bad row is enough, a copy for each device: the activations of a whole batch need not fit in memory.
    row = jax.tree.map(lambda x: np.repeat(x[rows[:1]], row_shards(program.mesh), axis=0), batch)
    with jax.set_mesh(program.mesh):
        in_order = jax.device_put(row, batch_sharding(program.mesh))  # and not in the token order of `program.put`
        bad = jax.device_get(_bad_activations(Transformer(program.config.model), params, in_order))
    c, n = program.config.model, program.config.model.n_layers
    non_finite = [
        (layer, order, name)
        for order, name in enumerate(TAPS)
        if name in bad
        for layer in _layers(TAPS[name], bad[name], layers_with(c, name), n)
    ]
    if not non_finite:
        return None
    layer, _, name = min(non_finite)
    return f"the first activation to go bad is {_called(name, layer, n)}"


def _in_backward_pass(program: Program, params: PyTree, batch: Batch, step: int, opt_state: PyTree) -> str:
    """Say which gradient goes bad first, or else which parameter the update would make bad."""
    c, n = program.config, program.config.model.n_layers
    key = jax.random.fold_in(jax.random.key(c.seed), step)

    @jax.jit
    def largest(params: PyTree, opt_state: PyTree, batch: Batch) -> tuple[dict[str, Array], dict[str, Array], Array]:
        _, gradients = program.traced_gradient(params, batch, key)
        mean = optax.tree.scale(1 / jnp.maximum((batch.targets != IGNORE).sum(), 1), gradients)
        whole = opt_state is not None and c.offload == "none"
        new = program.updated(params, opt_state, mean, step) if whole else params
        sizes, after = (
            {path: _by_layer(path, jnp.abs(x), jnp.max) for path, x in trees.leaves(tree).items()}
            for tree in (gradients, new)
        )
        return sizes, after, optax.tree.norm(mean)

    with jax.set_mesh(program.mesh):
        sizes, after, norm = jax.device_get(largest(params, opt_state, program.put(program.share(batch))))
    non_finite = [
        (-layer, first_match(BACKWARD, path), path)
        for path, size in sizes.items()
        for layer in _layers(path, np.asarray(~np.isfinite(size)), layers_at(c.model, path), n)
    ]
    if non_finite:
        layer, _, path = min(non_finite)
        return f"the forward pass is finite; the first gradient to go bad is that of {_called(path, -layer, n)}"
    with np.errstate(over="ignore"):
        grown = [path for path, size in after.items() if not np.isfinite(np.square(size)).all()]
    if np.isfinite(norm) and grown:
        return f"loss and gradient are finite; the update makes {grown[0]} NaN, infinite, or too large to square"
    path = max(sizes, key=lambda path: sizes[path].max())
    return f"no activation or gradient is bad alone, but their norm is; the largest gradient is that of {path}"


@functools.partial(jax.jit, static_argnums=0)
def _bad_activations(model: Transformer, params: PyTree, batch: Batch) -> dict[str, Bool[Array, "..."]]:
    """Return whether each named activation has a number that is not finite; [N] for those inside layers."""
    params = cast(params, model.config.dtype)
    taps = capture(model, params, batch.tokens, segments=batch.segments, positions=batch.positions, prefix=batch.prefix)
    return {name: _by_layer(TAPS[name], ~jnp.isfinite(x), jnp.any) for name, x in taps.items()}


def _by_layer(path: str, x: Array, reduce: Callable[..., Array]) -> Array:
    return reduce(x, axis=tuple(range(path.startswith("layers/"), x.ndim)))


def _layers(path: str, bad: Bool[np.ndarray, "..."], layers: Sequence[int], n_layers: int) -> Sequence[int]:
    """Return those of `layers` where the array at `path` is bad; -1 is before all layers, `n_layers` after them."""
    if layers:
        return [layers[row] for row in np.flatnonzero(bad).tolist()]
    return [-1 if path.startswith(("embed", "positions")) else n_layers] if bad else []


def _called(name: str, layer: int, n_layers: int) -> str:
    return f"{name} of layer {layer}" if 0 <= layer < n_layers else name
