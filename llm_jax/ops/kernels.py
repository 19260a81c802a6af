"""FlashAttention for TPU in Pallas, forward and backward.

Scores live for one tile of queries and keys, in the chip's own memory, and are never written out (Dao et al. 2022,
arXiv:2205.14135; Dao 2023, arXiv:2307.08691). `docs/flash_attention.md` derives what is computed here.

The letters are the papers': a step visits tile (i, j) of queries and keys; s are its scores, p its pattern; m and l are
the maximum and the sum of `exp(s - m)` of a query so far, acc its output before it is divided by l. The papers' L and D
are `lse = m + log(l)` and `delta`, the sum of `do o` over a head. A name in `_ref` is a block in the chip's memory; a
kernel takes what to visit, then what it reads, what it writes, and what it adds up in.

Scores are kept transposed, keys down and queries across: s is [S L]. A maximum or a sum over keys then runs down the
registers of a TPU, which is cheap; one number for each query is a row, and so is the `lse` that is saved.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from llm_jax.ops.attention import MASKED
from llm_jax.ops.mask import Mask

Ref = Any  # read and written by index; None: there is no such array
BlockOf = Callable[[Any, Any, Any], Any]  # which block, of (row, step, blocks visited)


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """What is known of a row before its arrays are: how it is split into tiles, and which scores count.

    Attributes:
      side: queries, and keys, of a tile.
      view: which tiles hold a score that counts; the others are neither computed nor fetched.
      ahead: how many positions after its query a key may be, unless tags say it; None: any number.
      window: how many positions up to its query are seen, unless tags say it; None: all.
      softcap: as in `Scores`.
    """

    side: int
    view: Bool[np.ndarray, "l s"]
    ahead: int | None
    window: int | None
    softcap: float | None


def visits(view: Bool[np.ndarray, "l s"]) -> tuple[Int[np.ndarray, "l t"], Int[np.ndarray, " l"]]:
    """Return for each row of a view the columns to visit, and how many.

    Shorter lists repeat their last entry: the pipeline fetches nothing for a block that it already holds.
    """
    counts = view.sum(1)
    seen_first = np.argsort(~view, axis=1, kind="stable")
    steps = np.minimum(np.arange(counts.max()), counts[:, None] - 1)
    return np.take_along_axis(seen_first, steps, axis=1).astype(np.int32), counts.astype(np.int32)


def tags_of(mask: Mask, B: int, L: int) -> Int[Array, "B T L"] | None:
    """Return what a mask says of single tokens: the segment and, if keys differ in them, `ahead` and `window`.

    None for a mask that treats all tokens alike, of which `Tiles` says everything.
    """
    differ = mask.prefix is not None or mask.sinks > 0
    if mask.segments is None and not differ:
        return None
    segment = jnp.zeros((B, L), jnp.int32) if mask.segments is None else mask.segments
    if not differ:
        return segment[:, None]
    ahead = jnp.full((B, L), 0 if mask.causal else L)
    if mask.prefix is not None:
        ahead = jnp.where(mask.prefix, L, ahead)
    window = jnp.where(mask.document_positions(L) < mask.sinks, L, L if mask.window is None else mask.window)
    return jnp.stack([segment, ahead, jnp.broadcast_to(window, (B, L))], axis=1)


def product(letters: str, x: Array, y: Array) -> Array:
    """Return an einsum in the dtype of `x`, summed in float32. Float32 factors keep their digits, for six passes."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(letters, x, y.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)


def _scores(
    tiles: Tiles, i: Array, j: Array, q_ref: Ref, k_ref: Ref, slope_ref: Ref, q_tags_ref: Ref, k_tags_ref: Ref
) -> tuple[Array, Array | float]:
    """Return the scores s [S L] of tile (i, j), and the derivative of their cap."""
    s, slope_of_cap = product("SH,LH->SL", k_ref[...], q_ref[...]), 1.0
    if tiles.softcap is not None:
        capped = jnp.tanh(s / tiles.softcap)
        s, slope_of_cap = tiles.softcap * capped, 1 - capped * capped
    queries = i * tiles.side + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
    keys = j * tiles.side + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    distance, ahead, window, rules = queries - keys, tiles.ahead, tiles.window, []
    if slope_ref is not None:
        s = s - slope_ref[...] * jnp.abs(distance).astype(jnp.float32)
    if k_tags_ref is not None:
        segment, *of_keys = jnp.split(k_tags_ref[...].T, len(k_tags_ref), axis=1)
        rules.append(q_tags_ref[:1] == segment)
        ahead, window = of_keys or (ahead, window)
    if ahead is not None:
        rules.append(distance >= -ahead)
    if window is not None:
        rules.append(distance < window)
    return (jnp.where(functools.reduce(operator.and_, rules), s, MASKED) if rules else s), slope_of_cap


