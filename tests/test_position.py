"""Rotary embedding turns by position and nothing else; the sinusoidal table equals its formula."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.ops.position import rotary, sinusoidal

THETA = 10_000.0
L, H = 12, 8
X = jax.random.normal(jax.random.key(1), (2, L, 3, H))
POSITIONS = jnp.arange(L)[None]


def test_position_zero_is_the_identity():
    turned = rotary(X, jnp.zeros((1, L), jnp.int32), THETA)
    assert (turned == X).all()


def test_turning_keeps_the_length_of_every_pair():
    def lengths(x: jax.Array) -> jax.Array:
        return jnp.hypot(x[..., : H // 2], x[..., H // 2 :])

    np.testing.assert_allclose(lengths(rotary(X, POSITIONS, THETA)), lengths(X), rtol=1e-5)


def test_scores_depend_on_distance_only():
    q, k = (jnp.broadcast_to(x, (1, L, H)) for x in jax.random.normal(jax.random.key(2), (2, 1, 1, H)))

    def scores(shift: int) -> jax.Array:
        return jnp.einsum("BLH,BSH->LS", rotary(q, POSITIONS + shift, THETA), rotary(k, POSITIONS + shift, THETA))

    here, far = scores(0), scores(500)
    np.testing.assert_allclose(here, far, atol=2e-4)
    for distance in range(-L + 1, L):
        diagonal = jnp.diagonal(here, distance)
        np.testing.assert_allclose(diagonal, jnp.broadcast_to(diagonal[0], diagonal.shape), atol=1e-5)
    assert len(np.unique(np.round(here[-1], 3))) == L


def test_rotary_equals_complex_multiplication():
    positions = jnp.array([[0, 1, 5, 4095], [7, 7, 2, 0]])
    x = X[:, :4]
    frequencies = THETA ** (-np.arange(H // 2) / (H // 2))
    turns = np.exp(1j * np.asarray(positions)[:, :, None, None] * frequencies)
    expected = (np.asarray(x[..., : H // 2]) + 1j * np.asarray(x[..., H // 2 :])) * turns
    found = rotary(x, positions, THETA)
    np.testing.assert_allclose(found, np.concatenate([expected.real, expected.imag], -1), atol=1e-3)
    np.testing.assert_allclose(found[0, :3], np.concatenate([expected.real, expected.imag], -1)[0, :3], atol=1e-5)


def test_angles_are_float32_even_for_bfloat16():
    positions = jnp.full((1, 1), 4097, jnp.int32)
    x = jnp.ones((1, 1, H), jnp.bfloat16)
    found = rotary(x, positions, THETA)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), rotary(x.astype(jnp.float32), positions, THETA), atol=0.02)


@pytest.mark.parametrize("d_model", [2, 6])
def test_the_sinusoidal_table_equals_its_formula(d_model: int):
    half = d_model // 2
    expected = [
        [math.sin(t / 10_000 ** (i / half)) for i in range(half)]
        + [math.cos(t / 10_000 ** (i / half)) for i in range(half)]
        for t in range(L)
    ]
    found = sinusoidal(POSITIONS, d_model)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
