# %% [markdown]
# # A sweep
#
# A config is a frozen dataclass, and a run a function of it: a sweep is a loop. Each run is resumed where it stopped if
# this is run again.

# %%
from pathlib import Path

import llm_jax as lj

base = lj.RunConfig(
    model=lj.ModelConfig(vocab_size=320, d_model=64, n_layers=2, n_heads=4, max_seq_len=128),
    data=lj.DataConfig(uri="builtin:numbers", tokenizer="byte", seq_len=128, batch_size=8),
    optimizer=lj.OptimizerConfig(warmup_steps=10),
    steps=60,
    evaluate_every=60,
    prompts=(),
)


def trained(config, folder):
    """Return the run in `folder`, trained to the end, begun or resumed as needed."""
    if not Path(folder, "config.json").exists():
        return lj.fit(config, folder)
    run = lj.Run.open(folder)
    return run if run.metrics["step"][-1] == config.steps else lj.resume(folder)


runs = {
    rate: trained(lj.replace(base, {"optimizer.learning_rate": rate}), f"runs/rate_{rate}") for rate in (3e-3, 1e-2)
}

# %%
{rate: run.evaluate().bits_per_byte for rate, run in runs.items()}
