"""Positions in PyTorch are those of `ops/position.py`; whole models are compared in test_torch_twin.py."""

import math

import numpy as np
import pytest

from llm_jax.ops.position import Rotary

torch = pytest.importorskip("torch")

from llm_jax.compat.torch_positions import alibi_slopes, frequencies, rotate, rotations  # noqa: E402


@pytest.mark.parametrize(
    "rotary",
    [
        Rotary(),
        Rotary(fraction=0.5),
        Rotary(scaling="linear", factor=4.0),
        Rotary(scaling="ntk", factor=4.0),
        Rotary(scaling="yarn", factor=4.0, original_len=32),
        Rotary(scaling="llama3", factor=4.0, original_len=32),
    ],
)
def test_the_frequencies_of_a_head_are_ours(rotary: Rotary):
    np.testing.assert_allclose(frequencies(rotary, 16, 64).numpy(), rotary.frequencies(16), rtol=1e-5)


@pytest.mark.parametrize("pairs", ["halves", "interleaved"])
def test_scores_of_rotated_vectors_depend_on_their_distance_only(pairs: str):
    x = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    turn = rotations(Rotary(), 8, torch.tensor([[0, 3, 10, 13]]))
    q, k = (rotate(y.expand(1, 1, 4, 8), *turn, pairs) for y in x)
    near, far = q[0, 0, 1] @ k[0, 0, 0], q[0, 0, 3] @ k[0, 0, 2]
    np.testing.assert_allclose(near, far, rtol=1e-5)


@pytest.mark.parametrize("heads", [4, 6, 8])
def test_slopes_of_alibi_fall_to_two_to_the_minus_eight(heads: int):
    slopes = alibi_slopes(heads)
    assert (len(slopes), len(set(slopes))) == (heads, heads)
    assert min(slopes[: 2 ** int(math.log2(heads))]) == 2**-8
