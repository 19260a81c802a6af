"""The norm layer: which parameters each kind has, and that a scale near 1 counts. Values: `test_norm.py`."""

import jax
import jax.numpy as jnp
import pytest
from arrays import normal
from grid import tiny

from llm_jax.model.norm import Norm


@pytest.mark.parametrize(
    ("kind", "starts"),
    [("rmsnorm", {"scale": 1}), ("rmsnorm_1p", {"scale": 0}), ("layernorm", {"scale": 1, "bias": 0})],
)
def test_a_norm_has_the_parameters_of_its_kind_and_starts_as_identity(kind: str, starts: dict[str, int]):
    params = Norm(tiny(norm=kind)).init(jax.random.key(0), jnp.ones((1, 2, 3)))["params"]
    assert {name: leaf.tolist() for name, leaf in params.items()} == {name: [x] * 3 for name, x in starts.items()}


def test_what_is_added_to_a_scale_of_1_counts_in_bfloat16_too():
    """1.003 is no number of bfloat16: the scale would be 1, or 1.008."""
    norm = Norm(tiny(norm="rmsnorm_1p"))
    x = normal(4, 64, 64, seed=1).astype(jnp.bfloat16)
    with_none, with_some = (norm.apply({"params": {"scale": jnp.full(64, w, jnp.bfloat16)}}, x) for w in (0.0, 0.003))
    sizes = [jnp.abs(y.astype(jnp.float32)).mean() for y in (with_none, with_some)]
    assert sizes[1] / sizes[0] == pytest.approx(1.003, abs=5e-4)
