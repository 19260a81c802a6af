"""Products of a few rows are the products that they stand for, on tiles or not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiler import built

from llm_jax.ops import native
from llm_jax.ops.few_rows import few_rows, linear_of_few, suits
from llm_jax.ops.gradient import linear
from llm_jax.ops.int8 import quantize

INPUTS, OUTPUTS = 48, 6


def matrices(rows: int) -> tuple[jax.Array, jax.Array]:
    x, w = (np.random.default_rng(rows).normal(size=shape) for shape in ((rows, INPUTS), (INPUTS, OUTPUTS)))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


@pytest.mark.parametrize("rows", [1, 8, 9])
@pytest.mark.parametrize("how", ["float32", "bfloat16", "int8", "of an odd size"])
def test_a_product_of_few_rows_is_the_matrix_product(how: str, rows: int):
    x, w = matrices(rows)
    if how == "int8":
        w = quantize(w, 1)
        whole = np.asarray(w.values, np.float64) * np.asarray(w.scale)
    elif how == "of an odd size":
        x, w = x[:, 1:], w[1:]
        whole = np.asarray(w, np.float64)
    else:
        x, w = x.astype(how), w.astype(how)
        whole = np.asarray(w, np.float64)
    y = few_rows(x, w)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, np.asarray(x, np.float64) @ whole, rtol=1e-5, atol=1e-5)


@built
@pytest.mark.parametrize("shape", [(1, 48, 6), (8, 33, 130), (3, 17, 1100)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_native_products_of_few_rows_and_their_gradients_equal_float64(dtype: str, shape: tuple[int, int, int]):
    M, I, O = shape  # noqa: E741
    rng = np.random.default_rng(0)
    x, w, g = (jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((M, I), (I, O), (M, O)))
    w = jnp.round(30 * w).astype(jnp.int8) if dtype == "int8" else w.astype(dtype)
    y, back = jax.vjp(native.multiply_few, x, w)
    exact, weight, gradient = (np.asarray(a, np.float64) for a in (x, w, g))
    of_x, of_w = back(g)
    found = [(y, exact @ weight, 1e-6), (of_x, gradient @ weight.T, 1e-6)]
    if dtype != "int8":
        found.append((of_w, exact.T @ gradient, 1e-6 if dtype == "float32" else 1e-2))
    for mine, theirs, most in found:
        np.testing.assert_allclose(np.asarray(mine, np.float64), theirs, rtol=0, atol=2 * most * np.abs(theirs).max())


@built
def test_native_code_multiplies_few_rows_where_it_is_there_and_only_those(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("llm_jax.runtime.NATIVE", True)
    x, w = matrices(8)
    assert "llm_jax_few_rows" in jax.jit(few_rows).lower(x, w).as_text()
    assert "llm_jax_few_rows" not in jax.jit(lambda x, w: few_rows(x, w)).lower(jnp.ones((9, INPUTS)), w).as_text()
    monkeypatch.setattr("llm_jax.runtime.NATIVE", False)
    assert "llm_jax_few_rows" not in jax.jit(lambda x, w: few_rows(x, w)).lower(x, w).as_text()


def test_a_layer_of_few_rows_sums_over_all_axes_but_the_first_two():
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(1, 1, 2, 2, 4)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(2, 2, 4, 6)), jnp.float32)
    expected = np.einsum("BLKGH,KGHD->BLD", z, w)
    np.testing.assert_allclose(linear("BLKGH,KGHD->BLD", z, w), expected, rtol=1e-5)
    np.testing.assert_allclose(linear_of_few(z, w), expected, rtol=1e-5)
    x = jnp.asarray(rng.normal(size=(3, 5, 6)), jnp.float32)
    v = quantize(jnp.asarray(rng.normal(size=(6, 2, 4)), jnp.float32), 1)
    found = linear("BLD,DKH->BLKH", x, v)
    np.testing.assert_allclose(
        found, np.einsum("BLD,DKH->BLKH", x, np.asarray(v.values) * np.asarray(v.scale)), rtol=1e-4, atol=1e-5
    )


def test_other_platforms_and_meshes_keep_their_products(monkeypatch: pytest.MonkeyPatch):
    w = jnp.zeros((INPUTS, OUTPUTS), jnp.bfloat16)
    assert suits(1, w)
    assert not suits(9, w)
    assert not suits(2, w.astype(jnp.float32))
    with jax.set_mesh(jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        assert not suits(1, w)
    monkeypatch.setattr("llm_jax.ops.few_rows.platform", lambda: "tpu")
    assert not suits(1, w)
