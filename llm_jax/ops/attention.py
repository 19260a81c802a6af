"""Attention: one function, one mask, several implementations of the same specification.

`reference` is the specification: plain einsums that hold every score. The others, in files of their own, give the same
values and gradients faster or in less memory, and decline, with the reason, what they can't do.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from llm_jax import runtime
from llm_jax.ops.collectives import auto_axis_size
from llm_jax.ops.config import Scores
from llm_jax.ops.mask import Mask
from llm_jax.ops.position import alibi_slopes

# The score of what is not seen. Finite, so that a query that sees nothing gets a uniform pattern instead of NaN.
MASKED = -1e30

Tap = Callable[[str, jax.Array], jax.Array]


class Declined(ValueError):
    """An implementation can't do this case; its message says why."""


@struct.dataclass
class Dropout:
    """Zero a share `rate` of a pattern, drawn by `key`, and scale up the rest (Srivastava et al. 2014)."""

    key: Key[Array, ""]
    rate: float = struct.field(pytree_node=False)

    def __call__(self, pattern: Float[Array, "B K G l s"], block: Int[Array, ""] | int = 0) -> Array:
        """Return `pattern` after dropout; each `block` of queries has its own noise."""
        keep = jax.random.bernoulli(jax.random.fold_in(self.key, block), 1 - self.rate, pattern.shape)
        return jnp.where(keep, pattern / (1 - self.rate), jnp.zeros_like(pattern))


@runtime_checkable
class Implementation(Protocol):
    """The signature of all implementations. Raise `Declined` for what it can't do."""

    def __call__(
        self,
        q: Float[Array, "B L K G H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: Mask,
        scores: Scores,
        *,
        dropout: Dropout | None = None,
    ) -> Float[Array, "B L K G H"]: ...


def no_tap(name: str, x: jax.Array) -> jax.Array:
    """Return `x`."""
    return x


def soft_cap(x: Array, cap: float | None) -> Array:
    """Return `cap * tanh(x / cap)`; with None, `x`."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attention_scores(
    q: Array,
    k: Array,
    mask: Bool[Array, "#B L S"],
    distance: Int[Array, "#B L S"],
    scores: Scores,
    *,
    slopes: Float[Array, "K G"] | None = None,
    tap: Tap = no_tap,
) -> Float[Array, "B K G L S"]:
    """Return the scores that softmax reads, float32 whatever the dtype of `q`.

    `slopes` are those of ALiBi if these are not all heads of the model.
    """
    K, G, H = q.shape[-3:]
    factor = jnp.asarray(scores.factor(H), q.dtype)
    s = jnp.einsum("BLKGH,BSKH->BKGLS", q * factor, k, preferred_element_type=jnp.float32)
    s = soft_cap(s, scores.softcap)
    if scores.alibi:
        slopes = jnp.asarray(alibi_slopes(K * G), s.dtype) if slopes is None else slopes
        s = s - slopes.reshape(1, K, G, 1, 1) * jnp.abs(distance)[:, None, None].astype(s.dtype)
    s = tap("attn_scores", s)
    return jnp.where(mask[:, None, None], s, jnp.asarray(MASKED, s.dtype))


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Bool[Array, "#B L S"],
    distance: Int[Array, "#B L S"],
    scores: Scores,
    tap: Tap = no_tap,
    drop: Callable[[Array], Array] | None = None,
) -> Array:
    """Return softmax attention under a materialised mask; scores and softmax are float32 whatever the dtype of `q`."""
    pattern = tap("pattern", jax.nn.softmax(attention_scores(q, k, mask, distance, scores, tap=tap), axis=-1))
    pattern = pattern if drop is None else drop(pattern)
    return jnp.einsum("BKGLS,BSKH->BLKGH", pattern.astype(v.dtype), v)


def reference(
    q: Array, k: Array, v: Array, mask: Mask, scores: Scores, tap: Tap = no_tap, *, dropout: Dropout | None = None
) -> Array:
    """Compute attention as specified, with all `B K G L S` scores at once."""
    L, S = q.shape[1], k.shape[1]
    return attend(q, k, v, mask.materialise(L, S), mask.distance(L, S), scores, tap, dropout)


def imported(file: str, name: str) -> Implementation:
    """Return a function of a file of `ops/` that imports this one: it is looked up at its first call.

    Programs that run no kernel never load Pallas.
    """

    def run(q: Array, k: Array, v: Array, mask: Mask, scores: Scores, *, dropout: Dropout | None = None) -> Array:
        found = getattr(importlib.import_module(f"llm_jax.ops.{file}"), name)
        return found(q, k, v, mask, scores, **({} if dropout is None else {"dropout": dropout}))

    return run


def without_dropout(file: str, name: str) -> Implementation:
    """Return `imported(file, name)` of a function that never holds the pattern: it raises `Declined` for dropout."""
    found = imported(file, name)

    def run(q: Array, k: Array, v: Array, mask: Mask, scores: Scores, *, dropout: Dropout | None = None) -> Array:
        if dropout is not None:
            raise Declined(
                f"{name} never holds the pattern of which model.attention.dropout={dropout.rate} zeroes a share; use "
                "model.attention.implementation=reference or chunked and mesh.context=1, or model.attention.dropout=0"
            )
        return found(q, k, v, mask, scores)

    return run


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": reference,
    "chunked": imported("chunked", "chunked"),
    **{name: without_dropout("fast_attention", name) for name in ("flash", "splash", "cudnn", "tokamax")},
    "native": without_dropout("native.attention", "native"),
}
# For rows whose tokens are split over the mesh axis `context`. On a mesh without it these names mean None.
ACROSS: dict[str, Implementation] = {name: without_dropout("ring", name) for name in ("ring", "zigzag", "ulysses")}

LONG = 1024  # from this many queries on, the L x S scores are the limit, not the arithmetic

# By platform: what to try, in this order, and from how many queries on; below LONG the reference comes last.
FASTEST: dict[str, dict[str, int]] = {
    "cpu": {"native": 1, "chunked": LONG},
    "tpu": {"flash": LONG, "chunked": LONG},
    "gpu": {"cudnn": 128, "chunked": LONG},
}


def candidates(L: int) -> list[str]:
    """Return the implementations to try for L queries here, the fastest first.

    The last takes every case; from LONG on its memory is linear.
    """
    chosen = [name for name, least in FASTEST.get(platform(), FASTEST["cpu"]).items() if least <= L]
    chosen = [name for name in chosen if name != "native" or runtime.NATIVE]
    return chosen if L >= LONG else [*chosen, "reference"]


_listener: ContextVar[Callable[[str], object]] = ContextVar("listener", default=lambda line: None)


@contextlib.contextmanager
def heard(report: Callable[[str], object]) -> Generator[None]:
    """Call `report` within it with a line, once, that says which implementation runs and why faster ones declined."""
    token = _listener.set(functools.cache(report))
    try:
        yield
    finally:
        _listener.reset(token)


def platform() -> str:
    """Return where this program will run: cpu, tpu or gpu.

    The mesh of `jax.set_mesh` decides, even if this process only compiles for its devices; without a mesh it is the
    default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name == "cuda" else name


def across(implementation: str | None) -> str:
    """Return which of `ACROSS` attends to split rows, `ring` by default. Raise `Declined` for one that can't."""
    if implementation is not None and implementation not in ACROSS:
        raise Declined(
            f"{implementation} takes whole rows, and mesh.context splits them; use one of {', '.join(ACROSS)}"
        )
    return implementation or "ring"


def check_mask(mask: object) -> None:
    """Raise `ValueError` for an array instead of a `Mask`: kernels read its fields, and skip what these hide."""
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask is a {type(mask).__name__}, expected a Mask, which says who sees whom by rules; use "
            "Mask(causal=False) where all see all, and Mask(segments=...) with a segment apart for what none may see"
        )