def _forward_kernel(
    tiles: Tiles, blocks_ref: Ref, counts_ref: Ref,
    q_ref: Ref, k_ref: Ref, v_ref: Ref, slope_ref: Ref, q_tags_ref: Ref, k_tags_ref: Ref,
    o_ref: Ref, lse_ref: Ref,
    m_ref: Ref, l_ref: Ref, acc_ref: Ref,
) -> None:  # fmt: skip
    """Add up attention of query block i over the key blocks it visits (arXiv:2307.08691, alg. 1)."""
    i, t = pl.program_id(0), pl.program_id(2)

    @pl.when(t == 0)
    def begin() -> None:
        m_ref[...] = jnp.full(m_ref.shape, MASKED, jnp.float32)
        l_ref[...] = jnp.zeros(l_ref.shape, jnp.float32)
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    # A query may see nothing of its first tiles. What it adds up there is multiplied by alpha = 0 at the first key that
    # it does see, at the latest itself.
    @pl.when(t < counts_ref[i])
    def visit() -> None:
        s, _ = _scores(tiles, i, blocks_ref[i, t], q_ref, k_ref, slope_ref, q_tags_ref, k_tags_ref)
        m = jnp.maximum(m_ref[...], s.max(0, keepdims=True))
        p, alpha = jnp.exp(s - m), jnp.exp(m_ref[...] - m)
        l_ref[...] = alpha * l_ref[...] + p.sum(0, keepdims=True)
        acc_ref[...] = alpha * acc_ref[...] + product("SH,SL->HL", v_ref[...], p)
        m_ref[...] = m

    @pl.when(t == pl.num_programs(2) - 1)
    def end() -> None:
        o_ref[...] = (acc_ref[...] / l_ref[...]).T.astype(o_ref.dtype)
        lse_ref[...] = m_ref[...] + jnp.log(l_ref[...])


def _pattern_and_ds(
    tiles: Tiles, i: Array, j: Array,
    q_ref: Ref, k_ref: Ref, v_ref: Ref, slope_ref: Ref, q_tags_ref: Ref, k_tags_ref: Ref,
    lse_ref: Ref, delta_ref: Ref, do_ref: Ref,
) -> tuple[Array, Array]:  # fmt: skip
    """Recompute the pattern p [S L] of tile (i, j), and return it with the gradient ds of its scores."""
    s, slope_of_cap = _scores(tiles, i, j, q_ref, k_ref, slope_ref, q_tags_ref, k_tags_ref)
    p = jnp.exp(s - lse_ref[...])
    return p, p * (product("SH,LH->SL", v_ref[...], do_ref[...]) - delta_ref[...]) * slope_of_cap


def _dq_kernel(
    tiles: Tiles, blocks_ref: Ref, counts_ref: Ref,
    q_ref: Ref, k_ref: Ref, v_ref: Ref, slope_ref: Ref, q_tags_ref: Ref, k_tags_ref: Ref,
    lse_ref: Ref, delta_ref: Ref, do_ref: Ref,
    dq_ref: Ref, acc_ref: Ref,
) -> None:  # fmt: skip
    """Add up dq of query block i over the key blocks it visits (arXiv:2307.08691, alg. 2)."""
    i, t = pl.program_id(0), pl.program_id(2)

    @pl.when(t == 0)
    def begin() -> None:
        acc_ref[...] = jnp.zeros(acc_ref.shape, jnp.float32)

    @pl.when(t < counts_ref[i])
    def visit() -> None:
        j = blocks_ref[i, t]
        _, ds = _pattern_and_ds(
            tiles, i, j, q_ref, k_ref, v_ref, slope_ref, q_tags_ref, k_tags_ref, lse_ref, delta_ref, do_ref
        )
        acc_ref[...] += product("SH,SL->HL", k_ref[...], ds)

    @pl.when(t == pl.num_programs(2) - 1)
    def end() -> None:
        dq_ref[...] = acc_ref[...].T.astype(dq_ref.dtype)


