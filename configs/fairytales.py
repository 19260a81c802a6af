"""A small Llama that tells fairy tales, with a vocabulary of its own, trained on Grimm or TinyStories.

    llm-jax train fairytales data.uri=grimm_tales.txt

A text file with <|endoftext|> between the tales. Gave, on the 1.5 MB of Grimm's in English and two cores that had other
work too (commit 5f9f801, 181 s, Python 3.11, JAX 0.10.2): 1.606 bits per byte held out, 95 % interval 1.534 to 1.654.
TinyStories, from the hub (pip install -e '.[hf]'; not run here, without a network):

    llm-jax train fairytales data.uri=hf://datasets/roneneldan/TinyStories/data steps=5000
"""

from llm_jax.data.config import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.config import OptimizerConfig, RunConfig

config = RunConfig(
    model=ModelConfig(vocab_size=1024, d_model=128, n_layers=4, n_heads=4, max_seq_len=256, dropout=0.1, unroll=4),
    data=DataConfig(uri="grimm_tales.txt", tokenizer="train:1024", seq_len=256, batch_size=8),
    optimizer=OptimizerConfig(name="muon", learning_rate=5e-3, schedule="wsd", warmup_steps=40, decay_fraction=0.4),
    steps=600,
    prompts=("Once upon a time", "The fox said"),
)
