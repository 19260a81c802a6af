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
from jaxtyping import Array, Float, PyTree

from llm_jax.model.attention import Context
from llm_jax.model.config import ModelConfig, own_mixer
from llm_jax.ops.mask import Mask


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
        """Return the state before the first token: arrays `[rows, ...]`, for texts of up to `size` tokens.

        Raise `ValueError` unless the class has its own: without a state a model can train, and not generate.
        """
        raise ValueError(f"{cls.__name__} has no init_state(config, rows, size), which generation needs; give it one")


def check_mixer(config: ModelConfig, path: str, segmented: bool) -> None:
    """Run a mixer of a user's own on six tokens of two documents, and look at who reads what.

    Raise `ValueError` if a token reads one after it, or where rows are `segmented` one of another document, and for a
    result of another form than `(y, state)`.
    """
    mixer, x = own_mixer(path)(config), jax.random.normal(jax.random.key(0), (1, 6, config.d_model))
    segments, positions = jnp.array([[1, 1, 1, 2, 2, 2]]), jnp.array([[0, 1, 2, 0, 1, 2]])
    if not segmented:
        segments, positions = None, jnp.arange(6)[None]
    context = Context(positions=positions, mask=Mask(segments=segments))
    params = mixer.init(jax.random.key(1), x, context, None)
    # As training may have made them: a projection that starts with zeros would hide what is read.
    params = jax.tree.map(lambda leaf: leaf + jax.random.normal(jax.random.key(2), leaf.shape), params)

    def run(x: Array) -> Array:
        found: Any = mixer.apply(params, x, context, None)
        if not (isinstance(found, tuple) and len(found) == 2):
            raise ValueError(f"{path} returned {type(found).__name__}; return (y, state)")
        if jnp.shape(found[0]) != x.shape:
            raise ValueError(f"{path} returned y of shape {jnp.shape(found[0])}; return that of x, {x.shape}")
        return found[0]

    def unchanged(by: int, part: slice) -> bool:  # but for rounding, of sums that are subtracted again
        return bool(jnp.allclose(run(x.at[:, by].add(1))[:, part], run(x)[:, part], atol=1e-3))

    if not unchanged(-1, slice(0, -1)):
        raise ValueError(
            f"{path} lets a token read one after it, which it has to predict; let it read earlier ones only"
        )
    if segmented and not unchanged(0, slice(3, None)):
        raise ValueError(
            f"{path} lets a token read another document of its row; let it read where context.mask.segments is its "
            "own, or set data.packing=windows and data.end_of_text=false"
        )