def _dkv_kernel(
    tiles: Tiles, blocks_ref: Ref, counts_ref: Ref,
    q_ref: Ref, k_ref: Ref, v_ref: Ref, slope_ref: Ref, q_tags_ref: Ref, k_tags_ref: Ref,
    lse_ref: Ref, delta_ref: Ref, do_ref: Ref,
    dk_ref: Ref, dv_ref: Ref,
    dk_acc_ref: Ref, dv_acc_ref: Ref,
) -> None:  # fmt: skip
    """Add up dk and dv of key block j over the query blocks it visits, for all query heads g (alg. 2)."""
    j, g, t = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    @pl.when((g == 0) & (t == 0))
    def begin() -> None:
        dk_acc_ref[...] = jnp.zeros(dk_acc_ref.shape, jnp.float32)
        dv_acc_ref[...] = jnp.zeros(dv_acc_ref.shape, jnp.float32)

    @pl.when(t < counts_ref[j])
    def visit() -> None:
        i = blocks_ref[j, t]
        p, ds = _pattern_and_ds(
            tiles, i, j, q_ref, k_ref, v_ref, slope_ref, q_tags_ref, k_tags_ref, lse_ref, delta_ref, do_ref
        )
        dk_acc_ref[...] += product("LH,SL->SH", q_ref[...], ds)
        dv_acc_ref[...] += product("LH,SL->SH", do_ref[...], p)

    @pl.when((g == pl.num_programs(1) - 1) & (t == pl.num_programs(2) - 1))
    def end() -> None:
        dk_ref[...] = dk_acc_ref[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_acc_ref[...].astype(dv_ref.dtype)


class Specs(NamedTuple):
    """Which block of each array a step of the grid reads or writes; None: there is no such array."""

    q: pl.BlockSpec  # [G L H], as o, do and dq
    k: pl.BlockSpec  # [S H], as v, dk and dv
    slope: pl.BlockSpec | None  # [G 1 1]
    q_tags: pl.BlockSpec | None  # [T L]
    k_tags: pl.BlockSpec | None  # [T S]
    lse: pl.BlockSpec  # [G 1 L], as delta


def specs_of(side: int, H: int, slopes: Array | None, tags: Array | None, i: BlockOf, j: BlockOf) -> Specs:
    """Return the specs of a grid (n, g, t): in row n, step t visits tile (i, j) for query head g.

    `i` and `j` say it as functions of (n, t, blocks).
    """
    T = 0 if tags is None else len(tags)
    slope = pl.BlockSpec((None, 1, 1), lambda n, g, t, blocks, _: (g, 0, 0))
    q_tags = pl.BlockSpec((T, side), lambda n, g, t, blocks, _: (0, i(n, t, blocks)))
    k_tags = pl.BlockSpec((T, side), lambda n, g, t, blocks, _: (0, j(n, t, blocks)))
    return Specs(
        q=pl.BlockSpec((None, side, H), lambda n, g, t, blocks, _: (g, i(n, t, blocks), 0)),
        k=pl.BlockSpec((side, H), lambda n, g, t, blocks, _: (j(n, t, blocks), 0)),
        slope=None if slopes is None else slope,
        q_tags=None if tags is None else q_tags,
        k_tags=None if tags is None else k_tags,
        lse=pl.BlockSpec((None, 1, side), lambda n, g, t, blocks, _: (g, 0, i(n, t, blocks))),
    )


def kept(n: Any, t: Any, blocks: Any) -> Any:
    """Return the block that row n of the grid keeps."""
    return n


def visited(n: Any, t: Any, blocks: Any) -> Any:
    """Return the block that step t of row n visits."""
    return blocks[n, t]


# Rows of a grid don't depend on each other; the query heads and the visits of a row add to the same sums.
IN_ORDER = pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"))


def _forward(
    tiles: Tiles, q: Float[Array, "G L H"], k: Array, v: Array, slopes: Array | None, tags: Array | None
) -> Sequence[Array]:
    """Return o [G L H] and lse [G 1 L]. Each row of the grid keeps a block of queries, and visits blocks of keys."""
    (G, L, H), side = q.shape, tiles.side
    blocks, counts = visits(tiles.view)
    spec = specs_of(side, H, slopes, tags, i=kept, j=visited)
    call = functools.partial(
        pl.pallas_call,
        functools.partial(_forward_kernel, tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(blocks), G, blocks.shape[1]),
            in_specs=[spec.q, spec.k, spec.k, spec.slope, spec.q_tags, spec.k_tags],
            out_specs=[spec.q, spec.lse],
            scratch_shapes=[
                pltpu.VMEM((1, side), jnp.float32),  # m
                pltpu.VMEM((1, side), jnp.float32),  # l
                pltpu.VMEM((H, side), jnp.float32),  # acc
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((G, 1, L), jnp.float32)],
        compiler_params=IN_ORDER,
        cost_estimate=_cost(q, counts, side, products=2),
        name="flash_forward",
    )
    return _run(call, blocks, counts, q, k, v, slopes, tags, tags)


def _backward_q(
    tiles: Tiles,
    q: Float[Array, "G L H"],
    k: Array,
    v: Array,
    slopes: Array | None,
    tags: Array | None,
    lse: Float[Array, "G 1 L"],
    delta: Float[Array, "G 1 L"],
    do: Float[Array, "G L H"],
) -> Sequence[Array]:
    """Return dq [G L H]. The grid is that of `_forward`."""
    (G, _, H), side = q.shape, tiles.side
    blocks, counts = visits(tiles.view)
    spec = specs_of(side, H, slopes, tags, i=kept, j=visited)
    call = functools.partial(
        pl.pallas_call,
        functools.partial(_dq_kernel, tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(blocks), G, blocks.shape[1]),
            in_specs=[spec.q, spec.k, spec.k, spec.slope, spec.q_tags, spec.k_tags, spec.lse, spec.lse, spec.q],
            out_specs=[spec.q],
            scratch_shapes=[pltpu.VMEM((H, side), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype)],
        compiler_params=IN_ORDER,
        cost_estimate=_cost(q, counts, side, products=3),
        name="flash_backward_q",
    )
    return _run(call, blocks, counts, q, k, v, slopes, tags, tags, lse, delta, do)


def _backward_kv(
    tiles: Tiles,
    q: Float[Array, "G L H"],
    k: Array,
    v: Array,
    slopes: Array | None,
    tags: Array | None,
    lse: Float[Array, "G 1 L"],
    delta: Float[Array, "G 1 L"],
    do: Float[Array, "G L H"],
) -> Sequence[Array]:
    """Return dk and dv [S H]. Each row of the grid keeps a block of keys, and visits blocks of queries."""
    (G, _, H), side = q.shape, tiles.side
    blocks, counts = visits(tiles.view.T)
    spec = specs_of(side, H, slopes, tags, i=visited, j=kept)
    call = functools.partial(
        pl.pallas_call,
        functools.partial(_dkv_kernel, tiles),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(blocks), G, blocks.shape[1]),
            in_specs=[spec.q, spec.k, spec.k, spec.slope, spec.q_tags, spec.k_tags, spec.lse, spec.lse, spec.q],
            out_specs=[spec.k, spec.k],
            scratch_shapes=[pltpu.VMEM((side, H), jnp.float32), pltpu.VMEM((side, H), jnp.float32)],
        ),
        out_shape=[jax.ShapeDtypeStruct(k.shape, q.dtype), jax.ShapeDtypeStruct(v.shape, q.dtype)],
        compiler_params=IN_ORDER,
        cost_estimate=_cost(q, counts, side, products=4),
        name="flash_backward_kv",
    )
    return _run(call, blocks, counts, q, k, v, slopes, tags, tags, lse, delta, do)


