"""Layers of the twin are zero until loaded, and cap scores as they say; models are compared in test_torch_twin.py."""

import pytest
from grid import tiny

torch = pytest.importorskip("torch")
from torch.nn import functional as F  # noqa: E402

from llm_jax.compat.torch_layers import FeedForward, capped_attention, same_document  # noqa: E402


def test_a_module_is_zero_until_it_is_loaded():
    layer = FeedForward(tiny(), 12)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()}["w_down"] == (12, tiny().d_model)
    assert not any(p.any() for p in layer.parameters())


def test_a_cap_far_above_the_scores_changes_nothing_and_a_small_one_does():
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 5, 4, generator=draw) for heads in (4, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    plain = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(capped_attention(q, k, v, mask, 0.5, 1e4), plain, rtol=1e-4, atol=1e-5)
    assert (capped_attention(q, k, v, mask, 0.5, 0.1) - plain).abs().max() > 1e-3


def test_a_token_is_in_the_document_of_the_one_before_it():
    same = torch.stack([*same_document(torch.tensor([[1, 1, 2, 2, 0]]))], dim=1)
    assert same.tolist() == [[False, True, False, True, False]]
