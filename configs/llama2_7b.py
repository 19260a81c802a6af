"""Llama 2 7B (arXiv:2307.09288, table 1 and its released config) for a slice of 16 TPU v5e.

    llm-jax plan llama2_7b --topology v5e:4x4

fits: 8.03 of 16.9 GB, 38.8 GB sent, 1,294 Mcycles (libtpu 0.0.52, JAX 0.10.2, commit cab8621). Not trained here: `plan`
compiles it, and docs/plan.md reads the result.
"""

from llm_jax.axes import MeshConfig
from llm_jax.data.config import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.config import LossConfig, OptimizerConfig, RunConfig

config = RunConfig(
    model=ModelConfig(
        vocab_size=32_000,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        d_ff=11_008,
        max_seq_len=2048,
        tied=False,
        dtype="bfloat16",
        remat="full",
    ),
    data=DataConfig(uri="shards", tokenizer="train:32000", seq_len=2048, batch_size=16),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2000),
    loss=LossConfig(chunk=512),
    mesh=MeshConfig(data=1, fsdp=-1),
    steps=100_000,
)
