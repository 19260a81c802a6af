"""Numbers survive as bits, and other platforms keep them."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.ops.bits import as_bits, as_numbers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_come_back_from_their_bits(dtype: str):
    x = jnp.asarray([1.5, -0.0, jnp.inf, 3e-39], dtype)
    y = as_numbers(as_bits(x), x.dtype)
    assert y.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(y).view(np.uint8), np.asarray(x).view(np.uint8))


def test_other_platforms_keep_their_numbers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llm_jax.ops.bits.platform", lambda: "tpu")
    assert as_bits(jnp.zeros(2, jnp.bfloat16)).dtype == jnp.bfloat16
