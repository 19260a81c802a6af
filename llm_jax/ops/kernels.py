"""FlashAttention for TPU in Pallas, forward and backward; and adapters to the attention kernels of others.

Scores live for one tile of queries and keys, in the chip's own memory, and are never written out (Dao et al. 2022,
arXiv:2205.14135; Dao 2023, arXiv:2307.08691). `docs/flash_attention.md` derives what stands here.

The kernels keep scores transposed, keys down and queries across. A maximum or a sum over keys then runs down the
registers of a TPU, which is cheap; what belongs to a query is a row, and so is the log-sum-exp that is saved.
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

from llm_jax.ops.attention import MASKED, Declined, Scores, platform
from llm_jax.ops.collectives import shard_map_by_letters
from llm_jax.ops.mask import Mask
from llm_jax.ops.position import alibi_slopes

# Sides of a tile; the largest that divides the row is taken. A register of a TPU has 128 lanes, which smaller tiles
# would leave empty; with 1024 the backward pass under all rules exceeds the 16 MiB that a kernel gets on v5e and v5p,
# as it does with wider heads than these.
SIDES = (512, 256, 128)
WIDEST = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Tiles:
    """What is known of a row before its arrays are: how it is cut, and which scores count.

    Attributes:
      side: queries, and keys, of a tile.
      view: which tiles hold anything to see; the others are neither computed nor fetched.
      ahead, behind: how far from its query a key may stand, where its tags don't say; None: as far as it likes.
      softcap: as in `Scores`.
    """

    side: int
    view: Bool[np.ndarray, "l s"]
    ahead: int | None
    behind: int | None
    softcap: float | None


def visits(view: Bool[np.ndarray, "l s"]) -> tuple[Int[np.ndarray, "l t"], Int[np.ndarray, " l"]]:
    """For each row of a view the columns that it visits, and their number.

    Shorter lists repeat their last entry: the pipeline fetches nothing for a block that it already holds.
    """
    counts = view.sum(1)
    seen_first = np.argsort(~view, axis=1, kind="stable")
    steps = np.minimum(np.arange(counts.max()), counts[:, None] - 1)
    return np.take_along_axis(seen_first, steps, axis=1).astype(np.int32), counts.astype(np.int32)


def tags_of(mask: Mask, B: int, L: int) -> Int[Array, "B T L"] | None:
    """What a mask knows of every token: its segment, and where keys differ in it, how far ahead and behind they reach.

    None for a mask that treats all tokens alike: `Tiles` says all of it.
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
    behind = jnp.where(mask.document_positions(L) < mask.sinks, L, L if mask.window is None else mask.window)
    return jnp.stack([segment, ahead, jnp.broadcast_to(behind, (B, L))], axis=1)


