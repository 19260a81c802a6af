"""How many parameters a model has and how many FLOPs it takes, from the shapes of the tree that `init` makes."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from llm_jax import tree as trees
from llm_jax.model.config import SOFTMAX, Layer, ModelConfig, is_own
from llm_jax.model.stack import locate
from llm_jax.model.transformer import Transformer
from llm_jax.sharding import own_letters

# The path of a parameter -> the component it counts under. First match wins; no match raises.
COMPONENTS: tuple[tuple[str, str], ...] = (
    (r"^embedding/", "embedding"),
    (r"^positions/", "positions"),
    (r"/(attention|mixer)/", "attention"),
    (r"/feedforward/", "feedforward"),
    (r"/experts/", "experts"),
    (r"_norm/", "norms"),
    (r"^(unembedding|classes)/", "unembedding"),
)
# The path of a parameter of our layers -> whether it is a matrix that tokens are multiplied by.
MATRICES: tuple[tuple[str, bool], ...] = ((r"/w_convolution$", False), (r"/w_\w+$", True), (r".", False))
# The same -> whether a token uses only the experts it is routed to.
ROUTED: tuple[tuple[str, bool], ...] = ((r"/experts/w_(gate|up|down)$", True), (r".", False))


@functools.cache
def shapes(c: ModelConfig) -> PyTree:
    """Return the tree of parameters as shapes."""
    return jax.eval_shape(Transformer(c).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def parameter_counts(c: ModelConfig) -> dict[str, int]:
    """Return the number of parameters by component."""
    counts = dict.fromkeys((name for _, name in COMPONENTS), 0)
    for path, leaf in trees.leaves(shapes(c)).items():
        counts[trees.first_match(COMPONENTS, path)] += math.prod(leaf.shape)
    return counts


def active_parameters(c: ModelConfig) -> int:
    """Return how many parameters a token uses: of the experts, only those it is routed to."""
    return sum(_used(c, path, leaf) for path, leaf in trees.leaves(shapes(c)).items())


def flops_per_token(c: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs of a training step per token: 6 per matrix weight it uses, and 12 (K G) H per visible key.

    Each multiply-add is 2 forward and 4 backward (Kaplan et al. 2020, arXiv:2001.08361; PaLM, appendix B). Causal
    attention reads `(L + 1) / 2` keys on average; the half above the diagonal is not counted. Linear attention writes
    its state and reads it, which costs a head of H as much as H keys. Recomputation is not counted: this is the work
    of the model, not of the machine.
    """
    leaves = trees.leaves(shapes(c)).items()
    matrices = sum(_used(c, path, leaf) for path, leaf in leaves if _is_matrix(path, leaf))
    keys = sum(_visible_keys(c, locate(c, i).kind, seq_len) for i in range(c.n_layers))
    return int(6 * (matrices + math.prod(shapes(c)[c.head]["table"].shape)) + 12 * c.n_heads * c.H * keys)


def _is_matrix(path: str, leaf: jax.ShapeDtypeStruct) -> bool:
    """Return whether tokens are multiplied by a leaf; in a layer of the user's own, by all of two axes and more."""
    if (letters := own_letters(path, leaf.shape)) is not None:
        return len(letters.removeprefix("N")) > 1
    return trees.first_match(MATRICES, path)


def _used(c: ModelConfig, path: str, leaf: jax.ShapeDtypeStruct) -> int:
    """Return how many numbers of a leaf a token uses."""
    size = math.prod(leaf.shape)
    own = own_letters(path, leaf.shape) is not None
    if c.experts is None or own or not trees.first_match(ROUTED, path):
        return size
    return size // c.experts.number * c.experts.active


def _visible_keys(c: ModelConfig, kind: Layer, seq_len: int) -> float:
    """Return how many keys a query of a layer sees, on average over a row."""
    if is_own(kind.mixer):
        return 0.0  # what it does beyond its matrices, nobody knows
    if kind.mixer not in SOFTMAX:
        return float(c.H)
    if kind.mixer == "sparse" and c.attention.sparse is not None:
        size = c.attention.sparse.block
        view = c.attention.sparse.view(-(-seq_len // size))
        return size * view.sum(1).mean() - (size - 1) / 2
    window = min(c.attention.window or seq_len, seq_len) if kind.mixer == "local" else seq_len
    return window - window * (window - 1) / (2 * seq_len)
