"""Our kernels equal the reference, and never read what no query sees."""

import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import attention_inputs, output_and_gradients
from jax.sharding import NamedSharding

from llm_jax.ops import kernels
from llm_jax.ops.attention import Scores
from llm_jax.ops.mask import Mask, Sparse
from llm_jax.sharding import ACTIVATION_AXES, MeshConfig, make_mesh, spec

L = 384  # three tiles of 128
SEGMENTS = jnp.stack([jnp.repeat(jnp.array([1, 2, 0]), jnp.array(n)) for n in ([5, 370, 9], [150, 200, 34])])
PREFIX = jnp.arange(L)[None] < jnp.array([[150], [20]])

CASES: dict[str, tuple[Mask, Scores]] = {
    "causal": (Mask(), Scores()),
    "both ways, capped, scaled": (Mask(causal=False), Scores(scale=0.5, softcap=3.0)),
    "window": (Mask(window=50), Scores()),
    "window both ways": (Mask(causal=False, window=130), Scores()),
    "documents": (Mask(segments=SEGMENTS), Scores(softcap=3.0)),
    "sinks": (Mask(window=50, sinks=4), Scores()),
    "sinks of documents": (Mask(window=50, sinks=4, segments=SEGMENTS), Scores()),
    "prefix of documents": (Mask(prefix=PREFIX, segments=SEGMENTS), Scores()),
    "sparse": (Mask(sparse=Sparse("strided", block=128, local=1, stride=2)), Scores()),
    "alibi, capped": (Mask(), Scores(alibi=True, softcap=3.0)),
}


def test_a_kernel_names_each_array_that_it_gets():
    for kernel in (kernels._forward_kernel, kernels._pattern_and_ds, kernels._dq_kernel, kernels._dkv_kernel):
        kinds = {parameter.kind for parameter in inspect.signature(kernel).parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def inputs(dtype: str = "float32", B: int = 2, L: int = L, K: int = 2) -> list[jax.Array]:
    """Queries, keys, values and a cotangent, two query heads to each key/value head."""
    return attention_inputs(B, L, K, 2, 8, dtype=dtype)


def assert_equals_the_reference(name: str, mask: Mask, scores: Scores) -> None:
    arrays = inputs()
    expected = output_and_gradients("reference", mask, scores, arrays)
    for mine, theirs in zip(output_and_gradients(name, mask, scores, arrays), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("case", CASES)
def test_flash_equals_the_reference(case: str):
    assert_equals_the_reference("flash", *CASES[case])


def test_flash_in_bfloat16_is_the_rounding_of_float32():
    mask, scores = CASES["sinks of documents"]
    arrays = inputs("bfloat16")
    exact = output_and_gradients("reference", mask, scores, [x.astype(jnp.float32) for x in arrays])
    for mine, theirs in zip(output_and_gradients("flash", mask, scores, arrays), exact, strict=True):
        assert mine.dtype == jnp.bfloat16
        assert jnp.abs(mine.astype(jnp.float32) - theirs).max() < 2**-6 * jnp.abs(theirs).max()


@pytest.mark.parametrize("case", ["causal", "both ways, capped, scaled", "window", "sparse"])
def test_the_tiles_visited_are_those_in_view(case: str):
    view = CASES[case][0].view(8 * 128, 8 * 128, 128, 128)
    for seen in (view, view.T):
        blocks, counts = kernels.visits(seen)
        visited = {(row, int(column)) for row, n in enumerate(counts) for column in blocks[row, :n]}
        assert visited == {(int(row), int(column)) for row, column in np.argwhere(seen)}
        assert counts.sum() == seen.sum()
        assert all((blocks[row, n:] == blocks[row, n - 1]).all() for row, n in enumerate(counts))


@pytest.mark.parametrize("case", ["window", "sparse"])
def test_what_no_query_of_a_tile_sees_is_never_read(case: str):
    mask, scores = CASES[case]
    q, k, v, cotangent = inputs()
    unseen = 0 if case == "window" else 1  # the tile of keys that the last tile of queries does not see
    assert not mask.view(L, L, 128, 128)[2, unseen]
    keys, queries = slice(128 * unseen, 128 * (unseen + 1)), slice(256, L)
    poisoned = [q, k.at[:, keys].set(jnp.nan), v.at[:, keys].set(jnp.nan), cotangent]
    out, dq, _, _ = output_and_gradients("flash", mask, scores, poisoned)
    assert jnp.isfinite(out[:, queries]).all()
    assert jnp.isfinite(dq[:, queries]).all()
    poisoned = [q.at[:, queries].set(jnp.nan), k, v, cotangent.at[:, queries].set(jnp.nan)]
    _, _, dk, dv = output_and_gradients("flash", mask, scores, poisoned)
    assert jnp.isfinite(dk[:, keys]).all()
    assert jnp.isfinite(dv[:, keys]).all()


def test_a_kernel_runs_on_every_device_for_its_own_rows_and_heads():
    arrays, mask = inputs(B=4), Mask(window=200, segments=jnp.concatenate([SEGMENTS, SEGMENTS[::-1]]))
    scores = Scores(alibi=True)  # its slopes differ by head, so a device must take its own
    expected = output_and_gradients("reference", mask, scores, arrays)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    letters = ("BLKGH", "BLKH", "BLKH", "BLKGH")
    split = [
        jax.device_put(x, NamedSharding(mesh, spec(word, ACTIVATION_AXES)))
        for x, word in zip(arrays, letters, strict=True)
    ]
    with jax.set_mesh(mesh):
        found = output_and_gradients("flash", mask, scores, split)
    for mine, theirs, word in zip(found, expected, ("BLKGH", "BLKGH", "BLKH", "BLKH"), strict=True):
        assert mine.sharding.is_equivalent_to(NamedSharding(mesh, spec(word, ACTIVATION_AXES)), mine.ndim)
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=5e-6)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="no libtpu: pip install 'jax[tpu]'")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1"])
def test_forward_and_backward_compile_for_tpu(topology: str):
    """As nobody names an implementation, this is also a test that the default is our kernel there."""
    program = Path(__file__).parents[1] / "scripts/flash_tpu.py"
    run = subprocess.run([sys.executable, program, topology, "default"], capture_output=True, text=True)
    assert run.stdout.count(": 3 kernels, ") == 3, run.stdout + run.stderr
