import dataclasses
import functools
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from arrays import normal
from compiler import built

from llm_jax import runtime
from llm_jax.data.config import DataConfig
from llm_jax.data.loader import Batch
from llm_jax.model.config import ModelConfig
from llm_jax.ops import native
from llm_jax.ops.activation import ACTIVATIONS
from llm_jax.ops.attention import Declined, Scores, attention, candidates
from llm_jax.ops.loss import cross_entropy
from llm_jax.ops.mask import Mask
from llm_jax.ops.native import build
from llm_jax.ops.norm import layer_norm, rms_norm
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

CONFIG = RunConfig(
    model=ModelConfig(vocab_size=40, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=48),
    data=DataConfig(seq_len=48, batch_size=4),
)


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


@built
@pytest.mark.parametrize("shape", [(1, 1, 1), (17, 33, 5), (130, 100, 70), (50, 1600, 520), (12, 32, 1100)], ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["as it is", "transposed"])
def test_products_and_their_gradients_equal_float64(shape: tuple[int, int, int], transposed: bool):
    M, N, K = shape
    x, w, g = normal(M, K), normal(*((N, K) if transposed else (K, N)), seed=1), normal(M, N, seed=2)
    out, back = jax.vjp(functools.partial(native.matmul, transposed=transposed), x, w)
    exact, weight, gradient = (np.asarray(a, np.float64) for a in (x, w, g))
    matrix, of_w = (weight.T, gradient.T @ exact) if transposed else (weight, exact.T @ gradient)
    for mine, theirs in zip((out, *back(g)), (exact @ matrix, gradient @ matrix.T, of_w), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


@built
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "without a bias"])
def test_products_of_one_input_add_up_its_gradient(biased: bool):
    x, weights, gs = normal(37, 20), [normal(20, 70), normal(20, 33)], [normal(37, 70), normal(37, 33)]
    biases = [normal(70, seed=3), normal(33, seed=4)] if biased else [None, None]
    outs, back = jax.vjp(lambda x, *rest: native.matmuls(x, *rest), x, weights, biases)
    dx, dws, dbs = back(gs)
    exact = sum(wide(g) @ wide(w).T for g, w in zip(gs, weights, strict=True))
    np.testing.assert_allclose(dx, exact, rtol=0, atol=1e-4)
    for w, b, g, out, dw, db in zip(weights, biases, gs, outs, dws, dbs, strict=True):
        np.testing.assert_allclose(out, wide(x) @ wide(w) + (0 if b is None else wide(b)), rtol=0, atol=1e-4)
        np.testing.assert_allclose(dw, wide(x).T @ wide(g), rtol=0, atol=1e-4)
        assert db is None if b is None else np.allclose(db, wide(g).sum(0), rtol=0, atol=1e-4)


PLAIN = {  # name: (operation, shapes of its arguments)
    "layer norm": (lambda x, a, b: layer_norm(x, a, b, 1e-5), [(2, 40, 33), (33,), (33,)]),
    "norm of heads": (lambda x, a: rms_norm(x, a, 1e-5), [(2, 20, 3, 33), (33,)]),
    "gelu": (ACTIVATIONS["gelu"], [(2, 40, 33)]),
    "silu": (ACTIVATIONS["silu"], [(2, 40, 33)]),
    "cross-entropy": (lambda x: cross_entropy(x, TARGETS, z_loss=0.1, label_smoothing=0.1), [(40, 33)]),
}
TARGETS = jnp.arange(40).at[:3].set(jnp.array([-1, -100, 32])) % 34 - 1  # some are none of the 33


@built
@pytest.mark.parametrize("name", PLAIN)
def test_native_operations_and_their_gradients_equal_the_plain_ones(name: str, monkeypatch: pytest.MonkeyPatch):
    operation, shapes = PLAIN[name]
    given = [3 * normal(*shape, seed=i) for i, shape in enumerate(shapes)]

    def found() -> tuple[int, list[jax.Array]]:
        out, back = jax.vjp(operation, *given)
        calls = jax.jit(operation).lower(*given).as_text().count("@llm_jax_")
        return calls, jax.tree.leaves((out, back(jax.tree.map(jnp.cos, out))))

    none, plain = found()
    monkeypatch.setattr(runtime, "NATIVE", True)
    jax.clear_caches()
    some, mine = found()
    assert (none, some > 0) == (0, True)
    for a, b in zip(mine, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1, float(jnp.abs(b).max())))


