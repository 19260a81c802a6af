"""Chunks, pieces and single tokens all give the recurrence of the papers; documents and rows keep to themselves."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from jaxprs import equations

from llm_jax.ops.linear_attention import State, gated_delta_rule, linear_attention, short_convolution

B, L, K, G, H = 3, 37, 2, 3, 8
MIXERS = {
    name: jax.jit(mixer, static_argnames="chunk")
    for name, mixer in [("linear", linear_attention), ("delta", gated_delta_rule)]
}
both_mixers = pytest.mark.parametrize("name", MIXERS)
ENDS = [5, 6, 30, 37]  # of the documents
SEGMENTS = jnp.asarray(np.repeat([[7, 2, 3, 0]] * B, np.diff([0, *ENDS]), axis=1))
LENGTHS = jnp.array([0, 20, L])


def inputs(name: str, L: int = L) -> list[jax.Array]:
    """q, k, v and, for the delta rule, log decays and betas."""
    arrays = [normal(B, L, K, G, H, seed=0), normal(B, L, K, H, seed=1), normal(B, L, K, H, seed=2)]
    gates = [-jnp.abs(normal(B, L, K, seed=3)), jax.nn.sigmoid(normal(B, L, K, seed=4))]
    return arrays if name == "linear" else arrays + gates


def earlier(name: str) -> State:
    """What some earlier text has left."""
    return State(normal(B, K, H, H, seed=5), 9 + jnp.abs(normal(B, K, H, seed=6)) if name == "linear" else None)


def part(arrays: Sequence[jax.Array], start: int, end: int) -> list[jax.Array]:
    return [x[:, start:end] for x in arrays]


def recurrence(name: str, arrays: Sequence[jax.Array], state: State | None = None) -> tuple[np.ndarray, State]:
    """The papers' recurrences in float64, a token at a time. Their S has the values in its rows."""
    q, k, v, *gates = (np.asarray(x, np.float64) for x in arrays)
    if name == "linear":
        q, k = (np.where(x > 0, x + 1, np.exp(x)) for x in (q, k))
    else:
        q, k = (x / np.sqrt(np.square(x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
        q = q * H**-0.5
    S = np.zeros((B, K, H, H)) if state is None else np.asarray(state.memory, np.float64).swapaxes(2, 3)
    z = np.zeros((B, K, H)) if name == "delta" or state is None else np.asarray(state.normaliser, np.float64)
    y = np.zeros(q.shape)
    for b, t, head in np.ndindex(k.shape[:3]):
        here, key, value = (b, head), k[b, t, head], v[b, t, head]
        if name == "linear":
            S[here] += np.outer(value, key)
            z[here] += key
            y[b, t, head] = q[b, t, head] @ S[here].T / (q[b, t, head] @ z[here])[:, None]
        else:
            g, beta = (gate[b, t, head] for gate in gates)
            S[here] = np.exp(g) * S[here] @ (np.eye(H) - beta * np.outer(key, key)) + beta * np.outer(value, key)
            y[b, t, head] = q[b, t, head] @ S[here].T
    return y, State(S.swapaxes(2, 3), z if name == "linear" else None)


def assert_close(got: object, wanted: object, tolerance: float = 2e-5) -> None:
    """Every array of the two trees, relative to its largest number."""
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        mine, theirs = (np.asarray(x.astype(np.float32)) for x in (mine, theirs))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(), 1e-30))


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(name: str, chunk: int, arrays: list[jax.Array], state: State, where: dict, cotangent: tuple):
    found, pull = jax.vjp(lambda arrays, state: MIXERS[name](*arrays, state, **where, chunk=chunk), arrays, state)
    return found, pull(cotangent)


def everything(
    name: str, arrays: list[jax.Array], state: State, chunk: int = 8, upon: jax.Array | None = None, **where
):
    """Outputs and state, and the gradients of both, or of the outputs that `upon` [B L] picks."""
    where = {"segments": jnp.zeros((B, L), jnp.int32), "lengths": jnp.full(B, L, jnp.int32)} | where
    to_y, to_state = normal(B, L, K, G, H, seed=7), jax.tree.map(jnp.cos, state)
    if upon is not None:
        to_y, to_state = jnp.where(upon[..., None, None, None], to_y, 0), jax.tree.map(jnp.zeros_like, state)
    return run(name, chunk, arrays, state, where, (to_y, to_state))


@both_mixers
@pytest.mark.parametrize("chunk", [1, 8])
def test_chunks_and_single_tokens_are_the_recurrence_of_the_paper(name: str, chunk: int):
    arrays, state = inputs(name), earlier(name)
    assert_close(everything(name, arrays, state, chunk)[0], recurrence(name, arrays, state))


@both_mixers
@pytest.mark.parametrize("chunk", [8, 64])
def test_the_chunk_changes_neither_values_nor_states_nor_gradients(name: str, chunk: int):
    arguments, where = (name, inputs(name), earlier(name)), {"segments": SEGMENTS, "lengths": LENGTHS}
    assert_close(everything(*arguments, chunk, **where), everything(*arguments, 1, **where))


@both_mixers
def test_a_text_in_pieces_is_the_text(name: str):
    arrays = inputs(name)
    whole = MIXERS[name](*arrays)
    first, state = MIXERS[name](*part(arrays, 0, 20))

    def token(state: State, arrays: list[jax.Array]) -> tuple[State, jax.Array]:
        y, state = MIXERS[name](*[x[:, None] for x in arrays], state)
        return state, y[:, 0]

    state, rest = jax.lax.scan(token, state, [jnp.moveaxis(x, 1, 0) for x in part(arrays, 20, L)])
    assert_close((jnp.concatenate([first, jnp.moveaxis(rest, 0, 1)], axis=1), state), whole)


@both_mixers
def test_packed_documents_are_the_documents_alone(name: str):
    arrays, state = inputs(name), earlier(name)
    alone = [
        recurrence(name, part(arrays, start, end), None if start else state)
        for start, end in zip([0, *ENDS], ENDS, strict=False)
    ]
    wanted = np.concatenate([y for y, _ in alone], axis=1), alone[-1][1]
    assert_close(everything(name, arrays, state, segments=SEGMENTS)[0], wanted)


@both_mixers
def test_a_document_gets_no_gradient_from_the_next(name: str):
    upon = jnp.arange(L)[None] >= jnp.full((B, 1), ENDS[1])
    _, (gradients, to_state) = everything(name, inputs(name), earlier(name), upon=upon, segments=SEGMENTS)
    for gradient in gradients:
        assert jnp.isfinite(gradient).all()
        assert gradient[:, ENDS[1] + 1 :].any()
        assert not gradient[:, : ENDS[1]].any()
    assert not any(x.any() for x in jax.tree.leaves(to_state))


@both_mixers
def test_later_tokens_get_no_gradient(name: str):
    t = 21  # inside a chunk
    _, (gradients, _) = everything(name, inputs(name), earlier(name), upon=jnp.arange(L)[None] == jnp.full((B, 1), t))
    for gradient in gradients:
        assert gradient[:, t].any()
        assert not gradient[:, t + 1 :].any()
    assert gradients[2][:, 0].any()


@both_mixers
def test_a_ragged_row_is_the_row_alone_and_an_empty_one_keeps_its_state(name: str):
    arrays, state = inputs(name), earlier(name)
    (y, left), _ = everything(name, arrays, state, lengths=LENGTHS)
    for row, length in [(1, 20), (2, L)]:
        wanted_y, wanted = recurrence(name, part(arrays, 0, length), state)
        assert_close(y[row, :length], wanted_y[row])
        assert_close(*(jax.tree.map(lambda x, row=row: x[row], kept) for kept in (left, wanted)))
    jax.tree.map(lambda before, after: np.testing.assert_array_equal(before[0], after[0]), state, left)


@both_mixers
def test_rows_without_a_past_or_tokens_have_finite_values_and_gradients(name: str):
    nothing = jax.tree.map(jnp.zeros_like, earlier(name))
    found = everything(name, inputs(name), nothing, lengths=LENGTHS)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(found))


