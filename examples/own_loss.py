# %% [markdown]
# # A loss, an optimizer and a metric of your own
#
# A loss is a function of the model, its parameters, a batch and a key. It returns a sum over the targets that count,
# and any metrics as sums: the step divides them by the number of targets, over all microbatches and devices.

# %%
import jax.numpy as jnp
import optax

import llm_jax as lj


def focal_loss(model, params, batch, key):
    """Cross-entropy that counts a token less the better it is predicted (Lin et al. 2017, arXiv:1708.02002)."""
    logits = lj.forward_batch(model, params, batch, key).logits
    _, nll = lj.cross_entropy(logits, batch.targets)  # (loss, nll), of every token; 0 where a target does not count
    return (nll * (1 - jnp.exp(-nll)) ** 2).sum(), {"nll": nll.sum()}


# %% [markdown]
# An optimizer is any optax transformation, its learning rate inside. A callback sees every step: what it returns is
# logged, and `raise lj.Stop(...)` ends the run with a checkpoint.


# %%
def watch(step, state, metrics):
    if step == 60:
        raise lj.Stop("60 steps are enough to see it")
    return {"embedding_norm": jnp.linalg.norm(state.params["embedding"]["table"])}


# %%
config = lj.RunConfig(
    model=lj.ModelConfig(vocab_size=320, d_model=64, n_layers=2, n_heads=4, max_seq_len=128),
    data=lj.DataConfig(uri="builtin:numbers", tokenizer="byte", seq_len=128, batch_size=8),
    steps=80,
    evaluate_every=40,
    prompts=(),
)
run = lj.fit(config, "runs/focal", loss=focal_loss, optimizer=optax.adamw(3e-3), metrics=watch)

# %%
{name: run.metrics[name][[0, -2]] for name in ("loss", "nll", "embedding_norm")}

# %% [markdown]
# `config.json` can't hold code, so the run remembers a hash of it. Whoever resumes the run has to bring the same code:

# %%
try:
    lj.resume("runs/focal")
except ValueError as error:
    print(error)

# %%
run = lj.resume("runs/focal", loss=focal_loss, optimizer=optax.adamw(3e-3))
run.progress
