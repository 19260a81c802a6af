"""A small Llama that tells fairy tales, with a vocabulary of its own, trained on Grimm or TinyStories.

llm-jax train fairytales data.uri=grimm_tales.txt
"""

from llm_jax.data.loader import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.run import RunConfig

config = RunConfig(
    model=ModelConfig(vocab_size=1024, d_model=128, n_layers=4, n_heads=4, max_seq_len=256, dropout=0.1, unroll=4),
    data=DataConfig(uri="grimm_tales.txt", tokenizer="train:1024", seq_len=256, batch_size=8),
    optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, schedule="wsd", warmup_steps=40, decay_fraction=0.4),
    steps=600,
    prompts=("Once upon a time", "The fox said"),
)
