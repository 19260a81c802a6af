"""A small Llama that tells whether brackets are balanced.

    llm-jax train classify
"""

from llm_jax.data.loader import DataConfig
from llm_jax.data.task import TaskConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.run import RunConfig

config = RunConfig(
    model=ModelConfig(vocab_size=16, d_model=64, n_layers=3, n_heads=4, max_seq_len=64, n_classes=2, unroll=3),
    data=DataConfig(
        uri="builtin:brackets",
        tokenizer="char",
        task=TaskConfig("classify", answers=("yes", "no")),
        seq_len=64,
        batch_size=64,
    ),
    optimizer=OptimizerConfig(
        name="muon", learning_rate=5e-3, schedule="wsd", warmup_steps=40, decay_fraction=0.4, final_fraction=0.02
    ),
    steps=1000,
    prompts=(),
)
