"""The transformer. The only folder that imports flax.linen."""
