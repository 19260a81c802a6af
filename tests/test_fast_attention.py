"""Kernels of libraries equal the reference, and all say why they decline. Ours: `test_kernels.py`."""

import importlib.util
import sys
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jaxprs import equations
from test_kernels import CASES, PREFIX, SEGMENTS, L, assert_equals_the_reference, inputs

from llm_jax.ops.attention import LONG, Declined, Scores, attention, platform
from llm_jax.ops.mask import Mask, Sparse

DECLINED: list[tuple[str, Mask, Scores, int, str]] = [
    ("flash", Mask(kv_length=jnp.array([300, 384])), Scores(), L, "flash has no kv_length; 'chunked' and"),
    ("flash", Mask(), Scores(), 200, "flash takes a multiple of 128 tokens, got 200; pad rows to 256"),
    ("flash", Mask(sparse=Sparse(block=64)), Scores(), L, r"flash takes a sparse.block in \(512, 256, 128\), got 64"),
    ("splash", Mask(prefix=PREFIX), Scores(alibi=True), L, "splash has no alibi and no prefix"),
    ("cudnn", Mask(), Scores(), L, "cudnn runs on gpu, got cpu"),
    ("tokamax", Mask(segments=SEGMENTS), Scores(), L, "tokamax has no segments"),
]


@pytest.mark.parametrize("case", DECLINED, ids=lambda case: f"{case[0]}: {case[-1]}")
def test_a_kernel_that_declines_says_what_it_lacks(case: tuple[str, Mask, Scores, int, str]):
    name, mask, scores, length, reason = case
    q, k, v, _ = inputs(L=length)
    with pytest.raises(Declined, match=reason):
        attention(q, k, v, mask, scores, implementation=name)


def test_heads_that_do_not_fit_a_chip_are_declined():
    q = jnp.ones((1, 128, 1, 1, 512))
    with pytest.raises(Declined, match="flash takes heads of at most 256, got 512"):
        attention(q, q[:, :, :, 0], q[:, :, :, 0], Mask(), implementation="flash")


def test_as_many_keys_as_queries():
    q, k, v, _ = inputs()
    with pytest.raises(Declined, match="flash takes as many keys as queries, got 128 and 384"):
        attention(q, k[:, :128], v[:, :128], Mask(), implementation="flash")


@pytest.mark.parametrize("case", ["documents", "window both ways", "both ways, capped, scaled"])
def test_splash_equals_the_reference(case: str):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert_equals_the_reference("splash", *CASES[case])


@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")
@pytest.mark.parametrize("case", ["window", "window both ways", "both ways, capped, scaled"])
def test_tokamax_equals_the_reference(case: str):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        assert_equals_the_reference("tokamax", *CASES[case])


def test_without_tokamax_the_reason_is_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)  # an import of it fails
    q, k, v, _ = inputs()
    with pytest.raises(Declined, match="pip install tokamax"):
        attention(q, k, v, Mask(), implementation="tokamax")


def devices_elsewhere(kind: str, where: str) -> Any:
    """A mesh of one device that this machine lacks."""
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=where)
    sizes, axes = (1, 1, 1), ("data", "fsdp", "tensor")
    return jax.sharding.use_abstract_mesh(
        AbstractMesh(sizes, axes, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    )


def kernels_called(dtype: str, length: int, mask: Mask) -> set[str]:
    """The primitives outside of JAX's own among what attention does when nobody names an implementation."""
    q, k, v, _ = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.eval_shape(lambda: inputs(dtype, L=length)))
    program = equations(lambda q, k, v: attention(q, k, v, mask), q, k, v)
    names = {equation.primitive.name for _, equation in program}
    return names & {"pallas_call", "scan", "custom_vjp_call", "dot_product_attention_fwd_wrapper"}


def test_the_mesh_says_what_the_program_will_run_on():
    assert platform() == "cpu"
    with devices_elsewhere("TPU v5p", "tpu"):
        assert platform() == "tpu"
    with devices_elsewhere("NVIDIA H100", "gpu"):
        assert platform() == "gpu"


def test_the_default_takes_our_kernel_for_long_rows_on_tpu_only():
    assert "pallas_call" not in kernels_called("bfloat16", LONG, Mask())
    with devices_elsewhere("TPU v5p", "tpu"):
        assert "pallas_call" in kernels_called("bfloat16", LONG, Mask())
        assert "pallas_call" not in kernels_called("bfloat16", LONG // 2, Mask())
        assert "pallas_call" not in kernels_called("bfloat16", LONG, Mask(sparse=Sparse(block=64)))


def test_on_gpu_the_default_is_cudnn_where_that_accepts(monkeypatch: pytest.MonkeyPatch):
    from jax._src.cudnn import fused_attention_stablehlo as theirs

    q, k, v, _ = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs("bfloat16"))

    def lowered(mask: Mask) -> str:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
            out, pull = jax.vjp(lambda q, k, v: attention(q, k, v, mask), q, k, v)
            return [out, *pull(out)]

        return jax.jit(run).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()

    with devices_elsewhere("NVIDIA H100", "gpu"):
        assert "__cudnn" not in lowered(Mask())  # this machine has no cuDNN
        with pytest.raises(Declined, match="cudnn: cuDNN is not detected"):
            attention(*inputs("bfloat16")[:3], Mask(), implementation="cudnn")
        monkeypatch.setattr(theirs, "check_cudnn_version", lambda: 91000)
        assert lowered(Mask()).count("__cudnn$fmhaSoftmaxBackward") == 1
        assert lowered(Mask(window=50)).count("sliding_window_length\\22: 50") == 2
        assert "__cudnn" not in lowered(Mask(segments=SEGMENTS))
        with pytest.raises(Declined, match="cudnn has windows under a causal mask only"):
            attention(*inputs("bfloat16")[:3], Mask(causal=False, window=5), implementation="cudnn")
        with pytest.raises(Declined, match="cudnn: Q must be fp16/bf16"):
            attention(*inputs()[:3], Mask(), implementation="cudnn")
