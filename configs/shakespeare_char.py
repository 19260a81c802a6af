"""nanoGPT's CPU setting: a character-level GPT on Shakespeare, 0.8 M parameters, a few minutes on a laptop.

llm-jax train shakespeare_char data.uri=tinyshakespeare.txt
"""

from llm_jax.data.loader import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.run import RunConfig

config = RunConfig(
    model=ModelConfig(
        vocab_size=66,
        d_model=128,
        n_layers=4,
        n_heads=4,
        max_seq_len=64,
        positions="learned",
        norm="layernorm",
        activation="gelu",
        gated=False,
        init="gpt2",
        unroll=4,
    ),
    data=DataConfig(
        uri="tinyshakespeare.txt",
        tokenizer="char",
        separator="\n\n",
        end_of_text=False,
        heldout=0.1,
        heldout_by="tail",
        packing="windows",
        seq_len=64,
        batch_size=12,
    ),
    optimizer=OptimizerConfig(b2=0.99),
    steps=2000,
    prompts=("\n",),
)
