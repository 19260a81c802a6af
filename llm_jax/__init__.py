"""A language-model library in JAX that you can read in an evening and train on a pod.

Importing the package imports no JAX, and keeps a compiler with known faults from running unguarded. Each room is
imported by its own name (`llm_jax.model`, `llm_jax.train`), so a tokenizer can be used, or the version read, without
starting JAX.
"""

from llm_jax.runtime import guard

guard()

__version__ = "0.1.0"