def product(letters: str, x: Array, y: Array) -> Array:
    """An einsum in the dtype of `x`, summed in float32. Float32 factors keep their digits, for six times the work."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jnp.einsum(letters, x, y.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)


def _scores(tiles: Tiles, row: Array, column: Array, q, k, slope, q_tags, k_tags) -> tuple[Array, Array | float]:
    """The scores of a tile [S L], and by how much their cap flattens them."""
    s, flat = product("SH,LH->SL", k[...], q[...]), 1.0
    if tiles.softcap is not None:
        capped = jnp.tanh(s / tiles.softcap)
        s, flat = tiles.softcap * capped, 1 - capped * capped
    queries = row * tiles.side + jax.lax.broadcasted_iota(jnp.int32, s.shape, 1)
    keys = column * tiles.side + jax.lax.broadcasted_iota(jnp.int32, s.shape, 0)
    distance, ahead, behind, rules = queries - keys, tiles.ahead, tiles.behind, []
    if slope is not None:
        s = s - slope[...] * jnp.abs(distance).astype(jnp.float32)
    if k_tags is not None:
        segment, *reach = jnp.split(k_tags[...].T, len(k_tags), axis=1)
        rules.append(q_tags[:1] == segment)
        ahead, behind = reach or (ahead, behind)
    if ahead is not None:
        rules.append(distance >= -ahead)
    if behind is not None:
        rules.append(distance < behind)
    return (jnp.where(functools.reduce(operator.and_, rules), s, MASKED) if rules else s), flat


def _forward(tiles: Tiles, blocks, counts, q, k, v, slope, q_tags, k_tags, out, lse, top, total, sums) -> None:
    i, t = pl.program_id(0), pl.program_id(2)

    @pl.when(t == 0)
    def begin() -> None:
        top[...] = jnp.full(top.shape, MASKED, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    # A query may see nothing of its first tiles. What it collects there is wiped out by `shrink` = 0 as soon as it
    # sees something, at the latest itself.
    @pl.when(t < counts[i])
    def visit() -> None:
        s, _ = _scores(tiles, i, blocks[i, t], q, k, slope, q_tags, k_tags)
        higher = jnp.maximum(top[...], s.max(0, keepdims=True))
        p, shrink = jnp.exp(s - higher), jnp.exp(top[...] - higher)
        total[...] = shrink * total[...] + p.sum(0, keepdims=True)
        sums[...] = shrink * sums[...] + product("SH,SL->HL", v[...], p)
        top[...] = higher

    @pl.when(t == pl.num_programs(2) - 1)
    def end() -> None:
        out[...] = (sums[...] / total[...]).T.astype(out.dtype)
        lse[...] = top[...] + jnp.log(total[...])


def _again(
    tiles: Tiles, row: Array, column: Array, q, k, v, slope, q_tags, k_tags, lse, dot, do
) -> tuple[Array, Array]:
    """The pattern of a tile once more, and the gradient of its scores."""
    s, flat = _scores(tiles, row, column, q, k, slope, q_tags, k_tags)
    p = jnp.exp(s - lse[...])
    return p, p * (product("SH,LH->SL", v[...], do[...]) - dot[...]) * flat


def _backward_q(tiles: Tiles, blocks, counts, q, k, v, slope, q_tags, k_tags, lse, dot, do, dq, sums) -> None:
    i, t = pl.program_id(0), pl.program_id(2)

    @pl.when(t == 0)
    def begin() -> None:
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    @pl.when(t < counts[i])
    def visit() -> None:
        _, ds = _again(tiles, i, blocks[i, t], q, k, v, slope, q_tags, k_tags, lse, dot, do)
        sums[...] += product("SH,SL->HL", k[...], ds)

    @pl.when(t == pl.num_programs(2) - 1)
    def end() -> None:
        dq[...] = sums[...].T.astype(dq.dtype)


def _backward_kv(
    tiles: Tiles, blocks, counts, q, k, v, slope, q_tags, k_tags, lse, dot, do, dk, dv, k_sums, v_sums
) -> None:
    j, g, t = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    @pl.when((g == 0) & (t == 0))
    def begin() -> None:
        k_sums[...] = jnp.zeros(k_sums.shape, jnp.float32)
        v_sums[...] = jnp.zeros(v_sums.shape, jnp.float32)

    @pl.when(t < counts[j])
    def visit() -> None:
        p, ds = _again(tiles, blocks[j, t], j, q, k, v, slope, q_tags, k_tags, lse, dot, do)
        k_sums[...] += product("LH,SL->SH", q[...], ds)
        v_sums[...] += product("LH,SL->SH", do[...], p)

    @pl.when((g == pl.num_programs(1) - 1) & (t == pl.num_programs(2) - 1))
    def end() -> None:
        dk[...] = k_sums[...].astype(dk.dtype)
        dv[...] = v_sums[...].astype(dv.dtype)


class Kernel(NamedTuple):
    """A kernel runs for each block of one side, for each query head, over the blocks it visits of the other, `walk`.

    What it reads, writes and keeps in between is spelled by letters; it multiplies matrices `products` times a tile.
    """

    body: Callable[..., None]
    walk: str
    writes: str
    keeps: str
    products: int


READS = "GLH SH SH G11 TL TS G1L G1L GLH"  # q k v slopes tags tags; backward also lse, out . do, do
FORWARD = Kernel(_forward, walk="S", writes="GLH G1L", keeps="1L 1L HL", products=2)
BACKWARD_Q = Kernel(_backward_q, walk="S", writes="GLH", keeps="HL", products=3)
BACKWARD_KV = Kernel(_backward_kv, walk="L", writes="SH SH", keeps="SH SH", products=4)


def _run(kernel: Kernel, tiles: Tiles, q: Float[Array, "G L H"], *arrays: Array | None) -> Sequence[Array]:
    """Runs a kernel for one key/value head and its G query heads."""
    (G, L, H), side, tags = q.shape, tiles.side, arrays[3]
    blocks, counts = visits(tiles.view if kernel.walk == "S" else tiles.view.T)
    whole = {"G": G, "L": L, "S": L, "H": H, "T": 0 if tags is None else len(tags), "1": 1}
    tile = whole | {"G": None, "L": side, "S": side}

    def block(word: str) -> pl.BlockSpec:
        def place(n, g, t, blocks, counts) -> tuple:
            where = {"G": g, "L": n, "S": n, kernel.walk: blocks[n, t]}
            return tuple(where.get(letter, 0) for letter in word)

        return pl.BlockSpec([tile[letter] for letter in word], place)

    def result(word: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct([whole[x] for x in word], jnp.float32 if word == "G1L" else q.dtype)

    reads, writes, scores = (q, *arrays), kernel.writes.split(), G * int(counts.sum()) * side**2
    call = functools.partial(
        pl.pallas_call,
        functools.partial(kernel.body, tiles),
        out_shape=[result(word) for word in writes],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(len(blocks), G, blocks.shape[1]),
            in_specs=[x if x is None else block(word) for x, word in zip(reads, READS.split(), strict=False)],
            out_specs=[block(word) for word in writes],
            scratch_shapes=[pltpu.VMEM([tile[x] for x in word], jnp.float32) for word in kernel.keeps.split()],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * kernel.products * scores * H,
            transcendentals=scores,
            bytes_accessed=2 * scores // side * H * q.dtype.itemsize,  # of the side that is walked
        ),
        name=f"flash{kernel.body.__name__}",
    )
    # Which of the two is settled when the program is lowered: right also where it compiles for devices elsewhere.
    return jax.lax.platform_dependent(blocks, counts, *reads, cpu=call(interpret=True), default=call())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(tiles: Tiles, q: Array, k: Array, v: Array, slopes: Array | None, tags: Array | None) -> Array:
    return _attend_forward(tiles, q, k, v, slopes, tags)[0]


def _attend_forward(tiles: Tiles, q: Array, k: Array, v: Array, slopes: Array | None, tags: Array | None) -> tuple:
    out, lse = _run(FORWARD, tiles, q, k, v, slopes, tags, tags)
    return out, (q, k, v, slopes, tags, out, lse)


def _attend_backward(tiles: Tiles, saved: tuple, do: Array) -> tuple:
    q, k, v, slopes, tags, out, lse = saved
    dot = (out.astype(jnp.float32) * do.astype(jnp.float32)).sum(-1)[:, None]
    reads = (q, k, v, slopes, tags, tags, lse, dot, do)
    return *_run(BACKWARD_Q, tiles, *reads), *_run(BACKWARD_KV, tiles, *reads), None, None


_attend.defvjp(_attend_forward, _attend_backward)


def by_head(attend: Callable) -> Callable[..., Array]:
    """`attend(q [G L H], k [S H], v [S H], of_head, of_row)` for every key/value head of every row of a batch.

    `vmap` adds the two to the grid of a kernel, which is written for one.
    """
    heads = jax.vmap(attend, in_axes=(0, 0, 0, 0, None))
    rows = jax.vmap(heads, in_axes=(0, 0, 0, None, 0))

    def run(q: Array, k: Array, v: Array, *more: Any) -> Array:
        out = rows(q.transpose(0, 2, 3, 1, 4), k.swapaxes(1, 2), v.swapaxes(1, 2), *more)
        return out.transpose(0, 3, 1, 2, 4)

    return run


def accept(name: str, q: Array, k: Array, mask: Mask, scores: Scores, *, can: str, on: str) -> None:
    """Declines what `name` is asked for and can't do. Causal masks, windows and scales all of them can."""
    L, S, here = q.shape[1], k.shape[1], platform()
    if here not in on.split():
        raise Declined(f"{name} runs on {on.replace(' ', ' or ')}, got {here}; leave the implementation open")
    if L != S:
        raise Declined(f"{name} takes as many keys as queries, got {S} and {L}; 'chunked' and 'reference' take any")
    fields = {field.name: getattr(x, field.name) for x in (mask, scores) for field in dataclasses.fields(x)}
    asked = {field for field, value in fields.items() if isinstance(value, jax.Array | np.ndarray) or value}
    if beyond := asked - {"causal", "window", "scale", *can.split()}:
        raise Declined(f"{name} has no {' and no '.join(sorted(beyond))}; 'chunked' and 'reference' have")


