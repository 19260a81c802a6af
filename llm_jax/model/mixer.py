"""Layers of a user's own: a class that mixes tokens, named in the config by its import path.

    class Average(lj.Mixer):
        @nn.compact
        def __call__(self, x, context, state):
            ...

    ModelConfig(..., layers=("global", "my.module:Average"))

Norms, residuals, dropout and the feed-forward of the block stay as they are. There is no registry: whoever reads the
config imports the class, so a run needs `my.module` wherever it is used.
"""

from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float, PyTree

from llm_jax.model.attention import Context
from llm_jax.model.config import ModelConfig


class Mixer(nn.Module):
    """What a layer reads of other tokens: `(x, context, state) -> (y, state)`.

    x, y: `[B, L, D]`, in the dtype of the computation. A token may read only tokens before it, of its own document
    (`context.mask.segments`, 0 in padding) and among the first `context.lengths` of its row.
    state: None in training. While text is generated, what `init_state` began with and each call has returned since:
    `x` are then the tokens after those.

    Parameters that `self.param` makes are called `w_...`, `b_...` or `scale`, so that weight decay knows which are
    matrices; each device holds all of them. `axes` are the mesh axes on which the class computes what one device does:
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
