"""The load of experts: what its unevenness costs, how router biases follow it, and what is reported of it."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from llm_jax import tree as trees
from llm_jax.model.config import ModelConfig
from llm_jax.model.feedforward import Utilisation
from llm_jax.model.stack import rows_by_path
from llm_jax.ops.experts import Experts, rebalanced

LOAD = "expert_load"  # the sum that `expert_sums` makes and the train step turns into what it reports


def expert_sums(
    config: Experts, use: Utilisation, tokens: Int[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
    """What is added to the loss of a microbatch of `tokens`, and the sums to report, each layer counted in full.

    The balance loss is of the load of one microbatch: over several it is another number than over all at once. Both it
    and the z-loss are means over the tokens that are read, and weigh as their microbatch has targets: the z-loss is
    that of the whole batch where all microbatches have as many.
    """
    counted = tokens.astype(jnp.float32)
    balance, z = use.balance_loss.sum() * counted, use.z_loss.sum() * counted
    added = config.router_z_loss * z
    if config.balance == "loss":
        added = added + config.balance_weight * balance
    return added, {"balance_loss": balance, "router_z": z, LOAD: use.load}


def utilisation(load: Float[Array, "N E"]) -> dict[str, Float[Array, ""]]:
    """How even the load is: that of the busiest expert of a layer over the mean, and the share of experts with none."""
    mean = jnp.maximum(load.mean(-1), 1e-9)
    return {"expert_busiest": (load.max(-1) / mean).max(), "expert_idle": (load == 0).astype(jnp.float32).mean()}


def rebalance(config: ModelConfig, params: PyTree, load: Float[Array, "N E"]) -> PyTree:
    """The parameters with the bias of every router moved against the load of its experts."""
    experts = config.experts
    assert experts is not None
    found = rows_by_path(config, "router").items()
    rows = {f"{path}_bias": np.array(layers) for path, layers in found if layers is not None}

    def follow(path: str, leaf: jax.Array) -> jax.Array:
        if path not in rows:
            return leaf
        return rebalanced(leaf, load[rows[path]].reshape(leaf.shape), experts.bias_rate)

    return trees.map_with_path(follow, params)
