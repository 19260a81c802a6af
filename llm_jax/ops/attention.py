"""Attention: one function, one mask, several implementations of the same specification.

`reference` is the specification: plain einsums that hold every score. The others give the same values and
gradients faster or in less memory, and decline, with the reason, what they can't do.
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from llm_jax.ops.collectives import auto_axis_size
from llm_jax.ops.position import alibi_slopes

# A finite stand-in for minus infinity: a row that may see nothing gets a uniform pattern instead of NaN.
MASKED = -1e30

Tap = Callable[[str, jax.Array], jax.Array]


class Declined(ValueError):
    """An implementation can't do this case; its message says why."""


@dataclasses.dataclass(frozen=True)
class Sparse:
    """A pattern of whole blocks of `block` positions, looking back: what it leaves out is never computed.

    `strided` sees the last `local` blocks and every `stride`-th before them; `fixed` sees its own group of `stride`
    blocks and the last block of every earlier group (Child et al. 2019, arXiv:1904.10509); `bigbird` sees the last
    `local` blocks, the first `first`, and `random` others, drawn once for each block and alike in every layer and head
    (Zaheer et al. 2020, arXiv:2007.14062).

    Attributes:
      pattern: how blocks are chosen.
      block: positions of a block.
      local: last blocks that `strided` and `bigbird` see.
      stride: blocks of a group of `fixed`; every so many of earlier blocks that `strided` sees.
      first: first blocks of a row that `bigbird` sees.
      random: other blocks that `bigbird` sees.
    """

    pattern: Literal["strided", "fixed", "bigbird"] = "strided"
    block: int = 128
    local: int = 2
    stride: int = 8
    first: int = 1
    random: int = 2

    def __post_init__(self) -> None:
        for name in ("block", "local", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"sparse.{name}={getattr(self, name)} must be at least 1")
        for name in ("first", "random"):
            if getattr(self, name) < 0:
                raise ValueError(f"sparse.{name}={getattr(self, name)} must not be negative")

    def view(self, blocks: int) -> Bool[np.ndarray, "blocks blocks"]:
        """Which block of queries sees which block of keys. More blocks only add rows and columns."""
        query, key = np.arange(blocks)[:, None], np.arange(blocks)[None]
        distance = query - key
        if self.pattern == "strided":
            seen = (distance < self.local) | (distance % self.stride == 0)
        elif self.pattern == "fixed":
            seen = (query // self.stride == key // self.stride) | (key % self.stride == self.stride - 1)
        else:
            seen = (distance < self.local) | (key < self.first)
            for row in range(1, blocks):
                others = np.flatnonzero(~seen[row, :row])
                seen[row, np.random.default_rng((self.random, row)).permutation(others)[: self.random]] = True
        return seen & (distance >= 0)


@struct.dataclass
class Mask:
    """Who may look at whom. Together the fields compose: a key is seen if no field hides it.

    Attributes:
      causal: a query sees no later position.
      window: a query sees only the last `window` positions, itself included.
      sinks: and the first `sinks` of its document, however far (Xiao et al. 2023, arXiv:2309.17453).
      sparse: only the blocks of this pattern.
      segments: tokens see only their own segment (documents packed in one row). Needs L = S.
      prefix: keys that later and earlier queries of their document see alike (prefix-LM, Raffel et al. 2019).
      kv_length: row b of a cache holds `kv_length[b]` keys, and its queries are the last L of them.
    """

    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | None = struct.field(pytree_node=False, default=None)
    sinks: int = struct.field(pytree_node=False, default=0)
    sparse: Sparse | None = struct.field(pytree_node=False, default=None)
    segments: Int[Array, "B S"] | None = None
    prefix: Bool[Array, "B S"] | None = None
    kv_length: Int[Array, " B"] | None = None

    def distance(self, L: int, S: int, queries: Array | None = None, keys: Array | None = None) -> Int[Array, "#B l s"]:
        """How far each query stands behind each key. `queries` and `keys` pick some of the L and S by index."""
        queries = jnp.arange(L) if queries is None else queries
        keys = jnp.arange(S) if keys is None else keys
        if self.kv_length is not None:
            stand = queries[None] + (self.kv_length - L)[:, None]
        elif L != S:
            raise ValueError(f"{L} queries and {S} keys need kv_length to say where the queries stand")
        else:
            stand = queries[None]
        return stand[:, :, None] - keys[None, None]

    def materialise(
        self, L: int, S: int, queries: Int[Array, " l"] | None = None, keys: Int[Array, " s"] | None = None
    ) -> Bool[Array, "#B l s"]:
        """The mask as booleans, True where a query may see a key; `queries` and `keys` as in `distance`."""
        distance = self.distance(L, S, queries, keys)
        keys = jnp.arange(S) if keys is None else keys
        mask = jnp.ones(distance.shape, bool)
        if self.causal:
            mask = distance >= 0
            if self.prefix is not None:
                mask |= self.prefix[:, None, keys]
        if self.window is not None:
            near = distance < self.window
            if self.sinks:
                near |= (self.places(S)[:, keys] < self.sinks)[:, None]
            mask &= near
        if self.sparse is not None:
            size = self.sparse.block
            view, last = jnp.asarray(self.sparse.view(-(-S // size))), -(-S // size) - 1
            stand = distance + keys[None, None]
            mask &= view[jnp.clip(stand // size, 0, last), keys[None, None] // size]
        if self.kv_length is not None:
            mask &= keys[None, None] < self.kv_length[:, None, None]
        if self.segments is not None:
            if (self.segments.shape[1],) * 2 != (L, S):
                held = self.segments.shape[1]
                raise ValueError(f"segments of {held} tokens can't tell {L} queries and {S} keys apart")
            mine = self.segments if queries is None else self.segments[:, queries]
            mask &= mine[:, :, None] == self.segments[:, None, keys]
        return mask

    def places(self, S: int) -> Int[Array, "#B S"]:
        """The place of every key in its own document, from 0."""
        places = jnp.arange(S)[None]
        if self.segments is None:
            return places
        begins = jnp.pad(self.segments[:, 1:] != self.segments[:, :-1], ((0, 0), (1, 0)))
        return places - jax.lax.cummax(jnp.where(begins, places, 0), axis=1)

    def view(self, L: int, S: int, rows: int, columns: int) -> Bool[np.ndarray, "l s"]:
        """Which blocks of `columns` keys any query of a block of `rows` may see; True where only the arrays know."""
        query, key = np.arange(0, L, rows)[:, None], np.arange(0, S, columns)[None]
        seen = np.ones((query.size, key.size), bool)
        if self.kv_length is not None:
            return seen
        if self.causal and self.prefix is None:
            seen &= key < query + rows
        if self.window is not None and not (self.sinks and self.segments is not None):
            seen &= (query - key < self.window + columns - 1) | (key < self.sinks)
        if self.sparse is not None and rows == columns == self.sparse.block:
            seen &= self.sparse.view(len(seen))
        return seen


@dataclasses.dataclass(frozen=True)
class Scores:
    """How a query and a key make a score.

    Attributes:
      scale: of their product; None: `H**-0.5`.
      softcap: scores are squeezed into (-softcap, softcap) by tanh (Gemma 2, arXiv:2408.00118).
      alibi: each head takes off its slope times the distance, ahead or behind (`ops/position.py`).
    """

    scale: float | None = None
    softcap: float | None = None
    alibi: bool = False

    def factor(self, H: int) -> float:
        """What products of heads of size H are multiplied by."""
        return H**-0.5 if self.scale is None else self.scale


@struct.dataclass
class Dropout:
    """A share `rate` of a pattern is zeroed, as `key` has it, and the rest scaled up (Srivastava et al. 2014)."""

    key: Key[Array, ""]
    rate: float = struct.field(pytree_node=False)

    def __call__(self, pattern: Float[Array, "B K G l s"], block: Int[Array, ""] | int = 0) -> Array:
        """`pattern` with what is dropped of it; each `block` of queries has noise of its own."""
        keep = jax.random.bernoulli(jax.random.fold_in(self.key, block), 1 - self.rate, pattern.shape)
        return jnp.where(keep, pattern / (1 - self.rate), jnp.zeros_like(pattern))


@runtime_checkable
class Implementation(Protocol):
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
    return x


def soft_cap(x: Array, cap: float | None) -> Array:
    """`cap * tanh(x / cap)`; None: `x`."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def score(
    q: Array,
    k: Array,
    mask: Bool[Array, "#B L S"],
    distance: Int[Array, "#B L S"],
    scores: Scores,
    *,
    slopes: Float[Array, "K G"] | None = None,
    tap: Tap = no_tap,
) -> Float[Array, "B K G L S"]:
    """What softmax reads, float32 whatever the dtype of `q`; `slopes` where these are not all heads that there are."""
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
    """Softmax attention under a materialised mask; logits and softmax are float32 whatever the dtype of `q`."""
    pattern = tap("pattern", jax.nn.softmax(score(q, k, mask, distance, scores, tap=tap), axis=-1))
    pattern = pattern if drop is None else drop(pattern)
    return jnp.einsum("BKGLS,BSKH->BLKGH", pattern.astype(v.dtype), v)


def reference(
    q: Array, k: Array, v: Array, mask: Mask, scores: Scores, tap: Tap = no_tap, *, dropout: Dropout | None = None
) -> Array:
    """The specification: holds all `B K G L S` scores at once."""
    L, S = q.shape[1], k.shape[1]
    return attend(q, k, v, mask.materialise(L, S), mask.distance(L, S), scores, tap, dropout)


BLOCK = 128  # queries whose scores exist at one time
BANDS = 8  # stretches of the row, each compiled for the keys that it sees


def chunked(q: Array, k: Array, v: Array, mask: Mask, scores: Scores, *, dropout: Dropout | None = None) -> Array:
    """Block by block over the queries, recomputed in the backward pass: memory is linear in L.

    Blocks of keys that nobody in a block of queries can see are left out: what lies ahead, behind a window, or off a
    sparse pattern. A band of blocks shares its keys where they are nearly the same, else each block gathers its own.
    Any lengths will do: where the last block is short, it repeats the last query, and sees the last key once.
    """
    L, S = q.shape[1], k.shape[1]
    size = min(L, BLOCK if mask.sparse is None else mask.sparse.block)
    view, blocks = mask.view(L, S, size, size), -(-L // size)
    # The gradients of keys and values are sums over blocks: in float32, or they would lose digits with every block.
    wide_k, wide_v = k.astype(jnp.float32), v.astype(jnp.float32)
    q = jnp.pad(q, ((0, 0), (0, blocks * size - L), (0, 0), (0, 0), (0, 0))) if L % size else q

    def over(band: Int[np.ndarray, " blocks"]) -> Array:
        width, together = view[band].sum(1).max(), np.flatnonzero(view[band].any(0))
        apart = len(together) > 1.5 * width
        columns = np.argsort(~view[band], kind="stable")[:, :width] if apart else together[None]
        keys = (columns[..., None] * size + np.arange(size)).reshape(len(columns), -1)
        shared = None if apart else jnp.asarray(keys[0][keys[0] < S])
        whole = shared is None or shared.size == S
        near = (wide_k, wide_v) if whole else (wide_k[:, shared], wide_v[:, shared])

        @functools.partial(jax.checkpoint, prevent_cse=False)
        def block(_: None, part: tuple[Array, Array | None]) -> tuple[None, Array]:
            start, own = part
            queries = jnp.minimum(start + jnp.arange(size), L - 1)
            keys = shared if own is None else jnp.minimum(own, S - 1)
            some_k, some_v = near if own is None else (wide_k[:, keys], wide_v[:, keys])
            some_k, some_v = some_k.astype(k.dtype), some_v.astype(v.dtype)
            some_q = jax.lax.dynamic_slice_in_dim(q, start, size, axis=1)
            places = (L, S, queries, keys)
            seen = mask.materialise(*places) if own is None else mask.materialise(*places) & (own < S)[None, None]
            drop = None if dropout is None else functools.partial(dropout, block=start)
            return None, attend(some_q, some_k, some_v, seen, mask.distance(*places), scores, drop=drop)

        parts = (jnp.asarray(band * size), jnp.asarray(keys) if apart else None)
        return jnp.moveaxis(jax.lax.scan(block, None, parts)[1], 0, 1).reshape(q.shape[0], -1, *q.shape[2:])

    bands = np.array_split(np.arange(blocks), 1 if view.all() else min(BANDS, blocks))
    return jnp.concatenate([over(band) for band in bands], axis=1)[:, :L]


def elsewhere(file: str, name: str) -> Implementation:
    """A function of a file that imports this one: it is looked up by its first call.

    Programs that run no kernel never load Pallas. None of them holds a pattern that dropout could take from.
    """

    def run(q: Array, k: Array, v: Array, mask: Mask, scores: Scores, *, dropout: Dropout | None = None) -> Array:
        if dropout is not None:
            raise Declined(
                f"{name} never holds the pattern of which model.attention.dropout={dropout.rate} zeroes a share; use "
                "model.attention.implementation=reference or chunked and mesh.context=1, or model.attention.dropout=0"
            )
        return getattr(importlib.import_module(f"llm_jax.ops.{file}"), name)(q, k, v, mask, scores)

    return run


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": reference,
    "chunked": chunked,
    **{name: elsewhere("kernels", name) for name in ("flash", "splash", "cudnn", "tokamax")},
}
# Who attends to rows whose tokens lie on several devices of the mesh axis `context`. Elsewhere they stand for None.
ACROSS: dict[str, Implementation] = {name: elsewhere("ring", name) for name in ("ring", "zigzag", "ulysses")}

LONG = 1024  # from this many queries on the L x S scores, not the arithmetic, set the limit

# For each platform what to try, in this order, and from how many queries on; below LONG the reference is the last.
FASTEST: dict[str, dict[str, int]] = {
    "cpu": {"chunked": LONG},
    "tpu": {"flash": LONG, "chunked": LONG},
    "gpu": {"cudnn": 128, "chunked": LONG},
}


def candidates(L: int) -> list[str]:
    """Who may attend to L queries here, the fastest first. The last takes every case; from LONG on in linear memory."""
    chosen = [name for name, least in FASTEST.get(platform(), FASTEST["cpu"]).items() if least <= L]
    return chosen if L >= LONG else [*chosen, "reference"]


_listener: ContextVar[Callable[[str], object]] = ContextVar("listener", default=lambda line: None)


@contextlib.contextmanager
def heard(report: Callable[[str], object]) -> Iterator[None]:
    """Within it, `report` hears in a line, once, which implementation a program runs and why faster ones declined."""
    token = _listener.set(functools.cache(report))
    try:
        yield
    finally:
        _listener.reset(token)


def platform() -> str:
    """Where this program will run: cpu, tpu or gpu.

    The mesh of `jax.set_mesh` says so, even of devices elsewhere for which this process only compiles; without a mesh
    it is the default backend.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name == "cuda" else name


def across(implementation: str | None) -> str:
    """Which of `ACROSS` attends to rows that are split, in their own order. Raises `Declined` for one that can't."""
    if implementation is not None and implementation not in ACROSS:
        raise Declined(
            f"{implementation} takes whole rows, and mesh.context splits them; use one of {', '.join(ACROSS)}"
        )
    return implementation or "ring"


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
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): query head (k, g) reads key/value head k.

    `implementation=None` takes the first row of `FASTEST` that accepts; a name takes that one or raises `Declined`, a
    `ValueError`, with the reason. With `tap`, scores and pattern are shown to it, so the reference runs. `dropout` is
    for training, and for those that hold a pattern. Rows that are split over `mesh.context` take one of `ACROSS`, by
    default `ring`. Raises `ValueError` for an array in place of a `Mask`: kernels read its fields, and leave out what
    they hide.
    """
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask is a {type(mask).__name__}, expected a Mask, which says who sees whom by rules; use "
            "Mask(causal=False) where all see all, and Mask(segments=...) with a segment apart for what none may see"
        )
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
            return _told(known[name](q, k, v, mask, scores, dropout=dropout), name, declined)
        except Declined as reason:
            declined += f"; {str(reason).partition(';')[0]}"
    return _told(known[names[-1]](q, k, v, mask, scores, dropout=dropout), names[-1], declined)


def _told(out: Array, name: str, declined: str) -> Array:
    _listener.get()(f"attention over {out.shape[1]:,} tokens: {name}{declined}")
    return out
