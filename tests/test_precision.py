"""One cast takes the whole tree to the dtype of the computation, but for what bfloat16 can't hold."""

import jax.numpy as jnp

from llm_jax.model.precision import in_dtype


def test_all_but_the_delicate_parameters_take_the_dtype():
    names = ("w_q", "router_bias", "log_rate", "b_decay", "b_q")
    found = in_dtype({"layers": {"attention": {name: jnp.ones(2) for name in names}}}, "bfloat16")
    kept = {name for name, leaf in found["layers"]["attention"].items() if leaf.dtype == jnp.float32}
    assert kept == {"router_bias", "log_rate", "b_decay"}
