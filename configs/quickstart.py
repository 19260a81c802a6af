"""The first run: a small Llama learns Python from the standard library that is already on this machine.

llm-jax train quickstart
"""

from llm_jax.data.loader import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.run import RunConfig

config = RunConfig(
    model=ModelConfig(vocab_size=1024, d_model=128, n_layers=4, n_heads=4, max_seq_len=256, unroll=4),
    data=DataConfig(uri="builtin:python", tokenizer="train:1024", seq_len=256, batch_size=8),
    optimizer=OptimizerConfig(
        name="muon", learning_rate=5e-3, schedule="wsd", warmup_steps=40, decay_fraction=0.4, final_fraction=0.02
    ),
    steps=800,
    evaluate_every=200,
    checkpoint_every=200,
    sample_every=200,
    prompts=("def main():\n", "class Queue:\n"),
)
