"""Rotary embedding rotates by position and nothing else; scalings, ALiBi and the sinusoids are those of papers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.ops.position import Rotary, alibi_slopes, rotary, sinusoidal

THETA = 10_000.0
PLAIN = Rotary()
L, H = 12, 8
X = jax.random.normal(jax.random.key(1), (2, L, 3, H))
POSITIONS = jnp.arange(L)[None]


def test_position_zero_is_the_identity():
    turned = rotary(X, jnp.zeros((1, L), jnp.int32), PLAIN)
    assert (turned == X).all()


def test_turning_keeps_the_length_of_every_pair():
    def lengths(x: jax.Array) -> jax.Array:
        return jnp.hypot(x[..., : H // 2], x[..., H // 2 :])

    np.testing.assert_allclose(lengths(rotary(X, POSITIONS, PLAIN)), lengths(X), rtol=1e-5)


def test_scores_depend_on_distance_only():
    q, k = (jnp.broadcast_to(x, (1, L, H)) for x in jax.random.normal(jax.random.key(2), (2, 1, 1, H)))

    def scores(shift: int) -> jax.Array:
        return jnp.einsum("BLH,BSH->LS", rotary(q, POSITIONS + shift, PLAIN), rotary(k, POSITIONS + shift, PLAIN))

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
    found = rotary(x, positions, PLAIN)
    np.testing.assert_allclose(found, np.concatenate([expected.real, expected.imag], -1), atol=1e-3)
    np.testing.assert_allclose(found[0, :3], np.concatenate([expected.real, expected.imag], -1)[0, :3], atol=1e-5)


def test_angles_are_float32_even_for_bfloat16():
    positions = jnp.full((1, 1), 4097, jnp.int32)
    x = jnp.ones((1, 1, H), jnp.bfloat16)
    found = rotary(x, positions, PLAIN)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), rotary(x.astype(jnp.float32), positions, PLAIN), atol=0.02)


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


def test_a_share_of_the_head_is_rotated_like_a_whole_head_the_rest_is_not():
    found = rotary(X, POSITIONS, Rotary(fraction=0.5))
    np.testing.assert_allclose(found[..., :4], rotary(X[..., :4], POSITIONS, PLAIN), rtol=1e-6)
    assert (found[..., 4:] == X[..., 4:]).all()


def test_interleaved_pairs_are_the_halves_in_another_order():
    """And each pair lies side by side: a complex number, as the paper has it."""
    for fraction in (1.0, 0.5):
        config = Rotary(fraction=fraction, pairs="interleaved")
        size = config.rotated(H)
        order = [*np.arange(size).reshape(2, -1).T.flatten(), *range(size, H)]  # 0 2 1 3: where interleaving puts them
        expected = rotary(X, POSITIONS, Rotary(fraction=fraction))[..., np.array(order)]
        found = rotary(X[..., np.array(order)], POSITIONS, config)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert jnp.abs(rotary(X, POSITIONS, Rotary(pairs="interleaved")) - rotary(X, POSITIONS, PLAIN)).max() > 1
    assert Rotary(local_theta=9.0, pairs="interleaved").local.pairs == "interleaved"


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
def test_angles_by_length_are_those_of_each_row_and_static_where_it_is(scaling: str):
    lists = {"short_factors": (1.0, 1.5, 2.0, 2.5), "long_factors": (2.0, 3.0, 4.0, 5.0)}
    config = Rotary(scaling=scaling, factor=4.0, original_len=8, **lists if scaling == "longrope" else {})
    lengths = [8, 9] if scaling == "longrope" else [5, 12]
    of_rows = rotary(X, POSITIONS, config, jnp.array(lengths))
    for row, length in enumerate(lengths):
        one = X[row : row + 1]
        np.testing.assert_allclose(of_rows[row], rotary(one, POSITIONS, config, length)[0], atol=2e-6)
    same = rotary(X, POSITIONS, config, 3)
    np.testing.assert_allclose(same, rotary(X, POSITIONS, config, 8), atol=1e-6)
    assert jnp.abs(same - rotary(X, POSITIONS, config, 16)).max() > 0.1


SIZE, FACTOR, TRAINED = 64, 8.0, 2048
LONG = {"factor": FACTOR, "original_len": TRAINED}


def test_linear_scaling_is_a_slower_count_of_positions():
    scaled = rotary(X, 4 * POSITIONS, Rotary(scaling="linear", factor=4.0))
    np.testing.assert_allclose(scaled, rotary(X, POSITIONS, PLAIN), atol=1e-5)


def test_ntk_scaling_keeps_the_fastest_pair_and_slows_the_slowest_in_full():
    ratio = Rotary(scaling="ntk", factor=FACTOR).frequencies(SIZE) / PLAIN.frequencies(SIZE)
    np.testing.assert_allclose(ratio, FACTOR ** (-np.arange(SIZE // 2) / (SIZE // 2 - 1)), rtol=1e-12)


@pytest.mark.parametrize(("scaling", "high"), [("yarn", 32.0), ("llama3", 4.0)])
def test_scalings_by_rotations_keep_fast_pairs_and_slow_the_slow_ones(scaling: str, high: float):
    plain = PLAIN.frequencies(SIZE)
    ratio = Rotary(scaling=scaling, high_turns=high, **LONG).frequencies(SIZE) / plain
    turns = TRAINED * plain / (2 * math.pi)
    assert (np.diff(ratio) <= 0).all()
    np.testing.assert_allclose(ratio[turns > 1.4 * high], 1)  # YaRN rounds its borders to whole pairs
    np.testing.assert_allclose(ratio[turns < 0.7], 1 / FACTOR)
    assert ((ratio > 1 / FACTOR) & (ratio < 1)).sum() > 2


def test_yarn_scales_queries_and_keys_up():
    """Eq. 22: sqrt(1/t) = 0.1 ln(s) + 1."""
    near = rotary(X, jnp.zeros((1, L), jnp.int32), Rotary(scaling="yarn", **LONG))
    np.testing.assert_allclose(near, X * (0.1 * math.log(FACTOR) + 1), rtol=1e-6)
    fixed = rotary(X, jnp.zeros((1, L), jnp.int32), Rotary(scaling="yarn", amplitude=2.0, **LONG))
    np.testing.assert_allclose(fixed, X * 2, rtol=1e-6)


def test_alibi_slopes_are_those_of_the_paper():
    np.testing.assert_allclose(alibi_slopes(8), [2.0**-i for i in range(1, 9)])
    np.testing.assert_allclose(alibi_slopes(12)[:8], alibi_slopes(8))
    np.testing.assert_allclose(alibi_slopes(12)[8:], [2.0 ** -(i / 2) for i in (1, 3, 5, 7)])


FACTORS = {
    "short_factor": np.linspace(1, 2, SIZE // 2).round(3).tolist(),
    "long_factor": np.linspace(2, 40, SIZE // 2).round(3).tolist(),
}
HUGGING_FACE = {
    "linear": ({"rope_type": "linear", "factor": FACTOR}, Rotary(scaling="linear", factor=FACTOR)),
    "llama3": (
        {
            "rope_type": "llama3",
            "factor": FACTOR,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": TRAINED,
        },
        Rotary(scaling="llama3", high_turns=4.0, **LONG),
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": FACTOR, "original_max_position_embeddings": TRAINED},
        Rotary(scaling="yarn", **LONG),
    ),
    "dynamic": ({"rope_type": "dynamic", "factor": FACTOR}, Rotary(scaling="dynamic", **LONG)),
    "longrope": (
        {"rope_type": "longrope", "factor": FACTOR, "original_max_position_embeddings": TRAINED, **FACTORS},
        Rotary(
            scaling="longrope",
            short_factors=tuple(FACTORS["short_factor"]),
            long_factors=tuple(FACTORS["long_factor"]),
            **LONG,
        ),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("length", [TRAINED, TRAINED + 1, 2 * TRAINED])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_frequencies_are_those_of_transformers(name: str, length: int):
    """At the last length that was trained on, one beyond it, and twice as far."""
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    settings, ours = HUGGING_FACE[name]
    sizes = {"hidden_size": SIZE, "num_attention_heads": 1, "max_position_embeddings": TRAINED}
    config = transformers.LlamaConfig(**sizes, rope_parameters={"rope_theta": THETA, **settings})
    theirs, amplitude = rope.ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, "cpu", seq_len=length)
    np.testing.assert_allclose(ours.frequencies(SIZE, length).reshape(-1), theirs.numpy(), rtol=1e-6)
    of_rows = np.asarray(ours.frequencies(SIZE, jnp.array([length]))).reshape(-1)
    np.testing.assert_allclose(of_rows, theirs.numpy(), rtol=2e-6)
    assert math.isclose(ours.scale, amplitude)
