"""Classify prompts: one forward pass each, and nothing is generated."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from llm_jax.config import replace
from llm_jax.data.task import TaskConfig, resolve
from llm_jax.data.tokenizer import Tokenizer
from llm_jax.infer.decode import forget, padded
from llm_jax.infer.generate import BATCH, as_texts, prompt_ids
from llm_jax.model.config import ModelConfig, own_layers
from llm_jax.model.transformer import Transformer, forward, head_table
from llm_jax.ops.loss import unembed


@dataclasses.dataclass(frozen=True)
class Answer:
    """The likeliest answer to a prompt."""

    prompt: str
    answer: str
    probability: float


def classify(
    config: ModelConfig,
    params: PyTree,
    tokenizer: Tokenizer,
    task: TaskConfig,
    prompts: str | Sequence[str],
    *,
    begin: bool = True,
    special: bool = False,
) -> list[Answer]:
    """Return the likeliest of a task's answers to each prompt, or to the only one.

    `begin` and `special` are as for `generate`. Raise `ValueError` for a prompt that is too long.
    """
    prompts = as_texts(prompts, "prompts=")
    separator = resolve(task, tokenizer, special=special).separator
    ids = prompt_ids(config, tokenizer, [task.ask(prompt) for prompt in prompts], begin, special)
    # An implementation chosen for rows of training length may decline these.
    config = replace(config, **{"attention.implementation": None})
    if own_layers(config):  # which may have changed under its name since this was traced
        forget(probabilities)
    answers = []
    for first in range(0, len(ids), BATCH):
        tokens, _ = padded(ids[first : first + BATCH], config.max_seq_len)
        pooled = (tokens == separator).argmax(1)  # every question has a separator; the first ends it
        chances = np.asarray(probabilities(config, params, tokens, pooled))
        answers += [(task.answers[row.argmax()], row.max().item()) for row in chances]
    return [Answer(prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def probabilities(
    config: ModelConfig, params: PyTree, tokens: Int[Array, "B L"], pooled: Int[Array, " B"]
) -> Float[Array, "B C"]:
    """Return the probability of every class, read at token `pooled` of each row; later tokens change nothing."""
    out = forward(Transformer(config), params, tokens, lengths=pooled + 1, logits=False)
    last = out.hidden[jnp.arange(len(tokens)), pooled]
    return jax.nn.softmax(unembed(last, head_table(config, params).astype(last.dtype), config.logit_softcap))
