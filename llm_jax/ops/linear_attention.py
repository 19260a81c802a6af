"""Linear attention: a row is remembered in a state of fixed size, so a new token costs the same at every length.

Both mixers run chunk by chunk. Inside a chunk each token reads the earlier ones, as attention does; only the state goes
from chunk to chunk, so memory is linear in L. A chunk of one token is the recurrence itself, which generates text.
Inputs of any dtype are read as float32, and sums and states are float32; how many digits of its factors a product keeps
is the platform's default (`jax.default_matmul_precision`): all on a CPU.

In the einsums C and T are tokens of a chunk that read and are read, and I is the H of the values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

CHUNK = 64  # tokens that read one another directly
EPSILON = 1e-6  # keeps a division finite where there is nothing to divide by


@struct.dataclass
class State:
    """The memory of rows, float32: for each key/value head a map from keys to values.

    Attributes:
      memory: the sum of the outer products of keys (rows) and what was written for them (columns).
      normaliser: the sum of the keys, by which `linear_attention` divides.
    """

    memory: Float[Array, "B K H H"]
    normaliser: Float[Array, "B K H"] | None = None


def linear_attention(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    state: State | None = None,
    *,
    segments: Int[Array, "B L"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B L K G H"], State]:
    """Return causal kernelised attention (Katharopoulos et al. 2020, arXiv:2006.16236, eqs. 7 and 9), and the state.

    `y_t = sum_j (phi(q_t) . phi(k_j)) v_j / sum_j phi(q_t) . phi(k_j)` over `j <= t`, with `phi(x) = elu(x) + 1`. Query
    head (k, g) reads the state of key/value head k. `chunk`, a power of two, changes the speed and nothing else; raises
    `ValueError` for another number.

    `state` is that of the text before; None: there is none. Where the id in `segments` changes a document starts, and
    sees nothing before it. Tokens of row b from `lengths[b]` on don't change the state, and their outputs have no
    meaning.
    """
    (B, L, K, _, H), dtype = q.shape, q.dtype
    if state is None:
        state = State(_zeros(k, B, K, H, H), _zeros(k, B, K, H))
    q, k = (jax.nn.elu(x.astype(jnp.float32)) + 1 for x in (q, k))
    log_decay = _cut(_forget(_zeros(k, B, L, 1), segments), lengths)
    q, k, v, log_decay = _split(chunk, q, _cut(k, lengths), v, log_decay)

    def step(state: State, inputs: tuple[Array, ...]) -> tuple[State, Array]:
        assert state.normaliser is not None
        q, k, v, decay = inputs
        read, memory = _recall(state.memory, q, k, v, decay)
        # What is recalled of the value 1 is the sum of the weights.
        total, normaliser = _recall(state.normaliser[..., None], q, k, jnp.ones_like(v[..., :1]), decay)
        return State(memory, normaliser[..., 0]), read / jnp.maximum(total, EPSILON)

    y, state = _over_chunks(step, state, (q, k, v, _decay(log_decay)))
    return y[:, :L].astype(dtype), state


def gated_delta_rule(
    q: Float[Array, "B L K G H"],
    k: Float[Array, "B L K H"],
    v: Float[Array, "B L K H"],
    log_decay: Float[Array, "B L K"],
    beta: Float[Array, "B L K"],
    state: State | None = None,
    *,
    segments: Int[Array, "B L"] | None = None,
    lengths: Int[Array, " B"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "B L K G H"], State]:
    """Return the gated delta rule (Yang et al. 2024, arXiv:2412.06464, eq. 10), and the state.

    `S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T` and `y_t = S_t q_t`: the state decays by
    `log_decay` g <= 0, and its value for key k_t moves by the share `beta` towards v_t. q and k are normalised to
    length 1 here, and q is multiplied by `H**-0.5`. `memory` is S transposed. The rest is as in `linear_attention`.

    Inside a chunk the rule writes `u_t k_t^T` with `u_t = beta_t (v_t - the value stored for k_t)`. Some of that value
    was written by the chunk itself, so `(I + A) u = beta (v - the value in the state before the chunk)` with a strictly
    lower triangular A: the WY representation. It is inverted for all chunks at once.
    """
    (B, L, K, _, H), dtype = q.shape, q.dtype
    if state is None:
        state = State(_zeros(k, B, K, H, H))
    q, k = _unit(q) * H**-0.5, _unit(k)
    log_decay = _cut(_forget(log_decay.astype(jnp.float32), segments), lengths)
    q, k, v, log_decay, beta = _split(chunk, q, k, v, log_decay, _cut(beta, lengths)[..., None])
    decay = _decay(log_decay)
    written = _inverse(jnp.tril(jnp.einsum("NBKCH,NBKTH->NBKCT", beta * k, k) * decay[..., 1:, 1:], -1))

    def step(state: State, inputs: tuple[Array, ...]) -> tuple[State, Array]:
        q, k, v, beta, decay, written = inputs
        known = decay[..., 1:, :1] * jnp.einsum("BKCH,BKHI->BKCI", k, state.memory)
        read, memory = _recall(state.memory, q, k, written @ (beta * (v - known)), decay)
        return State(memory), read

    y, state = _over_chunks(step, state, (q, k, v, beta, decay, written))
    return y[:, :L].astype(dtype), state


def short_convolution(
    x: Float[Array, "B L *D"],
    kernel: Float[Array, "W *D"],
    state: Float[Array, "B W-1 *D"] | None = None,
    *,
    segments: Int[Array, "B L"] | None = None,
    lengths: Int[Array, " B"] | None = None,
) -> tuple[Float[Array, "B L *D"], Float[Array, "B W-1 *D"]]:
    """Return each channel's weighted sum over the last W tokens, `kernel[-1]` for the newest; and the last W-1 inputs.

    Those are the `state` for the next tokens. `segments` and `lengths` as in `linear_attention`.
    """
    (B, L), W = x.shape[:2], kernel.shape[0]
    if state is None:
        state = jnp.zeros_like(x, shape=(B, W - 1, *x.shape[2:]))
    past = jnp.concatenate([state, x], axis=1)
    document = jnp.zeros((B, L), jnp.int32) if segments is None else jnp.cumsum(_starts(segments), axis=1)
    before = jnp.pad(document, ((0, 0), (W - 1, 0)))  # the state belongs to the first document

    y = _zeros(x, *x.shape)
    for w in range(W):
        seen = _only(before[:, w : w + L] == document, past[:, w : w + L])
        y += kernel[w].astype(jnp.float32)[None, None] * seen.astype(jnp.float32)

    if lengths is None:
        return y.astype(x.dtype), past[:, L:]
    return y.astype(x.dtype), jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, W - 1))(past, lengths)


def _recall(memory: Array, q: Array, k: Array, values: Array, decay: Array) -> tuple[Array, Array]:
    """Return what one chunk of decaying linear attention reads from memory and chunk, and the memory after it."""
    since, among, left, through = decay[..., 1:, :1], decay[..., 1:, 1:], decay[..., -1, 1:, None], decay[..., -1:, :1]
    weights = jnp.einsum("BKCGH,BKTH->BKCGT", q, k) * among[..., None, :]
    inside = jnp.einsum("BKCGT,BKTI->BKCGI", weights, values)
    read = since[..., None] * jnp.einsum("BKCGH,BKHI->BKCGI", q, memory) + inside
    return read, through * memory + jnp.einsum("BKTH,BKTI->BKHI", left * k, values)


def _decay(log_decay: Array) -> Array:
    """Return [... C+1 C+1] of [... C]: what is left at i of something written at j; index 0 is before the chunk.

    That is `exp(g[j+1] + ... + g[i])`, and 0 for j > i. Each j has a running sum of its own: the difference of two sums
    would lose digits after a strong decay, and could not hold the -inf of a document's start.
    """
    g = jnp.pad(log_decay, [(0, 0)] * (log_decay.ndim - 1) + [(1, 0)])
    steps = jnp.tril(jnp.repeat(g[..., None], g.shape[-1], axis=-1), -1)
    return jnp.tril(jnp.exp(jnp.cumsum(steps, axis=-2)))


def _inverse(a: Array) -> Array:
    """Return `(I + a)^-1` of strictly lower triangular matrices, whose size is a power of two, by halves.

    `[[P, 0], [R, Q]]^-1 = [[P^-1, 0], [-Q^-1 R P^-1, Q^-1]]`: matrix products, where a triangular solve goes by rows.
    """
    if a.shape[-1] == 1:
        return jnp.ones_like(a)
    half = a.shape[-1] // 2
    # Both halves in one call, along the first axis: on arrays of many axes XLA's CPU compiler stops (JAX 0.10.2, 0.12).
    p, q = jnp.split(_inverse(jnp.concatenate([a[..., :half, :half], a[..., half:, half:]])), 2)
    with jax.default_matmul_precision("highest"):  # errors would grow from half to half
        r = -q @ a[..., half:, :half] @ p
    return jnp.block([[p, jnp.zeros_like(p)], [r, q]])


def _over_chunks(step: Callable[..., Any], state: State, chunks: tuple[Array, ...]) -> tuple[Array, State]:
    """Scan over the chunks; the backward pass recomputes each from the state before it."""
    state, y = jax.lax.scan(jax.checkpoint(step, prevent_cse=False), state, chunks)
    y = jnp.moveaxis(y, (0, 2), (1, 3))  # [N B K C G H] -> [B N C K G H]
    return y.reshape(y.shape[0], -1, *y.shape[3:]), state


def _split(chunk: int, *arrays: Array) -> list[Array]:
    """Split [B L K ...] into [N B K C ...], float32: N chunks of C tokens, the last padded with zeros."""
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"chunk={chunk} must be a power of two")

    def split(x: Array) -> Array:
        B, L, K = x.shape[:3]
        C = min(chunk, 1 << (L - 1).bit_length())
        x = jnp.pad(x.astype(jnp.float32), [(0, 0), (0, -L % C)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, -1, C, K, *x.shape[3:]), (1, 3), (0, 2))

    return [split(x) for x in arrays]


def _unit(x: Array) -> Array:
    """Return vectors of length 1."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).sum(-1, keepdims=True) + EPSILON)


def _forget(log_decay: Array, segments: Array | None) -> Array:
    """Return the decay with -inf where a document starts, so that it sees nothing before it."""
    return log_decay if segments is None else jnp.where(_starts(segments)[..., None], -jnp.inf, log_decay)


def _cut(x: Array, lengths: Array | None) -> Array:
    """Return `x` with zeros after the end of each row."""
    return x if lengths is None else _only(jnp.arange(x.shape[1])[None] < lengths[:, None], x)


def _starts(segments: Int[Array, "B L"]) -> Bool[Array, "B L"]:
    """Return which tokens start a document, other than the first of a row."""
    return jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))


def _only(mask: Bool[Array, "B L"], x: Array) -> Array:
    """Return `x` [B L ...] where the mask is true, else 0."""
    return jnp.where(jnp.expand_dims(mask, range(2, x.ndim)), x, 0)


def _zeros(like: Array, *shape: int) -> Array:
    """Return float32 zeros that, inside `shard_map`, vary over the same mesh axes as `like`."""
    return jnp.zeros_like(like, jnp.float32, shape=shape)
