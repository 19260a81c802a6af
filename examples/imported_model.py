# %% [markdown]
# # A model from Hugging Face, and back
#
# `import_hf` makes a run of a model: a folder, or a name on the hub, such as `HuggingFaceTB/SmolLM2-135M`. To need no
# network, this notebook first exports a model of its own. It needs `pip install "llm-jax[hf]"`.

# %%
import llm_jax as lj

config = lj.RunConfig(
    model=lj.ModelConfig(vocab_size=320, d_model=64, n_layers=2, n_heads=4, max_seq_len=128),
    data=lj.DataConfig(uri="builtin:numbers", tokenizer="train:320", seq_len=128, batch_size=8),
    optimizer=lj.OptimizerConfig(learning_rate=3e-3, warmup_steps=20),
    steps=60,
    evaluate_every=60,
    prompts=(),
)
lj.export_hf(lj.fit(config, "runs/origin"), "exported")

# %% [markdown]
# The folder that transformers would load, as a run: the same model, with the same greedy text.

# %%
run = lj.import_hf("exported", "runs/imported")
prompt = "siebentausendzwei\t"
(
    run.generate(prompt, temperature=0, max_tokens=40),
    lj.Run.open("runs/origin").generate(prompt, temperature=0, max_tokens=40),
)

# %% [markdown]
# Train it further, on other text: weights, model and tokenizer are those of the run, data and training are those of
# another config.

# %%
texts = [f"{a} + {b} = {a + b}\n" for a in range(40) for b in range(40)]
more = lj.config_from("runs/imported", config, {"optimizer.learning_rate": 1e-2}, steps=120, evaluate_every=120)
sums = lj.fit(more, "runs/sums", data=texts)
sums.evaluate().bits_per_byte, sums.generate("3 + 4 = ", temperature=0.0, max_tokens=4)