def _cost(q: Float[Array, "G L H"], counts: np.ndarray, side: int, products: int) -> pl.CostEstimate:
    """Return the cost of a kernel with so many matrix products for each tile it visits."""
    G, _, H = q.shape
    scores = G * int(counts.sum()) * side**2
    return pl.CostEstimate(
        flops=2 * products * scores * H,
        transcendentals=scores,
        bytes_accessed=2 * scores // side * H * q.dtype.itemsize,  # of the blocks that are visited
    )


def _run(call: Callable[..., Any], *arrays: Any) -> Sequence[Array]:
    """Run a `pallas_call`, on a CPU interpreted.

    Which of the two is decided when the program is lowered, so that it is right for devices that are elsewhere too.
    """
    return jax.lax.platform_dependent(*arrays, cpu=call(interpret=True), default=call())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def flash(
    tiles: Tiles,
    q: Float[Array, "G L H"],
    k: Float[Array, "S H"],
    v: Float[Array, "S H"],
    slopes: Float[Array, "G 1 1"] | None,
    tags: Int[Array, "T L"] | None,
) -> Float[Array, "G L H"]:
    """Attend with the G query heads of one key/value head; `q` is scaled already, `tags` are those of `tags_of`."""
    return _flash_forward(tiles, q, k, v, slopes, tags)[0]


def _flash_forward(
    tiles: Tiles, q: Array, k: Array, v: Array, slopes: Array | None, tags: Array | None
) -> tuple[Array, tuple[Any, ...]]:
    o, lse = _forward(tiles, q, k, v, slopes, tags)
    return o, (q, k, v, slopes, tags, o, lse)


def _flash_backward(tiles: Tiles, saved: tuple[Any, ...], do: Array) -> tuple[Any, ...]:
    q, k, v, slopes, tags, o, lse = saved
    delta = (o.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1)[:, None]
    (dq,) = _backward_q(tiles, q, k, v, slopes, tags, lse, delta, do)
    dk, dv = _backward_kv(tiles, q, k, v, slopes, tags, lse, delta, do)
    return dq, dk, dv, None, None


flash.defvjp(_flash_forward, _flash_backward)
