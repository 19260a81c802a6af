# %% [markdown]
# # A layer of your own
#
# A mixer is how a layer reads other tokens. `running_mean.py`, beside this notebook, has one that reads the mean of its
# row so far, and keeps a sum and a count while text is generated. The config names it by its import path; nothing is
# registered. Norms, residuals and the feed-forward stay the block's.

# %%
from pathlib import Path

import llm_jax as lj

config = lj.RunConfig(
    model=lj.ModelConfig(
        vocab_size=320,
        d_model=64,
        n_layers=4,
        n_heads=4,
        max_seq_len=128,
        layers=("running_mean:RunningMean", "global"),
    ),
    data=lj.DataConfig(uri="builtin:numbers", tokenizer="byte", seq_len=128, batch_size=8),
    optimizer=lj.OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
    steps=100,
    evaluate_every=50,
    prompts=(),
)
run = lj.fit(config, "runs/mean")

# %% [markdown]
# It generates like any other: the state of each layer is kept in the cache.

# %%
run.generate("siebenhundertelf\t", temperature=0.2, max_tokens=40)

# %% [markdown]
# The class declares the mesh axes on which it computes what one device does, `axes = ("data", "fsdp")` by default; on
# other axes a run is refused, not wrong. The run remembers a hash of its code, as of a loss.

# %%
print(Path("runs/mean/code.json").read_text())
