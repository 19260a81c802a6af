"""How many parameters a model has and how many FLOPs it takes, by arithmetic on the shapes of its parameters.

`parameter_shapes` says for a config what `init` makes, without JAX: a test holds it to what is traced.
"""

import functools
import math
from collections.abc import Iterator

from llm_jax.model.config import SOFTMAX, Layer, ModelConfig, is_own, own_layers
from llm_jax.model.pattern import locate, n_scanned
from llm_jax.paths import first_match

Shape = tuple[int, ...]

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


# How a sublayer joins the residual stream (`model.residual`) -> the norms of a layer.
NORMS: dict[str, tuple[str, ...]] = {
    "pre": ("attention_norm", "feedforward_norm"),
    "post": ("attention_norm", "feedforward_norm"),
    "sandwich": ("attention_norm", "attention_out_norm", "feedforward_norm", "feedforward_out_norm"),
    "output": ("attention_out_norm", "feedforward_out_norm"),
    "parallel": ("attention_norm", "feedforward_norm"),
}


@functools.cache
def parameter_shapes(c: ModelConfig) -> dict[str, Shape]:
    """Return the shape of every parameter by its path; layers that run in the scan are stacked, with a leading N."""
    if own_layers(c):
        return _traced_shapes(c)
    D, found = c.d_model, {"embedding/table": (c.vocab_size, c.d_model)}
    if c.positions == "learned":
        found["positions/table"] = (c.max_seq_len, D)
    if c.head != "embedding":
        found[f"{c.head}/table"] = (c.n_classes or c.vocab_size, D)
    if c.residual != "post":
        found |= {f"final_norm/{name}": shape for name, shape in _norm(c, D)}
    for layer in range(c.n_layers):
        where = locate(c, layer)
        if where.row in (0, None):  # the first row of a stack stands for all
            rows = () if where.row is None else (n_scanned(c) // len(c.layers),)
            found |= {f"{where.path}/{name}": (*rows, *shape) for name, shape in _layer(c, where.kind)}
    return found


def _traced_shapes(c: ModelConfig) -> dict[str, Shape]:
    """Return the same from the tree that `init` makes: what a layer of a user's own holds, only tracing says."""
    from llm_jax.model.shapes import shapes
    from llm_jax.tree import leaves

    return {path: leaf.shape for path, leaf in leaves(shapes(c)).items()}


def _layer(c: ModelConfig, kind: Layer) -> Iterator[tuple[str, Shape]]:
    """Yield the parameters of a layer of one kind."""
    for name in NORMS[c.residual]:
        yield from _inside(name, _norm(c, c.d_model))
    yield from _inside("attention", _attention(c, kind))
    if not kind.moe:
        yield from _inside("feedforward", _feedforward(c, c.F))
        return
    assert c.experts is not None
    D, E, F = c.d_model, c.experts.number, c.experts.d_ff or c.F
    yield "experts/w_router", (D, E)
    if c.experts.balance == "bias":
        yield "experts/router_bias", (E,)
    for name, shape in _feedforward(c, F):
        if name.startswith("w_"):
            yield f"experts/{name}", (E, *shape)
    if c.experts.shared:
        yield from _inside("experts/shared", _feedforward(c, c.experts.shared * F))


def _inside(folder: str, parameters: Iterator[tuple[str, Shape]]) -> Iterator[tuple[str, Shape]]:
    return ((f"{folder}/{name}", shape) for name, shape in parameters)


def _norm(c: ModelConfig, width: int) -> Iterator[tuple[str, Shape]]:
    yield "scale", (width,)
    if c.norm == "layernorm":
        yield "bias", (width,)


def _attention(c: ModelConfig, kind: Layer) -> Iterator[tuple[str, Shape]]:
    """Yield the parameters of softmax attention, of linear attention, and of the gated delta rule."""
    D, K, G, H, W = c.d_model, c.K, c.G, c.H, c.attention.convolution
    projected = {"q": (K, G, H), "k": (K, H), "v": (K, H)} | ({"gate": (K, G, H)} if kind.mixer == "delta" else {})
    for name, heads in projected.items():
        yield f"w_{name}", (D, *heads)
        if c.bias != "none":
            yield f"b_{name}", heads
    yield "w_o", (K, G, H, D)
    if c.bias in ("attention", "all"):
        yield "b_o", (D,)
    if kind.mixer in SOFTMAX and c.attention.qk_norm != "none":
        whole = c.attention.qk_norm == "whole"
        yield from _inside("q_norm", _norm(c, K * G * H if whole else H))
        yield from _inside("k_norm", _norm(c, K * H if whole else H))
    if kind.mixer == "delta":
        yield from (("w_beta", (D, K)), ("w_decay", (D, K)), ("b_decay", (K,)), ("log_rate", (K,)))
        yield from (("w_convolution", (W, K, G + 2, H)), ("z_scale", (H,)))


def _feedforward(c: ModelConfig, F: int) -> Iterator[tuple[str, Shape]]:
    D = c.d_model
    for name, shape in (({"gate": (D, F)} if c.gated else {}) | {"up": (D, F), "down": (F, D)}).items():
        yield f"w_{name}", shape
        if c.bias == "all":
            yield f"b_{name}", shape[1:]


def parameter_counts(c: ModelConfig) -> dict[str, int]:
    """Return the number of parameters by component."""
    counts = dict.fromkeys((name for _, name in COMPONENTS), 0)
    for path, shape in parameter_shapes(c).items():
        counts[first_match(COMPONENTS, path)] += math.prod(shape)
    return counts


def active_parameters(c: ModelConfig) -> int:
    """Return how many parameters a token uses: of the experts, only those it is routed to."""
    return sum(_used(c, path, shape) for path, shape in parameter_shapes(c).items())


def flops_per_token(c: ModelConfig, seq_len: int) -> int:
    """Return the FLOPs of a training step per token: 6 per matrix weight it uses, and 12 (K G) H per visible key.

    Each multiply-add is 2 forward and 4 backward (Kaplan et al. 2020, arXiv:2001.08361; PaLM, appendix B). Causal
    attention reads `(L + 1) / 2` keys on average; the half above the diagonal is not counted. Linear attention writes
    its state and reads it, which costs a head of H as much as H keys. Recomputation is not counted: this is the work
    of the model, not of the machine.
    """
    shapes = parameter_shapes(c)
    matrices = sum(_used(c, path, shape) for path, shape in shapes.items() if _is_matrix(path, shape))
    keys = sum(_visible_keys(c, locate(c, i).kind, seq_len) for i in range(c.n_layers))
    return int(6 * (matrices + math.prod(shapes[f"{c.head}/table"])) + 12 * c.n_heads * c.H * keys)


def _is_matrix(path: str, shape: Shape) -> bool:
    """Return whether tokens are multiplied by a leaf; in a layer of the user's own, by all of two axes and more."""
    if "/mixer/" in path:
        stacked = not path.startswith("layers_")
        return len(shape) - stacked > 1
    return first_match(MATRICES, path)


def _used(c: ModelConfig, path: str, shape: Shape) -> int:
    """Return how many numbers of a leaf a token uses."""
    size = math.prod(shape)
    if c.experts is None or "/mixer/" in path or not first_match(ROUTED, path):
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