def side_of(name: str, L: int, mask: Mask) -> int:
    """The side of a tile for rows of L tokens; a block of a sparse mask is a tile."""
    sides = SIDES if mask.sparse is None else (mask.sparse.block,)
    if sides[-1] not in SIDES:
        raise Declined(f"{name} takes a sparse.block in {SIDES}, got {sides[-1]}; change it, or take 'chunked'")
    for side in sides:
        if L % side == 0:
            return side
    raise Declined(f"{name} takes a multiple of {sides[-1]} tokens, got {L}; pad rows to {L + -L % sides[-1]}")


def flash(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, scores: Scores
) -> Float[Array, "B L K G H"]:
    """FlashAttention (arXiv:2205.14135), ours: on TPU compiled, on CPU interpreted, which is for tests.

    Any mask without a cache, any scores, bfloat16 or float32; memory grows with L, work with the tiles in view.
    """
    accept("flash", q, k, mask, scores, can="sinks sparse segments prefix softcap alibi", on="tpu cpu")
    B, L, K, G, H = q.shape
    if H > WIDEST:
        raise Declined(f"flash takes heads of at most {WIDEST}, got {H}; take 'chunked'")
    side, tags = side_of("flash", L, mask), tags_of(mask, B, L)
    tiles = Tiles(
        side,
        mask.view(L, L, side, side),
        ahead=0 if mask.causal else None,
        behind=mask.window,
        softcap=scores.softcap,
    )
    q = q * jnp.asarray(scores.factor(H), q.dtype)
    slopes = jnp.asarray(alibi_slopes(K * G).reshape(K, G, 1, 1), jnp.float32) if scores.alibi else None
    return shard_map_by_letters(
        by_head(functools.partial(_attend, tiles)), "BLKGH BSKH BSKH KG11 BTS BLKGH", q, k, v, slopes, tags
    )


