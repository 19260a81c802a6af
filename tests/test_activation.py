import math
from collections.abc import Callable

import jax
import numpy as np
import pytest

from llm_jax.ops.activation import ACTIVATIONS

# In float64, as their papers have them.
FORMULAS: dict[str, Callable[[float], float]] = {
    "relu": lambda x: max(x, 0),
    "gelu": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + math.exp(-x)),
    "relu2": lambda x: max(x, 0) ** 2,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_what_its_name_says(name: str):
    x = np.linspace(-6, 6, 49, dtype=np.float32)
    found = jax.jit(ACTIVATIONS[name])(x)
    np.testing.assert_allclose(found, [FORMULAS[name](float(v)) for v in x], rtol=0, atol=1e-5)
