"""GPT-2 124M (Radford et al. 2019) with the shapes and schedule of nanoGPT's reproduction on OpenWebText.

    llm-jax show gpt2_124m
    llm-jax prepare hf://datasets/Skylion007/openwebtext --out owt --tokenizer gpt2 --heldout 0.0005
    llm-jax train gpt2_124m data.uri=owt

Needs accelerators: half a million tokens a step, 600,000 steps. Not trained here; `show`, the parameter count
(124,475,904 with the vocabulary padded to 50304) and the step on a shrunk batch (`scripts/bench_train.py`) are checked.
"""

from llm_jax.data.config import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.config import OptimizerConfig, RunConfig

config = RunConfig(
    model=ModelConfig(
        vocab_size=50304,
        d_model=768,
        n_layers=12,
        n_heads=12,
        max_seq_len=1024,
        positions="learned",
        norm="layernorm",
        activation="gelu",
        gated=False,
        bias="all",
        init="gpt2",
        dtype="bfloat16",
        remat="dots",
    ),
    data=DataConfig(uri="owt", tokenizer="gpt2", packing="windows", heldout=0.0005, seq_len=1024, batch_size=480),
    optimizer=OptimizerConfig(learning_rate=6e-4, warmup_steps=2000),
    steps=600_000,
    accumulate=5,
    evaluate_every=1000,
    checkpoint_every=1000,
    sample_every=5000,
)
