"""A classifier answers with a class and its probability, whatever stands beside a question in its batch."""

import jax.numpy as jnp
import numpy as np
from grid import weights
from test_task import HEAD

from llm_jax.infer.classify import probabilities


def test_probabilities_add_up_and_ignore_what_follows_the_pooled_token():
    tokens, pooled = jnp.array([[5, 6, 7, 8], [9, 10, 11, 12]], jnp.int32), jnp.array([1, 3], jnp.int32)
    found = probabilities(HEAD, weights(HEAD), tokens, pooled)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-6)
    other = probabilities(HEAD, weights(HEAD), tokens.at[0, 2:].set(3), pooled)
    np.testing.assert_array_equal(found, other)
