"""Text to batches: tokenizers, sources, token shards, packing, and the loader. NumPy all through."""
