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

SEGMENTS = np.array([1] * 5 + [2] * 4 + [3] * 6 + [0])  # of a row on which a mixer is checked: documents, and padding


class Mixer(nn.Module):
    """What a layer reads of other tokens: `(x, context, state) -> (y, state)`.

    x, y: `[B, L, D]`, in the dtype of the computation. A token may read only itself and those before it, of its own
    document (`context.mask.segments`, 0 in padding) and among the first `context.lengths` of its row.
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
        """Return the state before the first token: arrays `[rows, ...]`, for texts of up to `size` tokens.

        Raise `ValueError` unless the class has its own: without a state a model can train, and not generate.
        """
        raise ValueError(f"{cls.__name__} has no init_state(config, rows, size), which generation needs; give it one")


def check_mixer(config: ModelConfig, path: str, segmented: bool) -> None:
    """Run a mixer of a user's own on two short rows, and look at who reads what.

    Each token of the first row is replaced in turn, then each of its documents, then the second row. Raise `ValueError`
    where that changes what is computed for a token before it, of another document if rows are `segmented`, or of
    another row; and for a result that is not `(y, state)`, or not finite.
    """
    segments = SEGMENTS[: config.max_seq_len]
    L, documents = len(segments), np.unique(segments[segments > 0])
    of_a_document = documents[:, None] == segments
    y = _outputs(config, path, np.concatenate([np.eye(L, dtype=bool), of_a_document]), segments if segmented else None)
    if not np.isfinite(y).all():
        raise ValueError(
            f"{path} returned a y that is not finite for an x of normal numbers; look at what it divides by, and at "
            "its exponentials and logarithms"
        )
    # But for rounding, as of sums that are subtracted again. [what is replaced, which token changes]
    moved = np.abs(y[1:] - y[0]).max(-1) > 1e-3 * np.abs(y[0]).max()
    if np.tril(moved[:L], -1).any():
        raise ValueError(
            f"{path} lets a token read one after it, which it has to predict; let it read earlier ones only"
        )
    replaced = np.concatenate([segments, documents])
    if segmented and (moved[:-1] & (replaced[:, None] != segments) & (segments > 0)).any():
        raise ValueError(
            f"{path} lets a token read another document of its row; let it read where context.mask.segments is its "
            "own, or set data.packing=windows and data.end_of_text=false"
        )
    if moved[-1].any():
        raise ValueError(f"{path} lets a token read another row of its batch; compute each row by itself")


def _outputs(
    config: ModelConfig, path: str, replaced: Bool[np.ndarray, "C L"], segments: Int[np.ndarray, " L"] | None
) -> Float[np.ndarray, "C+2 L D"]:
    """Return the first row of y: as it is, with each set of its tokens `replaced`, and with another second row."""
    C, L = replaced.shape
    changes = np.zeros((C + 2, 2, L), bool)
    changes[1:-1, 0], changes[-1, 1] = replaced, True
    mask, positions = Mask(), np.arange(L)
    if segments is not None:
        mask = Mask(segments=jnp.asarray(np.stack([segments] * 2), jnp.int32))
        positions = positions - (segments[:, None] == segments).argmax(1)  # less the first of the document
    context = Context(positions=jnp.asarray(np.stack([positions] * 2), jnp.int32), mask=mask)
    mixer, shape = own_mixer(path)(config), (2, L, config.d_model)

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
