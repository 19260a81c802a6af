"""Cross-entropy equals float64 arithmetic; the chunked form equals it too, and never holds all logits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jaxprs import equations

from llm_jax.data import loader
from llm_jax.ops.loss import IGNORE, chunked_cross_entropy, cross_entropy, unembed
from llm_jax.sharding import MeshConfig, batch_sharding, make_mesh

B, L, D, V = 2, 6, 3, 7
HIDDEN_KEY, TABLE_KEY, WEIGHT_KEY = jax.random.split(jax.random.key(0), 3)
HIDDEN = jax.random.normal(HIDDEN_KEY, (B, L, D))
TABLE = jax.random.normal(TABLE_KEY, (V, D))
WEIGHTS = jax.random.uniform(WEIGHT_KEY, (B, L))
TARGETS = jnp.array([[0, 6, IGNORE, 3, 3, 1], [IGNORE, 2, 5, 0, 4, IGNORE]])
TERMS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.2, "z_loss": 1e-3}]


def oracle(
    logits: np.ndarray, targets: np.ndarray, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(loss, negative log-likelihood) token by token, as the papers write it."""
    loss, nll = np.zeros(targets.shape), np.zeros(targets.shape)
    for place in np.argwhere(targets != IGNORE):
        row, target = logits[*place].astype(np.float64), targets[*place]
        partition = np.exp(row).sum()
        log_probability = np.log(np.exp(row) / partition)
        wanted = np.full(V, label_smoothing / V)
        wanted[target] += 1 - label_smoothing
        nll[*place] = -log_probability[target]
        loss[*place] = -(wanted * log_probability).sum() + z_loss * np.log(partition) ** 2
    return loss, nll


@pytest.mark.parametrize("terms", TERMS)
def test_cross_entropy_equals_float64_arithmetic(terms: dict[str, float]):
    logits = 3 * jnp.einsum("BLD,VD->BLV", HIDDEN, TABLE)
    expected = oracle(np.asarray(logits), np.asarray(TARGETS), **terms)
    for found, exact in zip(cross_entropy(logits, TARGETS, **terms), expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=2e-6, atol=1e-6)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    logits = jnp.array([[1e4, 0.0, -1e4]])
    assert cross_entropy(logits, jnp.array([0]))[0] == 0
    assert cross_entropy(logits, jnp.array([1]))[0] == 1e4


def test_bfloat16_logits_give_a_float32_loss():
    logits = jnp.einsum("BLD,VD->BLV", HIDDEN, TABLE).astype(jnp.bfloat16)
    loss, nll = cross_entropy(logits, TARGETS)
    assert (loss.dtype, nll.dtype) == (jnp.float32, jnp.float32)
    expected, _ = oracle(np.asarray(logits.astype(jnp.float32)), np.asarray(TARGETS))
    np.testing.assert_allclose(loss, expected, rtol=2e-6, atol=1e-6)


def test_an_ignored_token_counts_for_nothing():
    logits = jax.random.normal(HIDDEN_KEY, (B, L, V))

    def total(logits: jax.Array) -> jax.Array:
        loss, _ = cross_entropy(logits, TARGETS, z_loss=1e-2, label_smoothing=0.1)
        return (WEIGHTS * loss).sum()

    touched = (jax.grad(total)(logits) != 0).any(-1)
    assert (touched == (TARGETS != IGNORE)).all()


def plain(hidden: jax.Array, table: jax.Array, **terms: float) -> tuple[jax.Array, jax.Array]:
    return cross_entropy(3 * jnp.tanh(jnp.einsum("BLD,VD->BLV", hidden, table) / 3), TARGETS, **terms)


def chunked(hidden: jax.Array, table: jax.Array, **terms: float) -> tuple[jax.Array, jax.Array]:
    return chunked_cross_entropy(hidden, table, TARGETS, 2, 3.0, **terms)


def weighted(form: Any, terms: dict[str, float]) -> Any:
    """The sum of the loss, each token with its own weight, as a function of (hidden, table)."""
    return lambda hidden, table: (WEIGHTS * form(hidden, table, **terms)[0]).sum()


