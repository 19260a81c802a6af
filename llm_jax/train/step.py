"""The training step: a pure function `(state, batch) -> (state, metrics)`, and the loss that it minimizes."""

import dataclasses
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
from llm_jax.model.config import ModelConfig
from llm_jax.model.feedforward import Utilisation
from llm_jax.model.precision import in_dtype
from llm_jax.model.transformer import Output, Transformer, forward, head_table
from llm_jax.ops.loss import IGNORE, chunked_cross_entropy, cross_entropy, likeliest
from llm_jax.train.balance import LOAD, expert_sums, utilisation
from llm_jax.train.offload import advanced, brought, summed

Metrics = dict[str, jax.Array]
# (params, batch, key) -> (sum of the loss over counted tokens, {name: sum over counted tokens}).
# The one seam: fine-tuning, preference tuning and distillation put their own function here.
LossFn = Callable[[PyTree, Batch, Key[Array, ""]], tuple[Float[Array, ""], Metrics]]
# The same over all microbatches of a batch, and the gradient of the parameters.
Gradient = Callable[[PyTree, Batch, Key[Array, ""]], tuple[tuple[Float[Array, ""], Metrics], PyTree]]


@struct.dataclass
class TrainState:
    """All that a run is, beside its position in the data."""

    step: Int[Array, ""]
    params: PyTree
    opt_state: PyTree


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """What is added to cross-entropy, and how it is computed.

    Attributes:
      z_loss: weight of the squared log-partition; 1e-4 where logits drift.
      label_smoothing: share of the target that goes to the uniform distribution.
      chunk: tokens of a row whose logits are held at once; None: all of them.
    """

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.z_loss < math.inf or not 0 <= self.label_smoothing < 1:
            raise ValueError(f"loss.z_loss must not be negative and loss.label_smoothing lie in [0, 1), got {self}")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"loss.chunk={self.chunk} must be at least 1; none is no chunks")


def cast(params: PyTree, dtype: Any) -> PyTree:
    """Return the parameters `in_dtype`, those that wait in the host's memory brought to the device.

    Done once, before anything is gathered from other devices.
    """
    with jax.named_scope("cast"):
        return brought(params, functools.partial(in_dtype, dtype=dtype))


@struct.dataclass
class TokenLosses:
    """Loss and negative log-likelihood of every target, in nats, what the head read, and how the experts were used."""

    loss: Float[Array, "B L"]
    nll: Float[Array, "B L"]
    hidden: Float[Array, "B L D"]
    use: Utilisation | None