@pytest.mark.parametrize("chunk", [1, 8])
def test_neither_strong_decays_nor_none_overflow_or_lose_digits(chunk: int):
    q, k, v, _, beta = inputs("delta")
    log_decay = jnp.asarray(np.resize([0, -50, 0, -0.01, 0, -0.01, 0, -1e4, -0.01], L), jnp.float32)
    arrays = [q, k, v, jnp.broadcast_to(log_decay[None, :, None], (B, L, K)), beta]
    found, gradients = everything("delta", arrays, earlier("delta"), chunk)
    assert_close(found, recurrence("delta", arrays, earlier("delta")), 2e-6)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_a_key_repeated_through_a_chunk_holds_its_last_value():
    """The hardest matrix to invert: its powers grow like binomials, and its inverse stays small."""
    _, k, v, log_decay, beta = inputs("delta", 64)
    k = jnp.broadcast_to(k[:, :1], k.shape)
    y, _ = MIXERS["delta"](k[..., None, :], k, v, jnp.zeros_like(log_decay), jnp.ones_like(beta))
    assert_close(y[..., 0, :] * H**0.5, v)


@both_mixers
def test_bfloat16_is_near_float32_and_its_state_is_float32(name: str):
    arrays = [x.astype(jnp.bfloat16) for x in inputs(name)]
    y, state = MIXERS[name](*arrays)
    exact, exact_state = MIXERS[name](*[x.astype(jnp.float32) for x in arrays])
    assert y.dtype == jnp.bfloat16
    assert_close(y, exact, 2**-8)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(state))
    assert_close(state, exact_state, 1e-6)