def splash(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, scores: Scores
) -> Float[Array, "B L K G H"]:
    """The TPU kernel that comes with JAX; on CPU interpreted."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    accept("splash", q, k, mask, scores, can="segments softcap", on="tpu cpu")
    (L, G, H), side = (q.shape[1], *q.shape[3:]), side_of("splash", q.shape[1], mask)
    seen = splash_attention_mask.FullMask((L, L))
    if mask.causal or mask.window is not None:
        reach = None if mask.window is None else mask.window - 1
        seen = splash_attention_mask.LocalMask((L, L), (reach, 0 if mask.causal else None), offset=0)
    attend: Callable = splash_attention_kernel.make_splash_mqa_single_device(
        splash_attention_mask.MultiHeadMask([seen] * G),
        block_sizes=splash_attention_kernel.BlockSizes(side, side, side, side, side, side, side, side),
        attn_logits_soft_cap=scores.softcap,
        interpret=platform() == "cpu",
    )
    q, ids = q * jnp.asarray(scores.factor(H), q.dtype), None
    if mask.segments is not None:
        ids = splash_attention_kernel.SegmentIds(mask.segments, mask.segments)
    return shard_map_by_letters(
        by_head(lambda q, k, v, _, ids: attend(q, k, v, ids)), "BLKGH BSKH BSKH KG BS BLKGH", q, k, v, None, ids
    )


def cudnn(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, scores: Scores
) -> Float[Array, "B L K G H"]:
    """NVIDIA's kernel, by way of `jax.nn.dot_product_attention`."""
    accept("cudnn", q, k, mask, scores, can="", on="gpu")
    if mask.window is not None and not mask.causal:
        raise Declined(f"cudnn has windows under a causal mask only, got window={mask.window} and causal=False")
    B, L, K, G, H = q.shape
    try:
        out = jax.nn.dot_product_attention(
            q.reshape(B, L, K * G, H),
            k,
            v,
            scale=scores.factor(H),
            is_causal=mask.causal,
            local_window_size=None if mask.window is None else (mask.window - 1, 0),
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError) as reason:  # a dtype, a head size, a missing library
        raise Declined(f"cudnn: {reason}") from reason
    return out.reshape(q.shape)


def tokamax(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, scores: Scores
) -> Float[Array, "B L K G H"]:
    """What openxla/tokamax holds to be best on these devices."""
    accept("tokamax", q, k, mask, scores, can="softcap", on="tpu gpu cpu")
    try:
        from tokamax import dot_product_attention
    except ImportError as reason:
        raise Declined(f"tokamax: {reason}; pip install tokamax (Python 3.12 and JAX 0.11.1, or later)") from reason

    def kernel(q: Array, k: Array, v: Array) -> Array:
        B, L, K, G, H = q.shape
        reach = None if mask.window is None else (mask.window - 1, 0 if mask.causal else L)
        out = dot_product_attention(
            q.reshape(B, L, K * G, H),
            k,
            v,
            scale=scores.factor(H),
            is_causal=mask.causal,
            local_window_size=reach,
            logits_soft_cap=scores.softcap,
        )
        return out.reshape(q.shape)

    return shard_map_by_letters(kernel, "BLKGH BSKH BSKH BLKGH", q, k, v)
