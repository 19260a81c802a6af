"""The letters of a format say where each of our numbers is in one of their tensors."""

import numpy as np

from llm_jax.compat.tensor_format import TensorFormat


def test_a_format_says_where_each_of_our_numbers_is():
    """Written out: for head k, its two queries, then its key, then its value, each of H numbers."""
    K, G, H, D = 2, 2, 3, 5
    ours = TensorFormat("(K[GH|H|H])D", ("DKGH", "DKH", "DKH"), {"K": K, "G": G, "H": H, "D": D})
    assert ours.shape == (K * (G + 2) * H, D)
    theirs = np.arange(np.prod(ours.shape)).reshape(ours.shape)
    q, k, v = ours.split(theirs)
    assert (q.shape, k.shape, v.shape) == ((D, K, G, H), (D, K, H), (D, K, H))
    assert q[4, 1, 1, 2] == theirs[1 * 12 + 1 * 3 + 2, 4]
    assert k[0, 1, 2] == theirs[1 * 12 + 2 * 3 + 2, 0]
    assert v[3, 0, 1] == theirs[0 * 12 + 3 * 3 + 1, 3]
    np.testing.assert_array_equal(ours.join([q, k, v]), theirs)


def test_slices_of_a_tensor_may_differ_in_size():
    ours = TensorFormat("D[KGH|KH|KH]", ("DKGH", "DKH", "DKH"), {"K": 2, "G": 3, "H": 4, "D": 5})
    theirs = np.arange(5 * 40).reshape(5, 40)
    assert ours.shape == (5, 40)
    np.testing.assert_array_equal(ours.split(theirs)[1][3], theirs[3, 24:32].reshape(2, 4))
    np.testing.assert_array_equal(ours.join(ours.split(theirs)), theirs)