@built
def test_bits_do_not_depend_on_who_else_computes():
    x, w = normal(300, 200), normal(200, 300, seed=1)
    together = jax.jit(lambda x, w: [native.matmul(x, w) for _ in range(8)])(x, w)
    assert all((a == together[0]).all() for a in together)


@built
def test_a_score_that_is_not_a_number_is_not_hidden():
    q, k, v = normal(1, 20, 1, 1, 8), normal(1, 20, 1, 8).at[0, 5].set(jnp.nan), normal(1, 20, 1, 8)
    out = native.native(q, k, v, Mask(), Scores())
    assert jnp.isfinite(out[0, :5]).all()
    assert jnp.isnan(out[0, 5:]).all()


@built
@pytest.mark.parametrize("mask", [Mask(causal=False), Mask(window=300)], ids=["both ways", "window"])
def test_rows_of_several_blocks_are_attended_to_as_a_whole(mask: Mask):
    L = 530  # blocks of 96 queries and 256 keys
    q, k, v, g = (
        normal(1, L, 1, 2, 8),
        normal(1, L, 1, 8, seed=1),
        normal(1, L, 1, 8, seed=2),
        normal(1, L, 1, 2, 8),
    )
    mask = dataclasses.replace(mask, segments=jnp.arange(L)[None] // 400)

    def found(implementation: str) -> list[jax.Array]:
        run = functools.partial(attention, mask=mask, implementation=implementation)
        out, back = jax.vjp(run, q, k, v)
        return [out, *back(g)]

    for mine, theirs in zip(found("native"), found("reference"), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * float(jnp.abs(theirs).max()))


@built
@pytest.mark.parametrize(
    ("mask", "scores", "why"),
    [
        (Mask(sinks=1, window=4), Scores(), "no sinks"),
        (Mask(prefix=jnp.zeros((1, 16), bool)), Scores(softcap=5.0), "no prefix and no softcap"),
        (Mask(), Scores(scale=-1.0), "a positive scale"),
        (Mask(kv_length=jnp.array([16])), Scores(), "no cache"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_native_attention_declines_what_it_cannot_do(mask: Mask, scores: Scores, why: str):
    with pytest.raises(Declined, match=why):
        native.native(normal(1, 16, 1, 1, 8), normal(1, 16, 1, 8), normal(1, 16, 1, 8), mask, scores)


@built
def test_a_train_step_with_native_code_equals_the_one_without(monkeypatch: pytest.MonkeyPatch):
    tokens = np.random.default_rng(0).integers(0, 40, (4, 49), np.int32)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None, None)

    def gradient(remat: str) -> tuple[int, list[jax.Array]]:
        model = dataclasses.replace(CONFIG.model, remat=remat)
        program = Program.on_one_device(dataclasses.replace(CONFIG, model=model))
        params = program.init().params
        products = program._gradient.lower(params, batch).as_text().count("@llm_jax_linear(")
        return products, jax.tree.leaves(program.gradient(params, batch))

    none, theirs = gradient("none")
    monkeypatch.setattr(runtime, "NATIVE", True)
    found = {remat: gradient(remat) for remat in ("none", "dots", "full")}
    assert none == 0
    assert found["none"][0] == found["dots"][0] < found["full"][0]
    for _, mine in found.values():
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(jnp.abs(b).max()))


def test_native_code_is_not_for_programs_of_several_devices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "NATIVE", True)
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert "one device, got 2" in (native.refusal() or "")


def test_the_environment_switches_native_code_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runtime, "NATIVE", True)
    assert candidates(64) == ["native", "reference"]
    monkeypatch.setattr(runtime, "NATIVE", False)
    assert candidates(64) == ["reference"]
    assert not native.covers(normal(64, 8), normal(8, 8))
    assert not native.used()


def test_without_a_compiler_attention_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.setattr(build, "not_built", functools.cache(native.not_built.__wrapped__))
    with pytest.raises(Declined, match="no C\\+\\+ compiler; install g\\+\\+"):
        attention(*(normal(1, 4, 1, 1, 4), normal(1, 4, 1, 4), normal(1, 4, 1, 4)), Mask(), implementation="native")


def test_a_compiler_that_fails_is_a_reason_to_decline(monkeypatch: pytest.MonkeyPatch):
    def fails(compiler: str) -> None:
        raise subprocess.CalledProcessError(1, compiler, stderr="error: no such instruction\nmore")

    monkeypatch.setattr(build, "compile_library", fails)
    monkeypatch.setattr(build.shutil, "which", lambda name: "/usr/bin/c++")
    assert native.not_built.__wrapped__() == "/usr/bin/c++ could not build it: error: no such instruction"
