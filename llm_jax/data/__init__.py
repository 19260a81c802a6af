"""Text to batches: tokenizers, sources, token shards, packing and the loader. NumPy; only the loader knows JAX."""
