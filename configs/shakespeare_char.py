"""nanoGPT's CPU setting: a character-level GPT on Shakespeare, 0.8 M parameters, a few minutes on a laptop.

    url=https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    curl -fo tinyshakespeare.txt $url
    echo "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed  tinyshakespeare.txt" | sha256sum -c
    llm-jax train shakespeare_char data.uri=tinyshakespeare.txt

Gave, on two cores that had other work too (commit 5f9f801, 157 s, Python 3.11, JAX 0.10.2): 1.892 nats a character on
the last tenth, 95 % interval 1.879 to 1.904.
"""

from llm_jax.data.config import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.config import OptimizerConfig, RunConfig

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
