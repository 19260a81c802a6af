"""Initialization: the standard deviation of a weight, by its role. The next scheme is one more line.

Roles: `embed` (the token and position tables), `hidden` (a matrix that reads the residual stream), `residual` (a
matrix that writes to it), `unembed` (a head of its own).
"""

from collections.abc import Callable

import jax

from llm_jax.model.config import ModelConfig


def _by_fan_in(role: str, fan_in: int, depth: float) -> float:
    return fan_in**-0.5 * (depth if role == "residual" else 1)


# (role, fan-in, the factor 1/sqrt(2N) that keeps the sum of 2N residual writes at unit scale) -> standard deviation
SCHEMES: dict[str, Callable[[str, int, float], float]] = {
    # Radford et al. 2019: 0.02 everywhere, smaller by depth where a sublayer writes to the residual stream.
    "gpt2": lambda role, fan_in, depth: 0.02 * (depth if role == "residual" else 1),
    # By fan-in, so that activations keep their scale at any width; a table that is also the head starts small.
    "scaled": lambda role, fan_in, depth: 0.02 if role == "embed" else _by_fan_in(role, fan_in, depth),
    # Yang et al. 2022 (arXiv:2203.03466), table 3: the head shrinks with width itself, not with its root.
    "mup": lambda role, fan_in, depth: {"embed": 1.0, "unembed": 1 / fan_in}.get(role, _by_fan_in(role, fan_in, depth)),
}


def normal(config: ModelConfig, role: str, fan_in: int) -> Callable[..., jax.Array]:
    """Return a normal initializer for a weight of this role, with `fan_in` inputs."""
    std = SCHEMES[config.init](role, fan_in, (2 * config.n_layers) ** -0.5)
    return jax.nn.initializers.normal(std)