@both_mixers
def test_memory_is_linear_in_the_length(name: str):
    def largest(L: int) -> int:
        program = equations(jax.grad(lambda arrays: MIXERS[name](*arrays)[0].sum()), inputs(name, L))
        return max(x.aval.size for _, equation in program for x in equation.outvars)

    assert largest(1024) == 2 * largest(512)


@both_mixers
def test_a_chunk_that_has_no_halves_is_refused(name: str):
    with pytest.raises(ValueError, match="chunk=48 must be a power of two"):
        MIXERS[name](*inputs(name), chunk=48)


W = 4
convolve = jax.jit(short_convolution)
X, KERNEL, RECENT = normal(B, L, K, H, seed=0), normal(W, K, H, seed=1), normal(B, W - 1, K, H, seed=2)


def convolution(x: jax.Array, recent: jax.Array | None = None) -> np.ndarray:
    """NumPy's, channel by channel."""
    past = np.concatenate([np.zeros((B, W - 1, K, H)) if recent is None else recent, x], axis=1)
    channels = [np.convolve(past[b, :, k, h], KERNEL[::-1, k, h], "valid") for b, k, h in np.ndindex(B, K, H)]
    return np.stack(channels, axis=-1).reshape(-1, B, K, H).swapaxes(0, 1)


def test_a_short_convolution_is_the_convolution():
    y, state = convolve(X, KERNEL, RECENT)
    assert_close(y, convolution(X, RECENT))
    np.testing.assert_array_equal(state, X[:, -W + 1 :])


def test_a_convolution_in_pieces_is_the_convolution():
    whole, pieces, state = convolve(X, KERNEL), [], None
    for start, end in [(0, 1), (1, 2), (2, L)]:  # the first are shorter than the kernel
        y, state = convolve(X[:, start:end], KERNEL, state)
        pieces.append(y)
    assert_close((jnp.concatenate(pieces, axis=1), state), whole)


def test_a_convolution_stops_where_a_document_starts():
    alone = [convolution(X[:, start:end]) for start, end in zip([0, *ENDS], ENDS, strict=False)]
    assert_close(convolve(X, KERNEL, segments=SEGMENTS)[0], np.concatenate(alone, axis=1))


def test_a_ragged_row_carries_its_last_inputs():
    y, state = convolve(X, KERNEL, RECENT, lengths=jnp.array([0, 2, L]))
    wanted = [RECENT[0], jnp.concatenate([RECENT[1, 2:], X[1, :2]]), X[2, -W + 1 :]]
    np.testing.assert_array_equal(state, jnp.stack(wanted))
    assert_close(y[2], convolution(X, RECENT)[2])


def test_a_convolution_in_bfloat16_adds_in_float32():
    x, kernel = X.astype(jnp.bfloat16), KERNEL.astype(jnp.bfloat16)
    y, state = convolve(x, kernel)
    exact, _ = convolve(x.astype(jnp.float32), kernel.astype(jnp.float32))
    assert y.dtype == state.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_the_delta_rule_is_that_of_qwen3_next(form: str):
    torch = pytest.importorskip("torch")
    theirs: Callable = getattr(pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next"), form)
    q, k, v, log_decay, beta = inputs("delta")
    arrays, state = [q[..., 0, :], k, v, log_decay, beta], earlier("delta")
    given = [torch.tensor(np.asarray(x)) for x in (*arrays, state.memory)]
    y, memory = theirs(*given[:5], initial_state=given[5], output_final_state=True, use_qk_l2norm_in_kernel=True)
    mine, left = MIXERS["delta"](q[..., :1, :], *arrays[1:], state)
    assert_close((mine[..., 0, :], left.memory), (y.numpy(), memory.numpy()))


@pytest.mark.slow
def test_the_convolution_is_that_of_qwen3_next():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next").causal_conv1d_fn
    x, kernel = (torch.tensor(np.asarray(x)) for x in (X[..., 0, :].swapaxes(1, 2), KERNEL[:, 0].T))
    assert_close(convolve(X, KERNEL)[0][..., 0, :], theirs(x, kernel).numpy().swapaxes(1, 2))