def attention(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Mask,
    scores: Scores = Scores(),
    *,
    implementation: str | None = None,
    tap: Tap | None = None,
    dropout: Dropout | None = None,
) -> Float[Array, "B L K G H"]:
    """Return grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): query head (k, g) reads key/value head k.

    `implementation=None` takes the first of `FASTEST` that accepts; a name takes that one, or raises `Declined`, a
    `ValueError`, with the reason. A `tap` is shown scores and pattern, so the reference runs. `dropout` is for
    training, and for implementations that hold a pattern. Rows that are split over `mesh.context` take one of `ACROSS`,
    by default `ring`. Raise `ValueError` for an unknown name, and for an array instead of a `Mask`.
    """
    check_mask(mask)
    known = IMPLEMENTATIONS | ACROSS
    if implementation is not None and implementation not in known:
        raise ValueError(f"unknown attention {implementation!r}; known: {', '.join(known)}")
    if tap is not None and implementation == "zigzag" and auto_axis_size("context") > 1:
        raise Declined("the tokens of a zigzag are out of order; look at them with model.attention.implementation=ring")
    if tap is not None:
        return reference(q, k, v, mask, scores, tap, dropout=dropout)
    names = [implementation] if implementation in IMPLEMENTATIONS else candidates(q.shape[1])
    if auto_axis_size("context") > 1:
        names = [across(implementation)]
    declined = ""
    for name in names[:-1]:
        try:
            return _report(known[name](q, k, v, mask, scores, dropout=dropout), name, declined)
        except Declined as reason:
            declined += f"; {str(reason).partition(';')[0]}"
    return _report(known[names[-1]](q, k, v, mask, scores, dropout=dropout), names[-1], declined)


def _report(out: Array, name: str, declined: str) -> Array:
    _listener.get()(f"attention over {out.shape[1]:,} tokens: {name}{declined}")
    return out
