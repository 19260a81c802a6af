"""The load of experts: the loss terms for its imbalance, router biases that follow it, and its metrics."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from llm_jax import tree as trees
from llm_jax.data.loader import IGNORE, Batch
from llm_jax.model.config import ModelConfig
from llm_jax.model.feedforward import Utilisation
from llm_jax.model.pattern import rows_by_path
from llm_jax.model.transformer import Output, Transformer
from llm_jax.ops.config import Experts
from llm_jax.ops.experts import rebalanced

LOAD = "expert_load"  # the sum from `expert_sums` of which the train step makes metrics


def expert_sums(
    config: Experts, use: Utilisation, tokens: Int[Array, ""]
) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
    """Return what is added to the loss of a microbatch of `tokens`, and the sums to report, over all layers.

    The balance loss is that of one microbatch: it is nonlinear in the load, so a sum over several differs from that of
    the whole batch. Both it and the z-loss are means over the tokens read, weighted by the targets of the microbatch:
    the z-loss is that of the whole batch where all microbatches have as many.
    """
    counted = tokens.astype(jnp.float32)
    balance, z = use.balance_loss.sum() * counted, use.z_loss.sum() * counted
    added = config.router_z_loss * z
    if config.balance == "loss":
        added = added + config.balance_weight * balance
    return added, {"balance_loss": balance, "router_z": z, LOAD: use.load}


def expert_loss(
    model: Transformer, out: Output, batch: Batch
) -> tuple[Float[Array, ""], dict[str, Float[Array, "..."]]]:
    """Return what a mixture of experts adds to a loss of a caller's own, and its metrics: 0 and none without experts.

    The loss is `nll.sum() + added`, and its metrics `{..., **more}`: by these the step balances the routers.
    """
    if out.use is None or model.config.experts is None:
        return jnp.zeros(()), {}
    return expert_sums(model.config.experts, out.use, (batch.targets != IGNORE).sum())


def utilisation(load: Float[Array, "N E"]) -> dict[str, Float[Array, ""]]:
    """Return how even the load is: the busiest expert of any layer over the mean, and the share of idle experts."""
    mean = jnp.maximum(load.mean(-1), 1e-9)
    return {"expert_busiest": (load.max(-1) / mean).max(), "expert_idle": (load == 0).astype(jnp.float32).mean()}


def rebalance(config: ModelConfig, params: PyTree, load: Float[Array, "N E"]) -> PyTree:
    """Return the parameters with every router's bias moved against the load of its experts."""
    experts = config.experts
    assert experts is not None
    found = rows_by_path(config, "router").items()
    rows = {f"{path}_bias": np.array(layers) for path, layers in found if layers is not None}

    def follow(path: str, leaf: jax.Array) -> jax.Array:
        if path not in rows:
            return leaf
        return rebalanced(leaf, load[rows[path]].reshape(leaf.shape), experts.bias_rate)

    return trees.map_with_path(follow, params)
