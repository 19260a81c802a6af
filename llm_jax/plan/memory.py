"""The memory of a training step by what it is for, from the functions that train, traced and never run.

It takes about a second for a model of any size, and allocates nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key, PyTree
from rich.console import Group
from rich.text import Text

from llm_jax.config import replace
from llm_jax.data.loader import Batch, select_fields
from llm_jax.model.shapes import shapes
from llm_jax.model.transformer import Transformer
from llm_jax.plan.describe import metric, shares, title
from llm_jax.train.config import RunConfig
from llm_jax.train.offload import on_host
from llm_jax.train.optimizer import make_optimizer
from llm_jax.train.step import cast, make_loss


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes in use on all devices together, during one microbatch of a training step.

    Attributes:
      weights: the parameters, in float32.
      gradients: one number for each weight.
      optimizer: the state of the optimizer.
      cast: the copy of the weights in the dtype of the computation, if that is not float32.
      kept: what the backward pass needs of the forward pass: all residuals of `jax.vjp` of the loss under the
        rematerialization of the config, except weights. The compiler may keep less, or need scratch space.
      recomputed: what rematerialization recomputes for one layer in the backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    cast: int
    kept: int
    recomputed: int

    def __rich__(self) -> Group:
        """Show the share of each use on a `rich` console."""
        return Group(
            title("Memory of all devices together"),
            shares(memory_in_words(self), functools.partial(metric, unit="B")),
            Text("kept: all residuals of jax.vjp of the loss; the compiler may do better or worse", style="dim"),
        )


def memory(config: RunConfig) -> Memory:
    """Return the bytes of a training step."""
    c, data = config.model, config.data
    params = shapes(c)
    computed = jax.eval_shape(functools.partial(cast, dtype=c.dtype), params)
    tokens = jax.ShapeDtypeStruct((data.batch_size // config.accumulate, data.seq_len), jnp.int32)
    kept = everything = residual_bytes(config, computed, tokens)
    if c.remat != "none":
        everything = residual_bytes(replace(config, **{"model.remat": "none"}), computed, tokens)
    return Memory(
        weights=nbytes(params),
        gradients=nbytes(params),
        optimizer=nbytes(jax.eval_shape(make_optimizer(config.optimizer).init, params)),
        cast=nbytes(computed) if c.dtype != "float32" else 0,
        kept=kept,
        recomputed=(everything - kept) // c.n_layers,
    )


def residual_bytes(config: RunConfig, params: PyTree, tokens: jax.ShapeDtypeStruct) -> int:
    """Return the bytes that the backward pass of one microbatch keeps in device memory, besides `params`."""
    loss = make_loss(Transformer(config.model), config.loss)
    seen = jax.ShapeDtypeStruct(tokens.shape, bool)
    batch = select_fields(Batch(tokens, tokens, segments=tokens, positions=tokens, prefix=seen), config.data)

    def residuals(params: PyTree, batch: Batch, key: Key[Array, ""]) -> PyTree:
        _, backward, _ = jax.vjp(lambda p: loss(p, batch, key), params, has_aux=True)
        given = {id(x) for x in jax.tree.leaves(params)}
        return [x for x in jax.tree.leaves(backward) if id(x) not in given and not on_host(x)]

    return nbytes(jax.eval_shape(residuals, params, batch, jax.random.key(0)))


def nbytes(tree: PyTree) -> int:
    """Return the bytes of all leaves, arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def memory_in_words(m: Memory) -> dict[str, int]:
    """Return the bytes of each use of memory, in the words of the page."""
    return {
        "weights": m.weights,
        "gradients": m.gradients,
        "optimizer": m.optimizer,
        "weights, cast to compute": m.cast,
        "kept for the backward pass": m.kept,
        "one layer recomputed": m.recomputed,
    }
