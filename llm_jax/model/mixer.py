"""Layers of a user's own: a class that mixes tokens, named in the config by its import path.

    class Average(lj.Mixer):
        @nn.compact
        def __call__(self, x, context, state):
            ...

    ModelConfig(..., layers=("global", "my.module:Average"))

Norms, residuals, dropout and the feed-forward of the block stay as they are. There is no registry: whoever reads the
config imports the class, so a run needs `my.module` wherever it is used.
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from llm_jax.model.attention import Context
from llm_jax.model.config import ModelConfig, own_mixer
from llm_jax.ops.mask import Mask

TOKENS = 16  # of a row on which a mixer is checked


class Mixer(nn.Module):
    """What a layer reads of other tokens: `(x, context, state) -> (y, state)`.

    x, y: `[B, L, D]`, in the dtype of the computation. A token may read only tokens before it, of its own document
    (`context.mask.segments`, 0 in padding) and among the first `context.lengths` of its row.
    state: None in training. While text is generated, what `init_state` began with and each call has returned since:
    `x` are then the tokens after those.

    Parameters may have any names, of `self.param` or of submodules; weight decay takes those of two axes and more, and
    each device holds all of them. `axes` are the mesh axes on which the class computes what one device does:
    rows are split over `data` and `fsdp`. On other axes a run is refused.
    """

    config: ModelConfig
    axes: ClassVar[tuple[str, ...]] = ("data", "fsdp")

    def __call__(
        self, x: Float[Array, "B L D"], context: Context, state: PyTree | None
    ) -> tuple[Float[Array, "B L D"], PyTree | None]:
        raise NotImplementedError(f"{type(self).__name__} has no __call__(x, context, state)")

    @classmethod
    def init_state(cls, config: ModelConfig, rows: int, size: int) -> PyTree:
        """Return the state before the first token: arrays `[rows, ...]`, for texts of up to `size` tokens."""
        raise ValueError(f"{cls.__name__} has no init_state(config, rows, size), which generation needs; give it one")


def check_mixer(config: ModelConfig, path: str, segmented: bool) -> None:
    """Run a mixer of a user's own on two rows of two documents, and look at who reads what.

    Each token of the first row is replaced in turn, then its first document, then the second row. Raise `ValueError`
    where that changes what is computed for a token before it, of another document if rows are `segmented`, or of
    another row; and for a result that is not `(y, state)`, or not finite.
    """
    L = min(TOKENS, config.max_seq_len)
    tokens = np.arange(L)
    first = tokens < L // 2 - 1  # the documents differ in length
    nothing, second_row = np.zeros((1, L), bool), np.zeros((L + 3, L), bool)
    first_row = np.concatenate([nothing, np.eye(L, dtype=bool), first[None], nothing])  # a change a line
    second_row[-1] = True
    segments = np.stack([np.where(first, 1, 2)] * 2) if segmented else None
    positions = np.stack([np.where(first, tokens, tokens - first.sum()) if segmented else tokens] * 2)
    y = _outputs(config, path, np.stack([first_row, second_row], axis=1), segments, positions)
    if not np.isfinite(y).all():
        raise ValueError(
            f"{path} returned a y that is not finite for an x of normal numbers; look at what it divides by, and at "
            "its exponentials and logarithms"
        )
    # But for rounding, as of sums that are subtracted again.
    moved = np.abs(y[1:] - y[0]).max(-1) > 1e-3 * np.abs(y[0]).max()
    if np.tril(moved[:L], -1).any():  # [which is replaced, which changes]
        raise ValueError(
            f"{path} lets a token read one after it, which it has to predict; let it read earlier ones only"
        )
    if segmented and (moved[:L][first] | moved[L]).any(0)[~first].any():
        raise ValueError(
            f"{path} lets a token read another document of its row; let it read where context.mask.segments is its "
            "own, or set data.packing=windows and data.end_of_text=false"
        )
    if moved[L + 1].any():
        raise ValueError(f"{path} lets a token read another row of its batch; compute each row by itself")


def _outputs(
    config: ModelConfig,
    path: str,
    changes: Bool[np.ndarray, "C 2 L"],
    segments: Int[np.ndarray, "2 L"] | None,
    positions: Int[np.ndarray, "2 L"],
) -> Float[np.ndarray, "C L D"]:
    """Return the first row of y for each change of x, which says which tokens are replaced."""
    mixer, shape = own_mixer(path)(config), (*positions.shape, config.d_model)
    mask = Mask(segments=None if segments is None else jnp.asarray(segments, jnp.int32))
    context = Context(positions=jnp.asarray(positions, jnp.int32), mask=mask)

    @jax.jit
    def outputs() -> Float[Array, "C L D"]:
        x, other = jax.random.normal(jax.random.key(0), (2, *shape))
        weights, tree = jax.tree.flatten(mixer.init(jax.random.key(1), x, context, None).get("params", {}))
        keys = jax.random.split(jax.random.key(2), len(weights))
        params = jax.tree.unflatten(tree, [_near(w, key) for w, key in zip(weights, keys, strict=True)])

        def output(change: Bool[Array, "2 L"]) -> Float[Array, "L D"]:
            found: Any = mixer.apply({"params": params}, jnp.where(change[..., None], other, x), context, None)
            if not (isinstance(found, tuple) and len(found) == 2):
                raise ValueError(f"{path} returned {type(found).__name__}; return (y, state)")
            if jnp.shape(found[0]) != shape:
                raise ValueError(f"{path} returned y of shape {jnp.shape(found[0])}; return that of x, {shape}")
            return found[0][0].astype(jnp.float32)

        return jax.lax.map(output, jnp.asarray(changes))

    with jax.default_matmul_precision("highest"):
        return np.asarray(outputs())


def _near(weights: Array, key: Key[Array, ""]) -> Array:
    """Return `weights` as training may have made them: where they start with zeros, nothing would be seen."""
    return weights + 0.5 * max((*weights.shape, 16)) ** -0.5 * jax.random.normal(key, weights.shape, weights.dtype)
