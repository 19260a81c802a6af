"""Attention over rows that are split along their tokens: a device has some queries, and never all keys of a row.

`ring` sends keys and values around the devices of the mesh axis `context`, a step at a time, while each device attends
to those it holds (Liu et al. 2023, arXiv:2310.01889). Under a causal mask the first device would have little to do and
the last one much. `zigzag` cuts the row into twice as many parts as there are devices and gives device i the parts i
and 2n - 1 - i, so that all have the same. `ulysses` trades tokens for heads, attends to whole rows, and trades back
(Jacobs et al. 2023, arXiv:2309.14509).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llm_jax.ops.attention import MASKED, Declined, Scores, attention, score
from llm_jax.ops.collectives import auto_axis_size, shard_map_by_letters
from llm_jax.ops.mask import Mask
from llm_jax.ops.position import alibi_slopes

AXIS = "context"
BLOCK = 128  # queries whose scores exist at one time


def zigzag_order(L: int, devices: int) -> Int[np.ndarray, " L"]:
    """Which token of a row stands where, for rows that `zigzag` attends to: parts 0, 2n - 1, 1, 2n - 2 and so on."""
    return np.arange(L).reshape(2 * devices, -1)[parts_of(devices, 2).reshape(-1)].reshape(-1)


def parts_of(devices: int, number: int) -> Int[np.ndarray, "devices number"]:
    """The parts of a row that each device holds: one, or two of the zigzag."""
    first = np.arange(devices)[:, None]
    return first if number == 1 else np.concatenate([first, 2 * devices - 1 - first], axis=1)


def ring(q: Array, k: Array, v: Array, mask: Mask, scores: Scores) -> Array:
    """Ring attention over rows in their own order: even where no mask, or a window, leaves all devices as much."""
    return _around("ring", q, k, v, mask, scores, number=1)


def zigzag(q: Array, k: Array, v: Array, mask: Mask, scores: Scores) -> Array:
    """Ring attention over rows in `zigzag_order`; the arrays of the mask are in that order too."""
    return _around("zigzag", q, k, v, mask, scores, number=2)


@dataclasses.dataclass(frozen=True, eq=False)
class Ring:
    """What is known before the arrays are.

    Attributes:
      parts: of a row, that lie on each device.
      size: tokens of a part.
      view: which part of queries sees anything of which part of keys.
    """

    parts: Int[np.ndarray, "devices number"]
    size: int
    view: Bool[np.ndarray, "parts parts"]
    scores: Scores

    @property
    def devices(self) -> int:
        return len(self.parts)

    def pairs(self, step: int) -> list[tuple[int, int]]:
        """Which own part any device attends with to which part of what it holds at a step."""
        theirs = np.roll(self.parts, step, axis=0)
        number = range(self.parts.shape[1])
        return [(i, j) for i in number for j in number if self.view[self.parts[:, i], theirs[:, j]].any()]

    @property
    def steps(self) -> int:
        """After so many no device sees any of what it would be sent."""
        return max(step for step in range(self.devices) if self.pairs(step)) + 1

    def whole(self, x: Array | None) -> Array | None:
        """What a mask says of the tokens of this device, of all tokens of their rows, in the order of the rows."""
        if x is None:
            return None
        place = self.parts[..., None] * self.size + np.arange(self.size)
        return jax.lax.all_gather(x, AXIS, axis=1, tiled=True)[:, np.argsort(place.reshape(-1))]

    def visits(self, step: int) -> list[tuple[int, int, Array, tuple[Array, Array]]]:
        """For each of `pairs`: whether this device sees anything there, and where its queries and keys begin."""
        me, parts, view = jax.lax.axis_index(AXIS), jnp.asarray(self.parts), jnp.asarray(self.view)
        other, found = (me - step) % self.devices, []
        for i, j in self.pairs(step):
            row, column = parts[me, i], parts[other, j]
            found.append((i, j, view[row, column], (row * self.size, column * self.size)))
        return found

    def split(self, x: Array, axis: int = -3) -> list[Array]:
        """The parts of what a device holds, along the axis of tokens."""
        return jnp.split(x, self.parts.shape[1], axis=axis)

    def passed_on(self, x: Array, by: int = 1) -> Array:
        """What the device `by` places before holds: those behind a window are never met."""
        places = [(i, (i + by) % self.devices) for i in range(self.devices)]
        return jax.lax.ppermute(x, AXIS, places) if by % self.devices else x


def _for_training(name: str, mask: Mask) -> None:
    if mask.kv_length is not None:
        raise Declined(f"{name} is for training, and attends to no cache; generate on a mesh with mesh.context=1")


def _around(name: str, q: Array, k: Array, v: Array, mask: Mask, scores: Scores, number: int) -> Array:
    devices, L, (K, G) = auto_axis_size(AXIS), q.shape[1], q.shape[2:4]
    _for_training(name, mask)
    if L % (devices * number):
        raise Declined(f"{name} cuts rows into {devices * number} parts, got {L} tokens; use a multiple of that")
    size = L // (devices * number)
    known = Ring(parts_of(devices, number), size, mask.view(L, L, size, size), scores)
    slopes = jnp.asarray(alibi_slopes(K * G).reshape(K, G), jnp.float32) if scores.alibi else None

    def attend(q: Array, k: Array, v: Array, segments: Any, prefix: Any, slopes: Any) -> Array:
        whole = dataclasses.replace(mask, segments=known.whole(segments), prefix=known.whole(prefix))
        return _ring(known, q, k, v, whole, slopes)

    return shard_map_by_letters(attend, "BLKGH BSKH BSKH BS BS KG BLKGH", q, k, v, mask.segments, mask.prefix, slopes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(known: Ring, q: Array, k: Array, v: Array, mask: Mask, slopes: Array | None) -> Array:
    return _ring_forward(known, q, k, v, mask, slopes)[0]


def _ring_forward(known: Ring, q: Array, k: Array, v: Array, mask: Mask, slopes: Array | None) -> tuple[Array, tuple]:
    queries, held = known.split(q, 1), jnp.stack((k, v))
    found = [(jnp.zeros(x.shape, jnp.float32), jnp.full(_rows(x), MASKED)) for x in queries]
    for step in range(known.steps):
        for i, j, seen, where in known.visits(step):
            see = functools.partial(_see, known, where, mask, slopes)
            found[i] = jax.lax.cond(seen, see, _nothing, queries[i], known.split(held)[j], found[i])
        if step + 1 < known.steps:
            held = known.passed_on(held)
    out = jnp.concatenate([out for out, _ in found], axis=1).astype(q.dtype)
    return out, (q, k, v, mask, slopes, out, jnp.concatenate([lse for _, lse in found], axis=-1))


def _ring_backward(known: Ring, saved: tuple, g: Array) -> tuple:
    """The gradients of keys and values travel with them, and from the last step home."""
    q, k, v, mask, slopes, out, lse = saved
    dot = jnp.moveaxis((out.astype(jnp.float32) * g.astype(jnp.float32)).sum(-1), 1, -1)  # B K G L
    arrays = ((q, 1), (g, 1), (lse, -1), (dot, -1))
    queries = list(zip(*(known.split(x, axis) for x, axis in arrays), strict=True))
    dq = [jnp.zeros(x.shape, jnp.float32) for x, *_ in queries]
    held = jnp.stack((k, v))
    sums = jnp.zeros(held.shape, jnp.float32)
    for step in range(known.steps):
        parts = known.split(sums)
        for i, j, seen, where in known.visits(step):
            learn = functools.partial(_learn, known, where, mask, slopes)
            so_far = (dq[i], parts[j])
            dq[i], parts[j] = jax.lax.cond(seen, learn, _nothing, queries[i], known.split(held)[j], so_far)
        sums = jnp.concatenate(parts, axis=-3)
        if step + 1 < known.steps:
            held, sums = known.passed_on(held), known.passed_on(sums)
    dk, dv = known.passed_on(sums, 1 - known.steps)
    return jnp.concatenate(dq, axis=1).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None


_ring.defvjp(_ring_forward, _ring_backward)


def _nothing(queries: Any, held: Array, so_far: tuple) -> tuple:
    return so_far


def _see(known: Ring, where: tuple, mask: Mask, slopes: Array | None, q: Array, held: Array, so_far: tuple) -> tuple:
    """Output and log-sum-exp of a part of queries, with a part of keys more."""
    k, v = held

    def block(part: tuple[Array, Array]) -> tuple[Array, Array]:
        s = _scores(known, where, mask, slopes, part[1], k, part[0])
        lse = jax.nn.logsumexp(s, axis=-1)
        return jnp.einsum("BKGLS,BSKH->BLKGH", jnp.exp(s - lse[..., None]).astype(v.dtype), v), lse

    outs, lses = jax.lax.map(block, (_starts(q), _blocks(q, 1)))
    (old, old_lse), out, lse = so_far, _joined(outs, 1), _joined(lses, -1)
    both = jnp.logaddexp(old_lse, lse)
    keep, add = (jnp.moveaxis(jnp.exp(x - both), -1, 1)[..., None] for x in (old_lse, lse))
    return old * keep + out.astype(jnp.float32) * add, both


def _learn(
    known: Ring, where: tuple, mask: Mask, slopes: Array | None, queries: tuple, held: Array, so_far: tuple
) -> tuple:
    """The gradients of a pair of parts, added to those so far.

    With the log-sum-exp of the whole row at hand, those of softmax attention are those of a sum over scores, where
    nothing is normed any more: of `exp(s - lse) (v . g - out . g)`.
    """

    def block(total: Array, part: tuple) -> tuple[Array, Array]:
        start, q, g, lse, dot = part

        def sum_of(q: Array, held: Array) -> Array:
            p = jnp.exp(_scores(known, where, mask, slopes, q, held[0], start) - lse[..., None])
            along = jnp.einsum("BLKGH,BSKH->BKGLS", g, held[1], preferred_element_type=jnp.float32)
            return (p * (along - dot[..., None])).sum()

        dq, new = jax.grad(sum_of, argnums=(0, 1))(q, held)
        return total + new.astype(jnp.float32), dq.astype(jnp.float32)

    blocks = (_blocks(x, axis) for x, axis in zip(queries, (1, 1, -1, -1), strict=True))
    sums, dq = jax.lax.scan(block, so_far[1], (_starts(queries[0]), *blocks))
    return so_far[0] + _joined(dq, 1), sums


def _scores(known: Ring, where: tuple, mask: Mask, slopes: Array | None, q: Array, k: Array, start: Array) -> Array:
    """The scores of a block of queries, masked by where they and the keys stand in the row."""
    L = known.parts.size * known.size
    places = (L, L, where[0] + start + jnp.arange(q.shape[1]), where[1] + jnp.arange(k.shape[1]))
    return score(q, k, mask.materialise(*places), mask.distance(*places), known.scores, slopes=slopes)


def _width(L: int) -> int:
    return max(width for width in range(1, min(L, BLOCK) + 1) if L % width == 0)


def _starts(q: Array) -> Array:
    return jnp.arange(0, q.shape[1], _width(q.shape[1]))


def _blocks(x: Array, axis: int) -> Array:
    """`x` with a leading axis of blocks along `axis`."""
    return jnp.stack(jnp.split(x, x.shape[axis] // _width(x.shape[axis]), axis=axis))


def _joined(x: Array, axis: int) -> Array:
    return jnp.concatenate(list(x), axis=axis) if len(x) > 1 else x[0]


def _rows(q: Float[Array, "B L K G H"]) -> tuple[int, ...]:
    """The shape of a number for each query of each head."""
    return q.shape[0], *q.shape[2:4], q.shape[1]


def ulysses(q: Array, k: Array, v: Array, mask: Mask, scores: Scores) -> Array:
    """Whole rows of a share of the heads: an all-to-all before attention, of any implementation, and one behind it."""
    devices, heads = auto_axis_size(AXIS), q.shape[2] // auto_axis_size("tensor")
    _for_training("ulysses", mask)
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
