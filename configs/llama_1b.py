"""A 1.1 B Llama (the shapes of Llama 3.2 1B, with an untied 32k vocabulary) for one host of accelerators.

    llm-jax show llama_1b
    llm-jax prepare hf://datasets/HuggingFaceFW/fineweb-edu/sample --out web --tokenizer train:32000 --heldout 0.0005
    llm-jax train llama_1b data.uri=web

Not trained here: weights, gradients and moments take 18 GB. `show` and the abstract state are checked.
"""

from llm_jax.axes import MeshConfig
from llm_jax.data.config import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.ops.config import Rotary
from llm_jax.train.config import LossConfig, OptimizerConfig, RunConfig

config = RunConfig(
    model=ModelConfig(
        vocab_size=32_000,
        d_model=2048,
        n_layers=16,
        n_heads=32,
        n_kv_heads=8,
        d_ff=8192,
        max_seq_len=2048,
        rotary=Rotary(theta=500_000.0),
        tied=False,
        dtype="bfloat16",
        remat="full",
    ),
    data=DataConfig(uri="shards", tokenizer="train:32000", heldout=0.0005, seq_len=2048, batch_size=256),
    optimizer=OptimizerConfig(learning_rate=3e-4, schedule="wsd", warmup_steps=1000),
    loss=LossConfig(z_loss=1e-4, chunk=512),
    mesh=MeshConfig(data=1, fsdp=-1),
    steps=50_000,
    evaluate_every=1000,
    checkpoint_every=1000,
    sample_every=5000,
)
