"""The first run: a small Llama learns Python from the standard library that is already on this machine.

llm-jax train quickstart
"""

from llm_jax.data.loader import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.run import RunConfig

config = RunConfig(
    model=ModelConfig(vocab_size=2048, d_model=192, n_layers=4, n_heads=4, max_seq_len=256, unroll=4),
    data=DataConfig(uri="builtin:python", tokenizer="train:2048", seq_len=256, batch_size=8),
    optimizer=OptimizerConfig(learning_rate=3e-3, schedule="wsd", warmup_steps=50),
    steps=600,
    evaluate_every=150,
    checkpoint_every=150,
    sample_every=150,
    prompts=("def ", "class "),
)
