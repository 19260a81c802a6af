"""How many parameters a model has and how many FLOPs it takes, read off the tree that `init` would make."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from llm_jax import tree as trees
from llm_jax.model.config import SOFTMAX, Layer, ModelConfig
from llm_jax.model.transformer import Transformer

# Where a parameter stands, and what it is counted under. First match wins; no match raises.
COMPONENTS: tuple[tuple[str, str], ...] = (
    (r"^embedding/", "embedding"),
    (r"^positions/", "positions"),
    (r"/attention/", "attention"),
    (r"/feedforward/", "feedforward"),
    (r"/experts/", "experts"),
    (r"_norm/", "norms"),
    (r"^(unembedding|classes)/", "unembedding"),
)
# Whether a token is multiplied with a parameter.
MATRICES: tuple[tuple[str, bool], ...] = ((r"/w_convolution$", False), (r"/w_\w+$", True), (r".", False))
# Those of which a token meets only the experts that it is sent to.
ROUTED: tuple[tuple[str, bool], ...] = ((r"/experts/w_(gate|up|down)$", True), (r".", False))


@functools.cache
def shapes(c: ModelConfig) -> PyTree:
    """The parameters, shapes only."""
    return jax.eval_shape(Transformer(c).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def parameter_counts(c: ModelConfig) -> dict[str, int]:
    """Parameters by component."""
    counts = dict.fromkeys((name for _, name in COMPONENTS), 0)
    for path, leaf in trees.leaves(shapes(c)).items():
        counts[trees.first_match(COMPONENTS, path)] += math.prod(leaf.shape)
    return counts


def active_parameters(c: ModelConfig) -> int:
    """Parameters that a token meets: of the experts only those that it is sent to."""
    return sum(_met(c, path, leaf) for path, leaf in trees.leaves(shapes(c)).items())


def flops_per_token(c: ModelConfig, seq_len: int) -> int:
    """FLOPs of a training step a token: 6 a matrix weight that it meets, and 12 (K G) H a key in view of a layer.

    2 forward and 4 backward for each multiply-add (Kaplan et al. 2020, arXiv:2001.08361; PaLM, appendix B).
    Causal attention looks at `(L + 1) / 2` keys on average; the half above the diagonal is not counted. Linear
    attention writes its state and reads it, which costs a head of H as much as H keys do.
    Recomputation is not counted: this is the model's work, not the machine's.
    """
    leaves = trees.leaves(shapes(c)).items()
    matrices = sum(_met(c, path, leaf) for path, leaf in leaves if trees.first_match(MATRICES, path))
    keys = sum(_keys_in_view(c, c.layer(i), seq_len) for i in range(c.n_layers))
    return int(6 * (matrices + math.prod(shapes(c)[c.head]["table"].shape)) + 12 * c.n_heads * c.H * keys)


def _met(c: ModelConfig, path: str, leaf: jax.ShapeDtypeStruct) -> int:
    """How many numbers of a leaf a token meets."""
    size = math.prod(leaf.shape)
    if c.experts is None or not trees.first_match(ROUTED, path):
        return size
    return size // c.experts.number * c.experts.active


def _keys_in_view(c: ModelConfig, layer: Layer, seq_len: int) -> float:
    """Keys that a query of a layer sees, on average over a row."""
    if layer.mixer not in SOFTMAX:
        return float(c.H)
    if layer.mixer == "sparse" and c.attention.sparse is not None:
        size = c.attention.sparse.block
        view = c.attention.sparse.view(-(-seq_len // size))
        return size * view.sum(1).mean() - (size - 1) / 2
    window = min(c.attention.window or seq_len, seq_len) if layer.mixer == "local" else seq_len
    return window - window * (window - 1) / (2 * seq_len)
