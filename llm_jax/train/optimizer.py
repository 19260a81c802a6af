"""Update rules and schedules: an optax chain that clips, updates and decays, and the learning rate that scales it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from llm_jax import tree as trees
from llm_jax.paths import first_match
from llm_jax.sharding import MATRICES, own_letters
from llm_jax.train.config import OptimizerConfig
from llm_jax.train.factored import scale_by_factored_rms, sides

# (path regex, whether weight decay applies). First match wins; no match raises.
DECAYED: tuple[tuple[str, bool], ...] = (
    (r"(scale|bias|/log_rate)$", False),
    (r"/b_\w+$", False),
    (r"positions/table$", False),
    (r"(embedding|unembedding|classes)/table$", True),
    (r"/w_\w+$", True),
)

# Muon's Newton-Schulz iteration: NS_STEPS steps of the polynomial a X + b (X X') X + c (X X')^2 X (Jordan et al. 2024).
NS_STEPS, NS_COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Return step -> learning rate for a run of `steps`. Raise `ValueError` when warm-up and decay don't fit in it."""
    peak, warmup = config.learning_rate, config.warmup_steps
    end = peak * config.final_fraction
    if warmup >= steps:
        raise ValueError(
            f"optimizer.warmup_steps={warmup} leaves nothing of steps={steps}; set optimizer.warmup_steps={steps // 10}"
        )
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
    """Return True where weight decay applies: matrices and token tables, not norms, biases or positions.

    A layer of the user's own may call its parameters as it likes: there, arrays of two axes and more are matrices.
    Raise `ValueError` for any other parameter whose name does not say which of these it is.
    """

    def decayed(path: str, leaf: Any) -> bool:
        if (letters := own_letters(path, leaf.shape)) is not None:
            return len(letters.removeprefix("N")) > 1
        try:
            return first_match(DECAYED, path)
        except ValueError:
            raise ValueError(
                f"the name of {path!r} does not say whether weight decay applies; end it in w_..., b_..., scale, bias "
                "or one of the tables, or add a row to DECAYED in llm_jax/train/optimizer.py"
            ) from None

    return trees.map_with_path(decayed, params)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """Return the chain: clip by global norm, update rule, decoupled weight decay, at a learning rate of 1.

    The train step scales its output by the schedule. A schedule inside the chain would count updates, and lag with
    every skipped step.
    """
    clip = optax.identity() if config.clip is None else _clip(config.clip)
    return optax.chain(clip, _RULES[config.name](config))


def _clip(most: float) -> optax.GradientTransformationExtraArgs:
    """Return clipping to a norm of `most`. For a subset of the gradient, pass the global one as `norm`."""

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, norm: Float[Array, ""] | None = None, **_: Any
    ) -> tuple[PyTree, PyTree]:
        norm = optax.tree.norm(updates) if norm is None else norm
        return jax.tree.map(lambda x: jnp.where(norm < most, x, x / norm.astype(x.dtype) * most), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _adamw(c: OptimizerConfig) -> optax.GradientTransformation:
    """Return AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101)."""
    return optax.adamw(1.0, c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decay_mask)


def _lion(c: OptimizerConfig) -> optax.GradientTransformation:
    """Return Lion (Chen et al. 2023, arXiv:2302.06675)."""
    return optax.lion(1.0, c.b1, c.b2, weight_decay=c.weight_decay, mask=decay_mask)


def _adafactor(c: OptimizerConfig) -> optax.GradientTransformation:
    """Return Adafactor (Shazeer and Stern 2018, arXiv:1804.04235), with our schedule, decay and clipping."""
    return optax.chain(
        scale_by_factored_rms(),
        optax.add_decayed_weights(c.weight_decay, decay_mask),
        optax.scale_by_learning_rate(1.0),
    )


def _muon(c: OptimizerConfig) -> optax.GradientTransformation:
    """Return Muon (Jordan et al. 2024) for the matrices inside blocks, AdamW for the rest.

    The update is scaled by `0.2 sqrt(max(fan in, fan out))` to the size of AdamW's (Liu et al. 2025,
    arXiv:2502.16982), so that one learning rate serves both. Five steps bring singular values near 1: between about 0.5
    and 1.3.
    """

    def role(path: str, leaf: jnp.ndarray) -> str:
        own = own_letters(path, leaf.shape) is not None
        return "rest" if own or first_match(MATRICES, path) is None else "matrices"

    def axes(path: str, leaf: jnp.ndarray) -> optax.contrib.MuonDimensionNumbers:
        pair = sides(path, leaf.shape)
        assert pair is not None
        return optax.contrib.MuonDimensionNumbers(*pair)

    matrices = optax.contrib.muon(
        1.0,
        ns_coeffs=NS_COEFFICIENTS,  # one triple: of a list optax takes the last `ns_steps`, and refuses a longer one
        ns_steps=NS_STEPS,
        eps=c.eps,
        weight_decay=c.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=functools.partial(trees.map_with_path, axes),
    )
    # optax's own rule for the rest is Adam with Nesterov momentum, and it decays norms and biases.
    return optax.partition({"matrices": matrices, "rest": _adamw(c)}, functools.partial(trees.map_with_path, role))


_RULES = {"adamw": _adamw, "lion": _lion, "adafactor": _adafactor, "muon": _muon}
