"""The training step: a pure function `(state, batch) -> (state, metrics)`, and the loss that it minimizes."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from llm_jax.data.loader import Batch
from llm_jax.model.config import ModelConfig, own_layers
from llm_jax.model.feedforward import Utilisation
from llm_jax.model.precision import in_dtype
from llm_jax.model.transformer import Output, Transformer, forward, head_table
from llm_jax.ops.loss import IGNORE, chunked_cross_entropy, cross_entropy, likeliest
from llm_jax.train.balance import LOAD, expert_sums, utilisation
from llm_jax.train.config import LossConfig
from llm_jax.train.offload import map_layers
from llm_jax.train.update import Slope, Update

Metrics = dict[str, jax.Array]
# (params, batch, key) -> (sum of the loss over counted tokens, {name: sum over counted tokens}).
# The one seam: fine-tuning, preference tuning and distillation put their own function here.
LossFn = Callable[[PyTree, Batch, Key[Array, ""]], tuple[Float[Array, ""], Metrics]]
# The same over all microbatches of a batch, and the gradient of the parameters.
Gradient = Callable[[PyTree, Batch, Key[Array, ""]], tuple[tuple[Float[Array, ""], Metrics], PyTree]]


@struct.dataclass
class TrainState:
    """The state of a run, apart from its position in the data, which follows from `step`."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree


def cast(params: PyTree, dtype: Any) -> PyTree:
    """Return the parameters `in_dtype` and on the device, those too that are kept in host memory.

    Called once, before anything is gathered from other devices.
    """
    with jax.named_scope("cast"):
        return map_layers(params, functools.partial(in_dtype, dtype=dtype))


@struct.dataclass
class TokenLosses:
    """Loss and negative log-likelihood of every target, in nats, the hidden states, and the use of the experts."""

    loss: Float[Array, "B L"]
    nll: Float[Array, "B L"]
    hidden: Float[Array, "B L D"]
    use: Utilisation | None


def forward_batch(
    model: Transformer, params: PyTree, batch: Batch, key: Key[Array, ""] | None = None, *, logits: bool = True
) -> Output:
    """Run the model on a batch, its parameters `cast` to the compute dtype; a `key` turns dropout on.

    `logits=False` stops before the head, for a loss that makes logits chunk by chunk.
    """
    return forward(
        model,
        cast(params, model.config.dtype),
        batch.tokens,
        segments=batch.segments,
        positions=batch.positions,
        prefix=batch.prefix,
        logits=logits,
        **({} if key is None else {"train": True, "rngs": {"dropout": key}}),
    )


def token_losses(
    model: Transformer, config: LossConfig, params: PyTree, batch: Batch, key: Key[Array, ""] | None = None
) -> TokenLosses:
    """Return the loss of every target of a batch; a `key` turns dropout on."""
    params = cast(params, model.config.dtype)
    out = forward_batch(model, params, batch, key, logits=config.chunk is None)
    losses = losses_of(model.config, config, params, batch.targets, out.hidden, out.logits)
    return TokenLosses(*losses, out.hidden, out.use)


def losses_of(
    model: ModelConfig,
    config: LossConfig,
    params: PyTree,
    targets: Int[Array, "B L"],
    hidden: Float[Array, "B L D"],
    logits: Float[Array, "B L V"] | None,
) -> tuple[Float[Array, "B L"], Float[Array, "B L"]]:
    """Return loss and negative log-likelihood of every target; without `logits`, these are made chunk by chunk."""
    terms = {"z_loss": config.z_loss, "label_smoothing": config.label_smoothing}
    with jax.named_scope("loss"):
        if logits is not None:
            return cross_entropy(logits, targets, **terms)
        assert config.chunk is not None
        return chunked_cross_entropy(
            hidden, head_table(model, params), targets, config.chunk, model.logit_softcap, **terms
        )


@struct.dataclass
class Scored:
    """Negative log-likelihood of every target, in nats, and whether it is the likeliest token, or class."""

    nll: Float[Array | np.ndarray, "B L"]
    likeliest: Bool[Array | np.ndarray, "B L"]


def score(model: Transformer, chunk: int | None, params: PyTree, batch: Batch) -> Scored:
    """Score how well the model predicts the targets of a batch, `chunk` tokens of a row at once."""
    out = token_losses(model, LossConfig(chunk=chunk), params, batch)
    return scored(model.config, chunk, params, batch.targets, out.hidden, out.nll)


def scored(
    model: ModelConfig,
    chunk: int | None,
    params: PyTree,
    targets: Int[Array, "B L"],
    hidden: Float[Array, "B L D"],
    nll: Float[Array, "B L"],
) -> Scored:
    """Return `nll`, and whether the likeliest token by the head on `hidden` is the target."""
    head = head_table(model, params).astype(hidden.dtype)
    return Scored(nll, likeliest(hidden, head, chunk or targets.shape[1], model.logit_softcap) == targets)


