"""The smallest model whose shapes are instructive: vocabulary 24, width 32. Look at this one first.

    llm-jax show shapes

It is for `show` only: no tokenizer here has so few tokens.
"""

from llm_jax.data.config import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.config import RunConfig

config = RunConfig(
    model=ModelConfig(vocab_size=24, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=16),
    data=DataConfig(seq_len=16, batch_size=1),
)
