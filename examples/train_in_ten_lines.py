# %% [markdown]
# # Train a language model in ten lines
#
# A run is a config and a folder: the folder holds everything about it. This one is small enough for a laptop: it
# learns German number words and their English ones, from the library itself, with nothing to download.

# %%
from contextlib import suppress

import llm_jax as lj

config = lj.recipe(
    "quickstart",
    {"data.uri": "builtin:numbers", "data.tokenizer": "byte", "data.seq_len": 128, "optimizer.learning_rate": 1e-2},
    {"model.vocab_size": 320, "model.d_model": 64, "model.n_layers": 2, "model.max_seq_len": 128},
    steps=300,
    evaluate_every=300,
    prompts=("dreihundertvier\t",),
)
run = lj.fit(config, "runs/numbers")

# %% [markdown]
# What it measured, as columns, and how well it predicts text that it has not seen:

# %%
run.metrics["loss"][[0, -1]], run.evaluate().bits_per_byte

# %% [markdown]
# The same columns as a curve, where matplotlib is installed:

# %%
with suppress(ImportError):
    from matplotlib import pyplot

    pyplot.plot(run.metrics["step"], run.metrics["loss"])

# %% [markdown]
# What it generates from the start of a document: one text, or a list of them. The sampler is built once, at the first
# call of `generate`.

# %%
run.generate(["viertausendsiebenhundertelf\t", "neuntausenddreiundzwanzig\t"], temperature=0, max_tokens=60)

# %% [markdown]
# What happens inside: every named activation of a forward pass, stacked over layers, rows and tokens.

# %%
{name: x.shape for name, x in run.capture("siebenhundertzwölf\t").items()}

# %% [markdown]
# The run in a line, and as a card; `runs/numbers/report.html` is a whole page. `lj.Run.open("runs/numbers")` opens it.

# %%
print(run)
run
