"""The update of parameters and optimizer state: by a rule of optax, or AdamW in native code. Neither if not finite."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, PyTree

from llm_jax.ops import native
from llm_jax.train.config import OptimizerConfig
from llm_jax.train.offload import sum_layers, update_layers
from llm_jax.train.optimizer import decay_mask


@struct.dataclass
class Slope:
    """The gradient of a batch, and what the update has to know of it.

    Attributes:
      gradients: sums over tokens.
      each: what makes means of sums: 1 / tokens.
      loss: the mean.
      rate: the learning rate; None: the optimizer has its own.
    """

    gradients: PyTree
    each: Float[Array, ""]
    loss: Float[Array, ""]
    rate: ArrayLike | None


@struct.dataclass
class Updated:
    """What an update returns: the state, the norm of the mean gradient, and whether all was finite."""

    params: PyTree
    opt_state: PyTree
    norm: Float[Array, ""]
    finite: Bool[Array, ""]


# (params, opt_state, slope) -> Updated. If the loss, the gradient or the norm of the new parameters is not finite, all
# stay as they are.
Update = Callable[[PyTree, PyTree, Slope], Updated]


def make_update(optimizer: optax.GradientTransformation, *, hold: bool = False) -> Update:
    """Return the update by an optimizer, scaled by the learning rate.

    Whether the new parameters are finite is known only after the last. Until then none is kept in memory, and the
    update is computed a second time; with `hold` they are kept, for an update rule where compute is the bottleneck.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(params: PyTree, opt_state: PyTree, slope: Slope) -> Updated:
        each, rate = slope.each, slope.rate
        mean = functools.partial(jax.tree.map, lambda x: x * each.astype(x.dtype))
        norm = optax.tree.norm(mean(slope.gradients))
        finite = jnp.isfinite(slope.loss) & jnp.isfinite(norm)

        def new(params: PyTree, opt_state: PyTree, gradients: PyTree) -> tuple[PyTree, PyTree]:
            updates, opt_state = optimizer.update(mean(gradients), opt_state, params, norm=norm, value=slope.loss)
            updates = updates if rate is None else optax.tree.scale(rate, updates)
            return optax.apply_updates(params, updates), opt_state

        given = params, opt_state, slope.gradients
        held = new(*given)[0] if hold else None

        def square(params: PyTree, opt_state: PyTree, gradients: PyTree) -> Float[Array, ""]:
            return optax.tree.norm(new(params, opt_state, gradients)[0] if held is None else held, squared=True)

        finite &= jnp.isfinite(sum_layers(square, *given))

        def store(params: PyTree, opt_state: PyTree, gradients: PyTree) -> tuple[PyTree, PyTree]:
            # Recomputed where it is stored: otherwise all new parameters would stay in memory until the norm is known.
            old = jax.lax.optimization_barrier((params, opt_state))
            fresh, moments = new(old[0], old[1], gradients)
            fresh = fresh if held is None else held
            # A select, not a `cond`: before that all float32 gradients would have to be in memory.
            return jax.tree.map(functools.partial(jnp.where, finite), (fresh, moments), old)

        return Updated(*update_layers(store, *given), norm, finite)

    return update


def native_adamw(config: OptimizerConfig, otherwise: Update) -> Update:
    """Return `otherwise`, which is the update by `make_optimizer(config)`, in native code where that runs.

    XLA reads and writes the state more often than it must, and for many small arrays with one thread.
    """

    def update(params: PyTree, opt_state: PyTree, slope: Slope) -> Updated:
        arrays, gradients = jax.tree.leaves(params), jax.tree.leaves(slope.gradients)
        if slope.rate is None or not native.runs(*arrays, *gradients):
            return otherwise(params, opt_state, slope)
        norm = slope.each * native.global_norm(gradients)
        scale = slope.each if config.clip is None else slope.each * jnp.where(norm < config.clip, 1, config.clip / norm)
        [adam] = filter(_is_adam, jax.tree.leaves(opt_state, is_leaf=_is_adam))
        count = jnp.asarray(optax.safe_increment(adam.count))
        state, finite = native.adamw(
            native.Moments(arrays, jax.tree.leaves(adam.mu), jax.tree.leaves(adam.nu)),
            gradients,
            jnp.isfinite(slope.loss) & jnp.isfinite(norm),
            scale,
            jnp.asarray(slope.rate, jnp.float32),
            count,
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            decay=[config.weight_decay * decayed for decayed in jax.tree.leaves(decay_mask(params))],
        )
        tree = jax.tree.structure(params)
        moments = tree.unflatten(state.first), tree.unflatten(state.second)
        new = optax.ScaleByAdamState(jnp.where(finite, count, adam.count), *moments)
        opt_state = jax.tree.map(lambda x: new if _is_adam(x) else x, opt_state, is_leaf=_is_adam)
        return Updated(tree.unflatten(state.params), opt_state, norm, finite)

    return update


def _is_adam(x: Any) -> bool:
    return isinstance(x, optax.ScaleByAdamState)
