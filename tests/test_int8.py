"""Quantized weights are within half a step of what they were, channel by channel."""

import jax.numpy as jnp
import numpy as np

from llm_jax.ops.int8 import quantize


def test_each_number_is_within_half_a_step_of_its_own_channel():
    w = np.random.default_rng(0).normal(size=(5, 3, 4)) * 10.0 ** np.arange(-2, 2)
    w[:, 1, 2] = 0  # a channel without numbers
    q = quantize(jnp.asarray(w, jnp.float32), 1)
    assert (q.shape, q.values.dtype, q.scale.shape) == (w.shape, jnp.int8, (3, 4))
    step = np.abs(w).max(0) / 127
    assert (np.abs(np.asarray(q.values) * np.asarray(q.scale) - w) <= 0.51 * step + 1e-7).all()
    assert np.abs(q.values[:, [0, 2]]).max() == 127
    assert (np.asarray(q.values[:, 1, 2]) == 0).all()


def test_several_axes_may_be_summed_over():
    w = np.random.default_rng(0).normal(size=(5, 3, 4))
    q = quantize(jnp.asarray(w, jnp.float32), 2)
    np.testing.assert_allclose(q.scale, np.abs(w).max((0, 1)) / 127, rtol=1e-6)
    flat = q.reshape(15, 4)
    np.testing.assert_array_equal(flat.values, q.values.reshape(15, 4))
