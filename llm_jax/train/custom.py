"""A caller's own loss or optimizer, in place of the config's: what it has to be, and where it can't run."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from llm_jax.data.loader import Batch
from llm_jax.model.transformer import Transformer
from llm_jax.train.balance import LOAD
from llm_jax.train.config import RunConfig
from llm_jax.train.mesh import token_order
from llm_jax.train.step import LossFn, Metrics

BATCH_FIELDS = ("documents",)  # what a batch has only on request
# What a row of metrics.jsonl has already: of the step, and of what is measured between steps.
RESERVED = ("loss", "grad_norm", "learning_rate", "tokens", "skipped", "step", "samples")
RESERVED += ("heldout_loss", "bits_per_byte", "heldout_accuracy")
RESERVED += ("tokens_per_second", "step_seconds", "peak_fraction", "data_wait")

# A caller's own loss: `(model, params, batch, key)` -> sums over the counted targets, of the loss and of each metric.
# They are sums, not means: the step divides them by the number of targets, over all microbatches and devices. So rows
# must not depend on each other: microbatches and devices have different ones. A loss that counts only some of the
# targets, or weighs them, returns how many as the metric `TARGETS`, and is divided by that. `params` are float32;
# `train.step.forward_batch` casts them and runs the model, and `train.balance.expert_loss` is what a mixture of experts
# adds. A function with an attribute `needs`, some of `BATCH_FIELDS`, gets batches that have these.
Loss = Callable[[Transformer, PyTree, Batch, Key[Array, ""]], tuple[Float[Array, ""], Metrics]]


@dataclasses.dataclass(frozen=True)
class Custom:
    """Code in place of a field of the config; None: as the config says.

    Attributes:
      loss: the loss in place of `config.loss`.
      optimizer: an optax transformation in place of `config.optimizer`, its learning rate and schedule included; what
        it returns is added to the parameters unchanged.
      made_by: the function that made the optimizer, if one did: a run records its code.
    """

    loss: Loss | None = None
    optimizer: optax.GradientTransformation | None = None
    made_by: Callable[[], optax.GradientTransformation] | None = None

    @classmethod
    def of(cls, loss: Any = None, optimizer: Any = None) -> "Custom":
        """Return the code passed to `fit`. An optimizer may be a function without arguments that makes one.

        Raise `ValueError` for what is neither, and for a field that a loss needs and no batch has.
        """
        if loss is not None and not takes(loss, 4):
            raise ValueError(
                f"loss={_name(loss)} is not a function (model, params, batch, key) -> (sum, {{name: sum}})"
            )
        for field in _needs(loss):
            if field not in BATCH_FIELDS:
                raise ValueError(f"the loss needs {field!r}, and batches can have {', '.join(BATCH_FIELDS)} besides")
        if optimizer is None or isinstance(optimizer, optax.GradientTransformation):
            return cls(loss, optimizer)
        made: Any = optimizer() if callable(optimizer) and takes(optimizer, 0) else None
        if not isinstance(made, optax.GradientTransformation):
            raise ValueError(
                f"optimizer={_name(optimizer)} is not an optax transformation, nor a function without arguments that "
                "makes one; as optax.adamw(1e-3)"
            )
        maker: Any = optimizer
        return cls(loss, made, maker)

    @property
    def needs(self) -> tuple[str, ...]:
        """The batch fields that the loss asks for."""
        return _needs(self.loss)

    def check(self, config: RunConfig, mesh: Mesh) -> None:
        """Raise `ValueError` for a layout in which code that sees the whole model can't run."""
        if self.loss is not None and (stages := mesh.shape["pipeline"]) > 1:
            raise ValueError(
                f"mesh.pipeline={stages} cuts the model into stages, and a loss of your own sees all of it; use "
                "mesh.pipeline=1, and mesh.fsdp in its place"
            )
        context = mesh.shape["context"]
        if self.loss is not None and token_order(config.model, config.data.seq_len, context) is not None:
            raise ValueError(
                f"mesh.context={context} gives a loss of your own the tokens of a row in another order (zigzag); set "
                "model.attention.implementation=ring, which keeps it, or mesh.context=1"
            )
        if self.optimizer is not None and config.offload != "none":
            raise ValueError(
                f"offload={config.offload} updates a layer at a time, and an optimizer of your own gets all of them; "
                "use offload=none"
            )

    def loss_of(self, model: Transformer) -> LossFn | None:
        """Return the own loss of `model` as the step takes it; None where there is none.

        Tracing it raises `ValueError` for a result that is not a sum with sums.
        """
        return None if self.loss is None else _checked(self.loss, model)


def _checked(loss: Loss, model: Transformer) -> LossFn:
    name, experts = _name(loss), any(layer.moe for layer in model.config.period)

    def loss_fn(params: PyTree, batch: Batch, key: Key[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        found: Any = loss(model, params, batch, key)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
            what = "an array" if hasattr(found, "shape") else f"a {type(found).__name__}"
            raise ValueError(f"loss={name} returned {what}; return a pair: (sum of the loss, {{name: sum}})")
        total, sums = jnp.asarray(found[0]), dict(found[1])
        if total.shape != ():
            raise ValueError(f"loss={name} returned shape {total.shape}; return its sum over the targets that count")
        for metric, value in sums.items():
            check_metric_name(metric, f"loss={name}")
            if not is_number(value):
                raise ValueError(f"loss={name}: metric {metric!r} is of type {type(value).__name__}; return a sum")
            if metric != LOAD and jnp.shape(value) != ():
                raise ValueError(f"loss={name}: metric {metric!r} has shape {jnp.shape(value)}; return a sum")
        if experts and LOAD not in sums:
            raise ValueError(
                f"loss={name} leaves out what experts add; extend it by llm_jax.expert_loss(model, out, batch), and "
                "return its metrics too"
            )
        return total.astype(jnp.float32), {metric: jnp.asarray(x, jnp.float32) for metric, x in sums.items()}

    return loss_fn


def key_leaf(opt_state: PyTree) -> str | None:
    """Return the path of a leaf that is a typed PRNG key, which checkpoints can't hold; None where there is none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.tree_util.keystr(path)
    return None


def check_metric_name(name: Any, owner: str) -> None:
    """Raise `ValueError` for a metric that `owner` returns under a name which metrics.jsonl can't take, or has."""
    if not isinstance(name, str):
        raise ValueError(f"{owner} returned a metric with the name {name!r}; a name is a text")
    if name in RESERVED:
        raise ValueError(f"{owner} returned a metric {name!r}, and metrics.jsonl has one so called; rename yours")
    if "/" in name:  # those belong to the sources of a mixture: share/NAME
        raise ValueError(f"{owner} returned a metric {name!r}; write it without a slash")


def is_number(value: Any) -> bool:
    """Return whether `value` is a real number, of Python, NumPy or JAX, or an array of them."""
    kind = getattr(value, "dtype", type(value))
    return kind in (int, float, bool) or (
        hasattr(value, "dtype") and any(jnp.issubdtype(kind, real) for real in (np.integer, np.floating, np.bool_))
    )


def _needs(loss: Any) -> tuple[str, ...]:
    while isinstance(loss, functools.partial):
        loss = loss.func
    needs = getattr(loss, "needs", ())
    return (needs,) if isinstance(needs, str) else tuple(needs)


def takes(function: Any, arguments: int) -> bool:
    """Return whether `function` can be called with so many positional arguments."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*range(arguments))
    except TypeError:
        return False
    except ValueError:  # builtins have no signature
        return True
    return True


def _name(piece: Any) -> str:
    return getattr(piece, "__qualname__", None) or repr(piece)
