"""A small Llama that tells fairy tales, with a vocabulary of its own, trained on Grimm or TinyStories.

llm-jax train fairytales data.uri=grimm_tales.txt
"""

from llm_jax.data.loader import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.run import RunConfig

config = RunConfig(
    model=ModelConfig(vocab_size=2048, d_model=192, n_layers=4, n_heads=6, max_seq_len=256, dropout=0.1, unroll=4),
    data=DataConfig(uri="grimm_tales.txt", tokenizer="train:2048", seq_len=256, batch_size=16),
    optimizer=OptimizerConfig(learning_rate=2e-3),
    steps=1200,
    prompts=("Once upon a time", "The fox said"),
)