def make_loss(model: Transformer, config: LossConfig) -> LossFn:
    """Return next-token cross-entropy, summed over the counted targets, plus the loss terms of the experts."""

    def loss_fn(params: PyTree, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        out = token_losses(model, config, params, batch, key)
        loss, sums = out.loss.sum(), {"nll": out.nll.sum()}
        if out.use is not None:
            assert model.config.experts is not None
            added, more = expert_sums(model.config.experts, out.use, (batch.targets != IGNORE).sum())
            loss, sums = loss + added, sums | more
        return loss, sums

    return loss_fn


def init_state(model: Transformer, optimizer: optax.GradientTransformation, key: Key[Array, ""]) -> TrainState:
    """Return a fresh state. Call it under `jax.eval_shape` for the shapes, under `jit` with shardings for arrays."""
    params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


# A metric by which a loss says how many targets it counted, or their weight, where that is not all of the batch's.
TARGETS = "targets"


def make_train_step(
    gradient: Gradient,
    update: Update,
    schedule: optax.Schedule | None,
    *,
    seed: int = 0,
    rebalance: Callable[[PyTree, Float[Array, "N E"]], PyTree] | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return one optimizer step over a batch. `gradient` comes from `make_gradient`, or from a pipeline.

    The `schedule` gives the learning rate of the `update`; None: a caller's own optimizer has it inside.

    If the loss, the gradient or the norm of the updated parameters is not finite, parameters and optimizer state stay;
    the step still counts, so that data and learning rate advance, and `metrics["skipped"]` is 1. `rebalance` changes
    the new parameters by the load of the experts.
    """

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, sums), gradients = gradient(state.params, batch, key)
        load = sums.pop(LOAD, None)
        seen = jnp.maximum((batch.targets != IGNORE).sum(), 1)
        targets = seen if TARGETS not in sums else _or_one(sums.pop(TARGETS))
        each = 1 / targets.astype(jnp.float32)  # a product is computed where it is read, a quotient kept
        loss, sums = jax.tree.map(lambda x: x * each.astype(x.dtype), (loss, sums))
        tokens = seen if batch.segments is None else (batch.segments != 0).sum()  # read, with a target or not
        rate = None if schedule is None else schedule(state.step)
        new = update(state.params, state.opt_state, Slope(gradients, each, loss, rate))
        params = new.params
        if rebalance is not None and load is not None:
            params = rebalance(params, jnp.where(new.finite, load, 0))  # an even load moves nothing
        metrics: Metrics = {"loss": loss, **sums, "grad_norm": new.norm}
        metrics |= {} if rate is None else {"learning_rate": jnp.asarray(rate)}
        metrics |= {"tokens": tokens, "skipped": ~new.finite} | ({} if load is None else utilisation(load))
        return TrainState(step=state.step + 1, params=params, opt_state=new.opt_state), metrics

    return train_step


def _or_one(targets: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(targets > 0, targets, 1)


def make_gradient(loss_fn: LossFn, accumulate: int = 1, per_device: bool = False) -> Gradient:
    """Return the function that sums loss, metrics and gradient over a batch, `B / accumulate` rows at a time.

    They are sums over tokens, so a microbatch weighs as much as it has tokens. With `per_device`, which
    `rows_independent` allows, each device loops over its own rows, and gradients are all-reduced once, after the last
    microbatch; the compiler would do so in each.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def run(params: PyTree, batch: Batch, keys: Key[Array, " M"]) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        def add(total: PyTree, one: tuple[Batch, Key[Array, ""]]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(params, *one)), None

        microbatches = split_microbatches(batch, accumulate), keys
        shapes = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda x: x[0], microbatches))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, microbatches)[0]

    def gradient(params: PyTree, batch: Batch, key: Key[Array, ""]) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        every = _per_device(run) if per_device else run
        return every(params, batch, jax.random.split(key, accumulate))

    return value_and_grad if accumulate == 1 else gradient


def rows_independent(c: ModelConfig, mesh: Mapping[str, int]) -> bool:
    """Return whether devices share nothing but weights: `data` alone splits, and no row depends on another.

    Experts share a load, and dropout is drawn for all rows at once, as a layer of a user's own may do. With fsdp the
    TPU compiler would split matmuls into loops: fewer bytes, but more cycles than they save.
    """
    drops = c.dropout or c.attention.dropout or own_layers(c)
    return c.experts is None and not drops and 1 < mesh["data"] == math.prod(mesh.values())


def _per_device(run: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """Return `run` on the rows of each device along `data`, its results summed over all."""
    whole, rows = PartitionSpec(), PartitionSpec("data")

    def own(*given: Any) -> PyTree:
        return jax.lax.psum(run(*given), "data")

    return jax.shard_map(own, in_specs=(whole, rows, whole), out_specs=whole, axis_names={"data"}, check_vma=False)


def split_microbatches(batch: Batch, number: int) -> Batch:
    """Return `batch` with a leading axis M: microbatch i has rows i, i + M, ..., so that no row changes device."""
    return jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch)
