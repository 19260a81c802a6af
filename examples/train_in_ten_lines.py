# %% [markdown]
# # Train a language model in ten lines
#
# A run is a config and a folder: the folder holds everything about it. This one is small enough for a laptop: it
# learns German number words and their English ones, from the library itself, with nothing to download.

# %%
import llm_jax as lj

config = lj.recipe("quickstart", "data.uri=builtin:numbers", "data.tokenizer=byte", "model.vocab_size=320")
config = lj.replace(
    config,
    **{"model.d_model": 64, "model.n_layers": 2, "model.max_seq_len": 128, "data.seq_len": 128},
    **{"steps": 120, "prompts": ("dreiundzwanzig\t",), "evaluate_every": 120, "optimizer.learning_rate": 1e-2},
)
run = lj.fit(config, "runs/numbers")

# %% [markdown]
# What it measured, as columns, and how well it predicts text that it has not seen:

# %%
run.metrics["loss"][[0, -1]], run.evaluate().bits_per_byte

# %% [markdown]
# What it generates. The sampler is built once, at the first call of `generate`.

# %%
run.generate(["siebenundvierzig\t", "tausend\t"], temperature=0.2, max_tokens=30, stop=["\n"])

# %% [markdown]
# What happens inside: every named activation of a forward pass, stacked over layers, rows and tokens.

# %%
{name: x.shape for name, x in run.capture("zwölf\t").items()}

# %% [markdown]
# The run as a card; `runs/numbers/report.html` is the whole page. `lj.Run.open("runs/numbers")` opens it again.

# %%
run
