"""The memory that is said of a step is that of its arrays, and grows with what it is for."""

import jax
import jax.numpy as jnp
import pytest
from test_describe import LLAMA_70B, SMALL

from llm_jax.config import override
from llm_jax.data.loader import Batch
from llm_jax.model.count import parameter_counts
from llm_jax.model.transformer import Transformer
from llm_jax.plan.memory import memory
from llm_jax.train.step import make_loss


@pytest.mark.parametrize(("optimizer", "moments"), [("adamw", 2), ("lion", 1)])
def test_memory_of_the_train_state_is_that_of_its_arrays(optimizer: str, moments: int):
    found = memory(override(SMALL, [f"optimizer.name={optimizer}"]))
    total = sum(parameter_counts(SMALL.model).values())
    assert found.weights == found.gradients == 4 * total
    assert 0 <= found.optimizer - moments * 4 * total <= 16  # and the step counts
    assert found.cast == 0
    assert memory(override(SMALL, ["model.dtype=bfloat16"])).cast == 2 * total


def test_rematerialization_keeps_less_the_more_it_does_again():
    kept = {}
    for remat in ("none", "dots", "resid_mid,mlp_post", "full"):
        found = memory(override(SMALL, [f"model.remat={remat}"]))
        kept[remat] = found.kept
        assert (found.recomputed == 0) == (remat == "none")
    assert list(kept.values()) == sorted(kept.values(), reverse=True)
    inputs = 4 * 4 * 64 * 32  # of one layer, float32: what even full rematerialization can't do without
    assert kept["resid_mid,mlp_post"] - kept["full"] >= SMALL.model.n_layers * (inputs + 4 * 4 * 64 * SMALL.model.F)
    assert kept["full"] >= SMALL.model.n_layers * inputs


def test_what_the_backward_pass_keeps_grows_with_the_batch_not_the_weights():
    one, two = (memory(override(SMALL, [f"data.batch_size={n}"])).kept for n in (4, 8))
    assert 1.9 < two / one <= 2
    few_tokens = memory(override(SMALL, ["data.batch_size=1", "data.seq_len=4"]))
    assert few_tokens.kept < few_tokens.weights / 2


def test_the_memory_of_70_billion_parameters_is_known_without_making_them():
    found = memory(LLAMA_70B)
    assert (found.weights, found.cast) == (4 * 70_553_706_496, 2 * 70_553_706_496)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_is_said_of_activations_is_near_what_the_compiler_takes(remat: str):
    config = override(SMALL, [f"model.remat={remat}", "model.d_model=128", "model.max_seq_len=256", "data.seq_len=256"])
    found = memory(config)
    model = Transformer(config.model)
    loss = make_loss(model, config.loss)
    tokens = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    batch = Batch(tokens=tokens, targets=tokens, segments=tokens, positions=tokens)
    key = jax.random.key(0)
    params = jax.eval_shape(model.init, key, jnp.zeros((1, 1), jnp.int32))["params"]
    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(params, batch, key).compile()
    taken = compiled.memory_analysis().temp_size_in_bytes
    assert 0.6 < (found.kept + found.recomputed) / taken < 1.4