def forward_batch(
    model: Transformer, params: PyTree, batch: Batch, key: Key[Array, ""] | None = None, *, logits: bool = True
) -> Output:
    """Run the model on a batch, its parameters `cast` to the dtype of the computation; dropout is on with a `key`.

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
    """Return what the model makes of the targets of a batch; dropout is on with a `key`."""
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
    """Loss and negative log-likelihood of every target; without `logits`, which are then made chunk by chunk."""
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
    """Negative log-likelihood of every target, in nats, and whether it is the likeliest of all tokens, or classes."""

    nll: Float[Array | np.ndarray, "B L"]
    likeliest: Bool[Array | np.ndarray, "B L"]


def score(model: Transformer, chunk: int | None, params: PyTree, batch: Batch) -> Scored:
    """How well the model predicts the targets of a batch, `chunk` tokens of a row at once."""
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
    """`nll`, and whether what the head makes of `hidden` is likeliest for the target."""
    head = head_table(model, params).astype(hidden.dtype)
    return Scored(nll, likeliest(hidden, head, chunk or targets.shape[1], model.logit_softcap) == targets)


def make_loss(model: Transformer, config: LossConfig) -> LossFn:
    """Next-token cross-entropy, summed over the tokens that count, and what uneven experts cost."""

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
    """A fresh state. Call it under `jax.eval_shape` for the shapes, under `jit` with shardings for the arrays."""
    params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def make_train_step(
    gradient: Gradient,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule | None,
    *,
    seed: int = 0,
    rebalance: Callable[[PyTree, Float[Array, "N E"]], PyTree] | None = None,
    hold: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Return one optimizer step over a batch. `gradient` is what `make_gradient` gives, or a program has instead.

    The `schedule` scales what the optimizer returns; None: an optimizer of a caller's own has its learning rate inside.

    A loss or gradient that is not finite, or an update after which the norm of the parameters would not be, changes
    neither parameters nor optimizer state; the step still counts, so that data and learning rate move on, and
    `metrics["skipped"]` is 1. `rebalance` changes the new parameters by the load of the experts.

    Whether they are finite is known only after the last of them. Until then none of the new parameters are held, and
    the update is computed a second time; with `hold` they are held, for an update rule that costs more than memory.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, sums), gradients = gradient(state.params, batch, key)
        load = sums.pop(LOAD, None)
        targets = jnp.maximum((batch.targets != IGNORE).sum(), 1)
        each = 1 / targets.astype(jnp.float32)  # a product is computed where it is read, a quotient kept
        mean = functools.partial(jax.tree.map, lambda x: x * each.astype(x.dtype))
        loss, sums, norm = mean(loss), mean(sums), optax.tree.norm(mean(gradients))
        tokens = targets if batch.segments is None else (batch.segments != 0).sum()  # what was read, asked or not
        rate = None if schedule is None else schedule(state.step)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def new(params: PyTree, opt_state: PyTree, gradients: PyTree) -> tuple[PyTree, PyTree]:
            updates, opt_state = optimizer.update(mean(gradients), opt_state, params, norm=norm)
            updates = updates if rate is None else optax.tree.scale(rate, updates)
            return optax.apply_updates(params, updates), opt_state

        given = state.params, state.opt_state, gradients
        held = new(*given)[0] if hold else None

        def square(params: PyTree, opt_state: PyTree, gradients: PyTree) -> Float[Array, ""]:
            return optax.tree.norm(new(params, opt_state, gradients)[0] if held is None else held, squared=True)

        finite &= jnp.isfinite(summed(square, *given))

        def advance(params: PyTree, opt_state: PyTree, gradients: PyTree) -> tuple[PyTree, PyTree]:
            # Computed again where it is kept: else every new parameter would wait in memory for the norm of the last.
            old = jax.lax.optimization_barrier((params, opt_state))
            fresh, moments = new(old[0], old[1], gradients)
            fresh = fresh if held is None else held
            # A choice of numbers, not of a branch: that would want float32 gradients whole in memory, before it.
            return jax.tree.map(functools.partial(jnp.where, finite), (fresh, moments), old)

        params, opt_state = advanced(advance, *given)
        if rebalance is not None and load is not None:
            params = rebalance(params, jnp.where(finite, load, 0))  # an even load moves nothing
        metrics: Metrics = {"loss": loss, **sums, "grad_norm": norm}
        metrics |= {} if rate is None else {"learning_rate": jnp.asarray(rate)}
        metrics |= {"tokens": tokens, "skipped": ~finite} | ({} if load is None else utilisation(load))
        return TrainState(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return train_step


def make_gradient(loss_fn: LossFn, accumulate: int = 1, apart: bool = False) -> Gradient:
    """Sums of loss, metrics and gradient over a batch, one microbatch of `B / accumulate` rows at a time.

    They are sums over tokens, so a microbatch weighs as much as it has. With `apart`, as `rows_apart` says, each device
    goes through its own rows, and gradients are added up behind the last microbatch; the compiler would do so in every
    one.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)

    def run(params: PyTree, batch: Batch, keys: Key[Array, " M"]) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        def add(total: PyTree, part: tuple[Batch, Key[Array, ""]]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(params, *part)), None

        parts = microbatches(batch, accumulate), keys
        shapes = jax.eval_shape(value_and_grad, params, *jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    def gradient(params: PyTree, batch: Batch, key: Key[Array, ""]) -> tuple[tuple[Float[Array, ""], Metrics], PyTree]:
        every = _on_copies(run) if apart else run
        return every(params, batch, jax.random.split(key, accumulate))

    return value_and_grad if accumulate == 1 else gradient


def rows_apart(c: ModelConfig, mesh: Mapping[str, int]) -> bool:
    """Whether devices share nothing but weights: where `data` alone splits, and no row has to do with another.

    Experts share a load, and noise is drawn for all rows. Beside fsdp the compiler for TPU would multiply in loops:
    fewer bytes, but more cycles than they save.
    """
    return c.experts is None and c.dropout == c.attention.dropout == 0 and 1 < mesh["data"] == math.prod(mesh.values())


def _on_copies(run: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """`run` on the rows of each copy along `data`, and the sum of all."""
    whole, rows = PartitionSpec(), PartitionSpec("data")

    def own(*given: Any) -> PyTree:
        return jax.lax.psum(run(*given), "data")

    return jax.shard_map(own, in_specs=(whole, rows, whole), out_specs=whole, axis_names={"data"}, check_vma=False)


def microbatches(batch: Batch, number: int) -> Batch:
    """`batch` with a leading axis of `number` parts: every number-th row, so that no row leaves its device."""
    return jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch)
