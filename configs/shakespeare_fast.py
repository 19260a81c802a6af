"""A character-level model of Shakespeare that is good within seconds: a loss of 1.88 on a CPU.

llm-jax train shakespeare_fast data.uri=tinyshakespeare.txt

Gave 1.864 and 1.869 nats a character on nanoGPT's validation split in two runs of 390 steps; five seeds of 350 steps
gave 1.856 to 1.884 (`scripts/bench_speedrun.py`, two cores that had other work too, Python 3.11, JAX 0.10.2). The
recipe was chosen by this same split, so these are no fresh test of it.
"""

from llm_jax.data.config import DataConfig
from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.train.config import OptimizerConfig, RunConfig

config = RunConfig(
    model=ModelConfig(
        vocab_size=66,
        d_model=128,
        n_layers=2,
        n_heads=4,
        max_seq_len=64,
        layers=("llm_jax.model.convolution:ShortConvolution", "global"),
        attention=AttentionConfig(qk_norm="head"),
        activation="relu2",
        gated=False,
        embedding_scale=20.0,
        tied=False,
        unroll=2,
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
    optimizer=OptimizerConfig(
        learning_rate=6e-3, schedule="linear", warmup_steps=20, final_fraction=0.0, b2=0.99, weight_decay=0.0
    ),
    steps=390,
    prompts=("\n",),
)
