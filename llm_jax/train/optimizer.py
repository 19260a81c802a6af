"""Schedules and update rules: an optax chain that clips, updates and decays, and the learning rate that scales it."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from llm_jax import tree as trees
from llm_jax.sharding import letters_of

# Which parameters weight decay pulls to zero. First match wins; no match raises.
DECAYED: tuple[tuple[str, bool], ...] = (
    (r"(scale|bias|/log_rate)$", False),
    (r"/b_\w+$", False),
    (r"positions/table$", False),
    (r"(embedding|unembedding|classes)/table$", True),
    (r"/w_\w+$", True),
)

# Matrices that Muon orthogonalizes, their input and output axes by letter; None: AdamW's.
MATRICES: tuple[tuple[str, tuple[str, str] | None], ...] = (
    (r"^layers\S*/attention/w_(q|gate)$", ("D", "KGH")),
    (r"^layers\S*/attention/w_[kv]$", ("D", "KH")),
    (r"^layers\S*/attention/w_o$", ("KGH", "D")),
    (r"^layers\S*/(feedforward|shared|experts)/w_(up|gate)$", ("D", "F")),
    (r"^layers\S*/(feedforward|shared|experts)/w_down$", ("F", "D")),
    (r".", None),
)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its schedule, in optimizer steps.

    Attributes:
      name: the update rule.
      learning_rate: the peak of the schedule.
      schedule: after a linear warm-up of `warmup_steps`, `cosine` and `linear` fall to `final_fraction` of the peak at
        the last step, `constant` stays, and `wsd` stays until the last `decay_fraction` of the run, then falls
        linearly.
      warmup_steps: steps in which the rate rises to the peak; fewer than `steps`.
      final_fraction: of the peak, at the last step.
      decay_fraction: of the run, in which `wsd` falls.
      clip: the largest global norm of the gradient; None: no clipping.
      b1, b2, eps: of AdamW, b1 and b2 of Lion. Adafactor has none of them, Muon's matrices a momentum of 0.95.
      weight_decay: how fast matrices and token tables shrink: by `learning_rate * weight_decay` of themselves a step.
    """

    name: Literal["adamw", "lion", "adafactor", "muon"] = "adamw"
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    warmup_steps: int = 100
    final_fraction: float = 0.1
    decay_fraction: float = 0.2
    clip: float | None = 1.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"optimizer.learning_rate={self.learning_rate} must be positive")
        for name in ("b1", "b2", "final_fraction", "decay_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optimizer.{name}={getattr(self, name)} must lie between 0 and 1")
        if self.warmup_steps < 0:
            raise ValueError(f"optimizer.warmup_steps={self.warmup_steps} is negative; 0 is no warm-up")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"optimizer.clip={self.clip} must be positive; none is no clipping")


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step -> learning rate, for a run of `steps`. Raises `ValueError` when warm-up and decay don't fit in the run."""
    peak, warmup = config.learning_rate, config.warmup_steps
    end = peak * config.final_fraction
    if warmup >= steps:
        raise ValueError(f"optimizer.warmup_steps={warmup} leaves nothing of steps={steps}; set it to {steps // 10}")
    last = max(1, steps - 1 - warmup)  # counted from the end of the warm-up
    decay = max(1, round(steps * config.decay_fraction))
    if config.schedule == "wsd" and warmup + decay > steps:
        raise ValueError(
            f"warm-up of {warmup} and decay of {decay} steps overlap in a run of steps={steps}; "
            "lower optimizer.warmup_steps or optimizer.decay_fraction"
        )
    after = {
        "cosine": optax.cosine_decay_schedule(peak, last, config.final_fraction),
        "linear": optax.linear_schedule(peak, end, last),
        "constant": optax.constant_schedule(peak),
        "wsd": optax.linear_schedule(peak, end, min(decay, last), transition_begin=max(0, last - decay)),
    }[config.schedule]
    # Step 0 already learns: the ramp ends at the peak after `warmup` updates, not after `warmup` + 1.
    ramp = optax.linear_schedule(peak / max(1, warmup), peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, after], [warmup]) if warmup else after


def decay_mask(params: PyTree) -> PyTree:
    """True where weight decay applies: matrices and token tables, not norms, biases or positions."""
    return trees.map_with_path(lambda path, _: trees.first_match(DECAYED, path), params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """The chain: clip by global norm, update rule, decoupled weight decay, at a learning rate of 1.

    The train step scales what comes out by its schedule. A schedule inside the chain would count the updates made,
    and fall behind with every step that was skipped.
    """
    clip = optax.identity() if config.clip is None else _clip(config.clip)
    return optax.chain(clip, _RULES[config.name](config))


def _clip(most: float) -> optax.GradientTransformationExtraArgs:
    """Scales a gradient to the norm `most` where its own is larger; `norm`, for a part, is that of the whole."""

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, norm: Float[Array, ""] | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        norm = optax.tree.norm(updates) if norm is None else norm
        return jax.tree.map(lambda x: jnp.where(norm < most, x, x / norm.astype(x.dtype) * most), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _adamw(c: OptimizerConfig) -> optax.GradientTransformation:
    """Loshchilov and Hutter 2017, arXiv:1711.05101."""
    return optax.adamw(1.0, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decay_mask)


def _lion(c: OptimizerConfig) -> optax.GradientTransformation:
    """Chen et al. 2023, arXiv:2302.06675."""
    return optax.lion(1.0, c.b1, c.b2, weight_decay=c.weight_decay, mask=decay_mask)


def _adafactor(c: OptimizerConfig) -> optax.GradientTransformation:
    """Shazeer and Stern 2018, arXiv:1804.04235, with our schedule, decay and clipping in place of its own."""
    return optax.chain(
        optax.scale_by_factored_rms(decay_rate=0.8),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(c.weight_decay, decay_mask),
        optax.scale_by_learning_rate(1.0),
    )


def _muon(c: OptimizerConfig) -> optax.GradientTransformation:
    """Jordan et al. 2024 for the matrices inside blocks, AdamW for the rest.

    The update is scaled by `0.2 sqrt(max(fan in, fan out))` to the size of AdamW's (Liu et al. 2025,
    arXiv:2502.16982), so that one learning rate serves both.
    """

    def role(path: str, _: jnp.ndarray) -> str:
        return "rest" if trees.first_match(MATRICES, path) is None else "matrices"

    def axes(path: str, leaf: jnp.ndarray) -> optax.contrib.MuonDimensionNumbers:
        pair, letters = trees.first_match(MATRICES, path), letters_of(path, leaf.shape)
        assert pair is not None
        return optax.contrib.MuonDimensionNumbers(*(tuple(map(letters.index, side)) for side in pair))

    matrices = optax.contrib.muon(
        1.0,
        eps=c.eps,
        weight_decay=c.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=functools.partial(trees.map_with_path, axes),
    )
    # optax's own rule for the rest is Adam with Nesterov momentum, and it decays norms and biases.
    return optax.partition({"matrices": matrices, "rest": _adamw(c)}, functools.partial(trees.map_with_path, role))


_RULES = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "muon": _muon}
