"""The mixer that comes with the library keeps to what is asked of a user's own."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from llm_jax.data.loader import Batch
from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.model.mixer import check_decoding, check_mixer
from llm_jax.runs.start import load_recipe
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

PATH = "llm_jax.model.convolution:ShortConvolution"


@pytest.mark.parametrize("width", [1, 4])
def test_a_convolution_stays_in_its_document_and_decodes_alike(width: int):
    attention = AttentionConfig(convolution=width)
    config = ModelConfig(
        vocab_size=8, d_model=8, n_layers=2, n_heads=1, max_seq_len=16, layers=(PATH, "global"), attention=attention
    )
    check_mixer(config, PATH, segmented=True)
    check_decoding(config, PATH)


@pytest.mark.slow  # it compiles for several seconds
def test_the_fast_shakespeare_recipe_lowers_its_loss_within_three_steps():
    config = load_recipe("shakespeare_fast")
    model = dataclasses.replace(config.model, d_model=32, max_seq_len=16)
    data = dataclasses.replace(config.data, seq_len=16, batch_size=4)
    program = Program.on_one_device(dataclasses.replace(config, model=model, data=data))
    rows = np.random.default_rng(0).integers(0, 65, (4, 17), np.int32)
    batch, state, losses = Batch(tokens=rows[:, :-1], targets=rows[:, 1:]), program.init(), []
    for _ in range(3):
        state, metrics = program.train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[0] > losses[1] > losses[2]
    assert jax.tree.reduce(lambda n, x: n + x.size, load_recipe_shapes(config), 0) <= 804_096  # nanoGPT's for a CPU


def load_recipe_shapes(config: RunConfig) -> Any:
    """Return the shapes of all parameters of a config."""
    return Program.on_one_device(config).abstract_state.params
