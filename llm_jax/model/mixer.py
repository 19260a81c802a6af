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


def check_decoding(config: ModelConfig, path: str) -> None:
    """Run a mixer of a user's own over whole rows, and over the same tokens as text is generated.

    Two prompts of different lengths come padded, in one call, then a token a row a call. Raise `ValueError` where `y`
    is not that of the whole rows: generated text would come from another function than was trained. A mixer without
    `init_state` passes: it says so itself where it is asked to generate.
    """
    cls, L = own_mixer(path), min(7, config.max_seq_len - 1)
    if cls.init_state.__func__ is Mixer.init_state.__func__ or L < 3:
        return
    mixer, prompts = _made(config, path), jnp.array([L - 2, L - 3])

    @jax.jit
    def both() -> tuple[Float[Array, "2 L D"], list[tuple[Int[Array, "2"], Float[Array, "2 D"]]]]:
        x = jax.random.normal(jax.random.key(0), (2, L, config.d_model))
        whole = Context(positions=jnp.arange(L)[None], mask=Mask())
        params = _params(path, mixer.init(jax.random.key(1), x, whole, None))

        def call(
            tokens: Float[Array, "2 _ D"], before: Int[Array, "2"], lengths: Int[Array, "2"], state: PyTree
        ) -> Any:
            size = tokens.shape[1]
            positions = jnp.arange(size)[None] + before[:, None]
            context = Context(positions=positions, mask=Mask(kv_length=before + size), lengths=lengths)
            return mixer.apply({"params": params}, tokens, context, state)

        rows, steps = jnp.arange(2), []
        y, state = call(x[:, : L - 2], jnp.zeros(2, jnp.int32), prompts, cls.init_state(config, 2, L))
        steps.append((prompts - 1, y[rows, prompts - 1]))
        for step in range(2):
            at = prompts + step
            y, state = call(x[rows, at][:, None], at, jnp.ones(2, jnp.int32), state)
            steps.append((at, y[:, 0]))
        return mixer.apply({"params": params}, x, whole, None)[0], steps

    with jax.default_matmul_precision("highest"):
        y, steps = jax.device_get(both())
    for at, found in steps:
        if not np.allclose(found, y[[0, 1], at], rtol=0, atol=1e-3 * np.abs(y).max()):
            raise ValueError(
                f"{path} computes something else token by token than for a whole row, so text would come from another "
                "function than was trained; return the state after the first context.lengths tokens of each row "
                "(prompts are padded on the right), and count from context.positions"
            )


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
    mixer, shape = _made(config, path), (2, L, config.d_model)

    @jax.jit
    def outputs() -> Float[Array, "C L D"]:
        x, other = jax.random.normal(jax.random.key(0), (2, *shape))
        params = _params(path, mixer.init(jax.random.key(1), x, context, None))

        def output(change: Bool[Array, "2 L"]) -> Float[Array, "L D"]:
            found: Any = mixer.apply({"params": params}, jnp.where(change[..., None], other, x), context, None)
            if not (isinstance(found, tuple) and len(found) == 2):
                raise ValueError(f"{path} returned {type(found).__name__}; return (y, state)")
            if jnp.shape(found[0]) != shape:
                raise ValueError(f"{path} returned y of shape {jnp.shape(found[0])}; return that of x, {shape}")
            low, _ = jax.eval_shape(mixer.apply, {"params": params}, x.astype(config.dtype), context, None)
            if low.dtype != config.dtype:
                raise ValueError(
                    f"{path} returned {low.dtype} for an x of model.dtype={config.dtype}; cast parameters to x.dtype"
                )
            return found[0][0].astype(jnp.float32)

        return jax.lax.map(output, jnp.asarray(changes))

    with jax.default_matmul_precision("highest"):
        return np.asarray(outputs())


def _made(config: ModelConfig, path: str) -> Mixer:
    """Return a mixer of a user's own. Raise `ValueError` for one that can't be made of a config alone."""
    try:
        return own_mixer(path)(config)
    except TypeError as error:
        raise ValueError(
            f"{path} is made with the config of the model alone; give its fields defaults ({error})"
        ) from None


def _params(path: str, variables: PyTree) -> PyTree:
    """Return parameters as training may have made them: where they start with zeros, nothing would be seen.

    Raise `ValueError` for other variables, which no train state holds.
    """
    if other := [name for name in variables if name != "params"]:
        raise ValueError(f"{path} keeps {', '.join(other)}, and a layer has parameters only (self.param); do without")
    weights, tree = jax.tree.flatten(variables.get("params", {}))
    keys = jax.random.split(jax.random.key(2), len(weights))

    def near(w: Array, key: Key[Array, ""]) -> Array:
        if not jnp.issubdtype(w.dtype, jnp.floating):
            return w
        return w + 0.5 * max((*w.shape, 16)) ** -0.5 * jax.random.normal(key, w.shape, w.dtype)

    return jax.tree.unflatten(tree, [near(w, key) for w, key in zip(weights, keys, strict=True)])