@pytest.mark.parametrize("terms", TERMS)
def test_chunks_give_the_loss_of_the_whole(terms: dict[str, float]):
    for mine, theirs in zip(chunked(HIDDEN, TABLE, **terms), plain(HIDDEN, TABLE, **terms), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("terms", [TERMS[0], TERMS[-1]])
def test_chunks_give_the_gradient_of_the_whole(terms: dict[str, float]):
    gradients = [jax.jit(jax.grad(weighted(form, terms), argnums=(0, 1)))(HIDDEN, TABLE) for form in (chunked, plain)]
    for mine, theirs in zip(*gradients, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_chunks_never_hold_all_logits():
    def largest(form: Any) -> int:
        gradient = jax.grad(weighted(form, TERMS[-1]), argnums=(0, 1))
        program = equations(gradient, HIDDEN, TABLE)
        return max(array.aval.size for _, equation in program for array in equation.outvars)

    assert largest(plain) >= B * L * V
    assert largest(chunked) < B * L * V


def test_many_chunks_give_the_bfloat16_head_as_good_a_gradient_as_one():
    rng, rows = np.random.default_rng(0), 512
    hidden, table = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((1, rows, D), (V, D)))
    targets = jnp.asarray(rng.integers(V, size=(1, rows)), jnp.int32)

    def gradient(dtype: str, chunk: int) -> np.ndarray:
        def loss(table: jax.Array) -> jax.Array:
            return chunked_cross_entropy(hidden.astype(dtype), table.astype(dtype), targets, chunk)[0].sum()

        return np.asarray(jax.jit(jax.grad(loss))(table))

    exact = gradient("float32", rows)
    error = {chunk: np.linalg.norm(gradient("bfloat16", chunk) - exact) for chunk in (rows, 2)}
    assert error[2] < 1.5 * error[rows]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_few_tokens_give_the_table_its_gradient_in_one_product(softcap: float | None):
    hidden, table = jax.random.normal(HIDDEN_KEY, (2, 3, 64)), jax.random.normal(TABLE_KEY, (V, 64))
    targets, weights = TARGETS[:, :3], WEIGHTS[:, :3]

    def gradient(chunk: int | None, dtype: str) -> Any:
        def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
            if chunk is not None:
                return (weights * chunked_cross_entropy(hidden, table, targets, chunk, softcap, z_loss=1e-2)[0]).sum()
            return (weights * cross_entropy(unembed(hidden, table, softcap), targets, z_loss=1e-2)[0]).sum()

        return jax.value_and_grad(loss, argnums=(0, 1))(hidden.astype(dtype), table.astype(dtype))

    made: list[Any] = [array.aval for _, e in equations(lambda: gradient(1, "bfloat16")) for array in e.outvars]
    assert not any((x.shape, x.dtype) == (table.shape, "float32") for x in made)
    (exact, exacts), (found, founds) = gradient(None, "float32"), gradient(1, "bfloat16")
    np.testing.assert_allclose(found, exact, rtol=2e-3)
    for mine, theirs in zip(founds, exacts, strict=True):
        assert jnp.abs(mine.astype(jnp.float32) - theirs).max() < 0.02 * jnp.abs(theirs).max()


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, tensor=2)], ids=str)
def test_sharded_rows_width_and_tokens_give_the_loss_of_one_device(mesh: MeshConfig, few: bool, monkeypatch):
    monkeypatch.setattr("llm_jax.ops.loss.few_tokens", lambda *_: few)
    keys = jax.random.split(jax.random.key(1), 3)
    hidden, table = jax.random.normal(keys[0], (8, 4, 6)), jax.random.normal(keys[1], (10, 6))
    targets = jax.random.randint(keys[2], (8, 4), IGNORE, 10)

    def loss(hidden: jax.Array, table: jax.Array) -> jax.Array:
        return chunked_cross_entropy(hidden, table, targets, 2, z_loss=1e-2)[0].sum()

    run = jax.value_and_grad(loss, argnums=(0, 1))
    here = make_mesh(mesh, jax.devices()[: math.prod(dataclasses.astuple(mesh))])
    width = NamedSharding(here, PartitionSpec("tensor", "fsdp"))
    with jax.set_mesh(here):
        found = jax.jit(run, in_shardings=(batch_sharding(here), width))(hidden, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, run(hidden, table))


def test_a_chunk_that_does_not_divide_the_row_is_refused():
    with pytest.raises(ValueError, match=r"loss\.chunk=4 does not divide the row length L=6; use a divisor of 6"):
        chunked_cross_entropy(HIDDEN, TABLE, TARGETS, 4)


def test_a_batch_marks_what_the_loss_ignores():
    assert loader.IGNORE == IGNORE
