# %% [markdown]
# # Train a language model in ten lines
#
# A run is a config and a folder. Everything about the run lies in the folder: config, tokenizer, checkpoints, metrics,
# a report. This one is small enough for a laptop: a 0.2 M parameter model that learns to add.

# %%
import llm_jax as lj

config = lj.recipe("quickstart", "data.uri=builtin:numbers", "data.tokenizer=byte", "model.vocab_size=320")
config = lj.override(config, "model.d_model=64", "model.n_layers=2", "model.d_ff=256", "data.seq_len=64", "steps=120")
run = lj.fit(config, "runs/numbers")

# %% [markdown]
# What it measured, as columns:

# %%
run.metrics["loss"][[0, -1]], run.evaluate().bits_per_byte

# %% [markdown]
# What it says. The `Sampler` behind `generate` is built once, at the first call.

# %%
run.generate(["one"], temperature=0.5, max_tokens=30)

# %% [markdown]
# What happens inside: every named activation of a forward pass, stacked over the layers.

# %%
taps = run.capture("one")
{name: x.shape for name, x in taps.items()}

# %% [markdown]
# The run itself is a page, and so is `runs/numbers/report.html`.

# %%
run
