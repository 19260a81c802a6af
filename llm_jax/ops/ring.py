"""Attention over rows whose tokens are split over devices: each has some queries, and never all keys of a row.

`ring` sends keys and values around the devices of the mesh axis `context`, one step at a time, while each device
attends to those it holds (Liu et al. 2023, arXiv:2310.01889). Under a causal mask the first device would have little
work and the last one much. `zigzag` splits the row into twice as many chunks as there are devices and gives device i
the chunks i and 2n - 1 - i, so that all have the same work. `ulysses` exchanges tokens for heads by an all-to-all,
attends to whole rows, and exchanges back (Jacobs et al. 2023, arXiv:2309.14509).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llm_jax.ops.attention import MASKED, Declined, attention, attention_scores
from llm_jax.ops.collectives import auto_axis_size, shard_map_by_letters
from llm_jax.ops.config import Scores
from llm_jax.ops.mask import Mask
from llm_jax.ops.position import alibi_slopes

AXIS = "context"
BLOCK = 128  # queries whose scores exist at one time


def zigzag_order(L: int, devices: int) -> Int[np.ndarray, " L"]:
    """Return the token at every index of a row that `zigzag` attends to: chunks 0, 2n - 1, 1, 2n - 2 and so on."""
    return np.arange(L).reshape(2 * devices, -1)[chunks_of(devices, 2).reshape(-1)].reshape(-1)


def chunks_of(devices: int, number: int) -> Int[np.ndarray, "devices number"]:
    """Return the chunks of a row that each device holds: one, or the two of the zigzag."""
    first = np.arange(devices)[:, None]
    return first if number == 1 else np.concatenate([first, 2 * devices - 1 - first], axis=1)


def ring(q: Array, k: Array, v: Array, mask: Mask, scores: Scores) -> Array:
    """Attend in a ring to rows in their own order: balanced where no mask, or a window, gives all devices equal work.

    Raise `Declined` for a cache, and for rows that do not divide.
    """
    return _around("ring", q, k, v, mask, scores, number=1)


def zigzag(q: Array, k: Array, v: Array, mask: Mask, scores: Scores) -> Array:
    """Attend in a ring to rows in `zigzag_order`; the arrays of the mask are in that order too.

    Raise `Declined` for a cache, and for rows that do not divide.
    """
    return _around("zigzag", q, k, v, mask, scores, number=2)


@dataclasses.dataclass(frozen=True, eq=False)
class Ring:
    """What is known before the arrays are.

    Attributes:
      chunks: of a row, on each device.
      size: tokens of a chunk.
      view: which chunk of queries sees anything of which chunk of keys.
    """

    chunks: Int[np.ndarray, "devices number"]
    size: int
    view: Bool[np.ndarray, "chunks chunks"]
    scores: Scores

    @property
    def devices(self) -> int:
        """Devices in the ring."""
        return len(self.chunks)

    def pairs(self, step: int) -> list[tuple[int, int]]:
        """Return which own chunk of queries, on any device, attends to which of the held chunks at a step."""
        held = np.roll(self.chunks, step, axis=0)
        number = range(self.chunks.shape[1])
        return [(i, j) for i in number for j in number if self.view[self.chunks[:, i], held[:, j]].any()]

    @property
    def steps(self) -> int:
        """Steps after which no device sees any of what it would be sent."""
        return max(step for step in range(self.devices) if self.pairs(step)) + 1

    def all_gather(self, x: Array | None) -> Array | None:
        """Gather what a mask says of the tokens of this device [B l] to [B L], in the order of the rows."""
        if x is None:
            return None
        index = self.chunks[..., None] * self.size + np.arange(self.size)
        return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)[:, np.argsort(index.reshape(-1))]

    def visits(self, step: int) -> list[tuple[int, int, Array, tuple[Array, Array]]]:
        """Return for each of `pairs` whether this device sees anything there, and where its queries and keys start."""
        me, chunks, view = jax.lax.axis_index(AXIS), jnp.asarray(self.chunks), jnp.asarray(self.view)
        other, found = (me - step) % self.devices, list[tuple[int, int, Array, tuple[Array, Array]]]()
        for i, j in self.pairs(step):
            row, column = chunks[me, i], chunks[other, j]
            found.append((i, j, view[row, column], (row * self.size, column * self.size)))
        return found

    def split(self, x: Array, axis: int = -3) -> list[Array]:
        """Split what a device holds into its chunks, along the axis of tokens."""
        return jnp.split(x, self.chunks.shape[1], axis=axis)

    def ppermute(self, x: Array, by: int = 1) -> Array:
        """Return what the device `by` before this one in the ring holds."""
        pairs = [(i, (i + by) % self.devices) for i in range(self.devices)]
        return jax.lax.ppermute(x, AXIS, pairs) if by % self.devices else x


def _check_training(name: str, mask: Mask) -> None:
    """Raise `Declined` for a cache."""
    if mask.kv_length is not None:
        raise Declined(f"{name} is for training, and attends to no cache; generate on a mesh with mesh.context=1")


def _around(name: str, q: Array, k: Array, v: Array, mask: Mask, scores: Scores, number: int) -> Array:
    devices, L, (K, G) = auto_axis_size(AXIS), q.shape[1], q.shape[2:4]
    _check_training(name, mask)
    if L % (devices * number):
        raise Declined(f"{name} splits rows into {devices * number} chunks, got {L} tokens; use a multiple of that")
    size = L // (devices * number)
    known = Ring(chunks_of(devices, number), size, mask.view(L, L, size, size), scores)
    slopes = jnp.asarray(alibi_slopes(K * G).reshape(K, G), jnp.float32) if scores.alibi else None

    def attend(q: Array, k: Array, v: Array, segments: Any, prefix: Any, slopes: Any) -> Array:
        whole = dataclasses.replace(mask, segments=known.all_gather(segments), prefix=known.all_gather(prefix))
        return _ring(known, q, k, v, whole, slopes)

    return shard_map_by_letters(attend, "BLKGH BSKH BSKH BS BS KG BLKGH", q, k, v, mask.segments, mask.prefix, slopes)


Starts = tuple[Array, Array]  # where in the row a chunk of queries, and one of keys, begins
Sums = tuple[Array, Array]  # what is added up for a chunk, step by step


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(known: Ring, q: Array, k: Array, v: Array, mask: Mask, slopes: Array | None) -> Array:
    return _ring_forward(known, q, k, v, mask, slopes)[0]


def _ring_forward(known: Ring, q: Array, k: Array, v: Array, mask: Mask, slopes: Array | None) -> tuple[Array, Any]:
    queries, held = known.split(q, 1), jnp.stack((k, v))
    found = [(jnp.zeros(x.shape, jnp.float32), jnp.full(_rows(x), MASKED)) for x in queries]
    for step in range(known.steps):
        for i, j, seen, where in known.visits(step):
            add = functools.partial(_add, known, where, mask, slopes)
            found[i] = jax.lax.cond(seen, add, _skip, queries[i], known.split(held)[j], found[i])
        if step + 1 < known.steps:
            held = known.ppermute(held)
    out = jnp.concatenate([out for out, _ in found], axis=1).astype(q.dtype)
    return out, (q, k, v, mask, slopes, out, jnp.concatenate([lse for _, lse in found], axis=-1))


def _ring_backward(known: Ring, saved: Any, g: Array) -> tuple[Array | None, ...]:
    """Return the gradients; those of keys and values are sent around with them, and after the last step home."""
    q, k, v, mask, slopes, out, lse = saved
    delta = jnp.moveaxis((out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1), 1, -1)  # B K G L
    arrays = ((q, 1), (g, 1), (lse, -1), (delta, -1))
    queries = list(zip(*(known.split(x, axis) for x, axis in arrays), strict=True))
    dq = [jnp.zeros(x.shape, jnp.float32) for x, *_ in queries]
    held = jnp.stack((k, v))
    sums = jnp.zeros(held.shape, jnp.float32)
    for step in range(known.steps):
        chunks = known.split(sums)
        for i, j, seen, where in known.visits(step):
            add = functools.partial(_add_gradients, known, where, mask, slopes)
            so_far = (dq[i], chunks[j])
            dq[i], chunks[j] = jax.lax.cond(seen, add, _skip, queries[i], known.split(held)[j], so_far)
        sums = jnp.concatenate(chunks, axis=-3)
        if step + 1 < known.steps:
            held, sums = known.ppermute(held), known.ppermute(sums)
    dk, dv = known.ppermute(sums, 1 - known.steps)
    return jnp.concatenate(dq, axis=1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _skip(queries: Any, held: Array, so_far: Sums) -> Sums:
    return so_far


def _add(known: Ring, where: Starts, mask: Mask, slopes: Array | None, q: Array, held: Array, so_far: Sums) -> Sums:
    """Return output and log-sum-exp of a chunk of queries after one more chunk of keys."""
    k, v = held

    def block(inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        s = _scores(known, where, mask, slopes, inputs[1], k, inputs[0])
        lse = jax.nn.logsumexp(s, axis=-1)
        return jnp.einsum("BKGLS,BSKH->BLKGH", jnp.exp(s - lse[..., None]).astype(v.dtype), v), lse

    outs, lses = jax.lax.map(block, (_starts(q), _blocks(q, 1)))
    (old, old_lse), out, lse = so_far, _joined(outs, 1), _joined(lses, -1)
    both = jnp.logaddexp(old_lse, lse)
    keep, add = (jnp.moveaxis(jnp.exp(x - both), -1, 1)[..., None] for x in (old_lse, lse))
    return old * keep + out.astype(jnp.float32) * add, both


def _add_gradients(
    known: Ring,
    where: Starts,
    mask: Mask,
    slopes: Array | None,
    queries: tuple[Array, Array, Array, Array],
    held: Array,
    so_far: Sums,
) -> Sums:
    """Return the sums of gradients after those of one more pair of chunks.

    As the log-sum-exp of the whole row is available, the gradients of softmax attention are those of a plain sum over
    scores: of `exp(s - lse) (v . g - delta)`, with `delta = out . g`.
    """

    def block(total: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        start, q, g, lse, delta = inputs

        def sum_of(q: Array, held: Array) -> Array:
            p = jnp.exp(_scores(known, where, mask, slopes, q, held[0], start) - lse[..., None])
            along = jnp.einsum("BLKGH,BSKH->BKGLS", g, held[1], preferred_element_type=jnp.float32)
            return (p * (along - delta[..., None])).sum()

        dq, new = jax.grad(sum_of, argnums=(0, 1))(q, held)
        return total + new.astype(jnp.float32), dq.astype(jnp.float32)

    blocks = (_blocks(x, axis) for x, axis in zip(queries, (1, 1, -1, -1), strict=True))
    sums, dq = jax.lax.scan(block, so_far[1], (_starts(queries[0]), *blocks))
    return so_far[0] + _joined(dq, 1), sums


def _scores(known: Ring, where: Starts, mask: Mask, slopes: Array | None, q: Array, k: Array, start: Array) -> Array:
    """Return the scores of a block of queries, masked by the positions of queries and keys in the row."""
    L = known.chunks.size * known.size
    positions = (L, L, where[0] + start + jnp.arange(q.shape[1]), where[1] + jnp.arange(k.shape[1]))
    return attention_scores(q, k, mask.materialise(*positions), mask.distance(*positions), known.scores, slopes=slopes)


def _width(L: int) -> int:
    return max(width for width in range(1, min(L, BLOCK) + 1) if L % width == 0)


def _starts(q: Array) -> Array:
    return jnp.arange(0, q.shape[1], _width(q.shape[1]))


def _blocks(x: Array, axis: int) -> Array:
    """Split `x` along `axis` into blocks, with a leading axis."""
    return jnp.stack(jnp.split(x, x.shape[axis] // _width(x.shape[axis]), axis=axis))


def _joined(x: Array, axis: int) -> Array:
    return jnp.concatenate(list(x), axis=axis) if len(x) > 1 else x[0]


def _rows(q: Float[Array, "B L K G H"]) -> tuple[int, ...]:
    """Return the shape of one number for each query of each head."""
    return q.shape[0], *q.shape[2:4], q.shape[1]


def ulysses(q: Array, k: Array, v: Array, mask: Mask, scores: Scores) -> Array:
    """Attend to whole rows with a share of the heads, by any implementation, between two all-to-alls.

    Raise `Declined` for a cache, for ALiBi, and for heads that do not divide.
    """
    devices, heads = auto_axis_size(AXIS), q.shape[2] // auto_axis_size("tensor")
    _check_training("ulysses", mask)
    if scores.alibi:
        raise Declined("ulysses has no alibi, whose slopes differ by head; 'ring' and 'zigzag' have")
    if heads % devices:
        raise Declined(
            f"ulysses splits {heads} key/value heads a device over mesh.context={devices}, which does not divide them; "
            "use 'ring' or 'zigzag'"
        )

    def attend(q: Array, k: Array, v: Array, segments: Any, prefix: Any) -> Array:
        q, k, v = (jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
        rows = [x if x is None else jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (segments, prefix)]
        whole = dataclasses.replace(mask, segments=rows[0], prefix=rows[1])
        out = attention(q, k, v, whole, scores)
        return jax.lax.all_to_all(out, AXIS, split_axis=1, concat_axis=2, tiled=True)

    return shard_map_by_letters(attend, "BLKGH BSKH BSKH BS BS BLKGH", q, k, v, mask.segments, mask.prefix)
