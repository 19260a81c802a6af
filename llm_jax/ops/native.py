"""Matrix products and attention in C++ for a CPU, compiled where a compiler is there, and declined where none is.

XLA copies factors that are stored transposed, and the heads of attention, before it multiplies them; `native.cc` reads
them where they are. JAX calls it by its foreign function interface: it is an operation of a jitted program like any
other, with a gradient of its own. docs/performance.md says what it is worth.
"""

import ctypes
import functools
import hashlib
import os
import platform as system
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxlib.version import __version__ as JAXLIB
from jaxtyping import Array, Float, Int, Shaped

from llm_jax import runtime
from llm_jax.ops.attention import Declined, Scores, platform
from llm_jax.ops.mask import Mask

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.cc", "native_few_rows.cc"))
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-w")
TARGETS = (
    "llm_jax_linear",
    "llm_jax_linear_backward",
    "llm_jax_attention",
    "llm_jax_attention_backward",
    "llm_jax_few_rows",
)
FEW = 16  # rows: with fewer, memory is the limit
WIDEST = 256  # heads: what a block of outputs in native.cc has room for


@functools.cache
def not_built() -> str | None:
    """Return why there is no native code here, None if there is: it is built at the first call, in some seconds."""
    if system.machine() != "x86_64" or os.name != "posix":
        return f"it is written for x86-64 on Linux and macOS, and this is {system.machine()} on {system.system()}"
    found = list(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))))
    if not found:
        return "there is no C++ compiler; install g++ (apt install g++), or set CXX"
    try:
        library = ctypes.CDLL(str(compile_library(found[0])))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"{found[0]} could not build it: {(said.strip().splitlines() or ['no reason given'])[0]}"
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def compile_library(compiler: str) -> Path:
    """Return the compiled library, from the cache if source, compiler, processor and jaxlib are those of before."""
    about = subprocess.run([compiler, "-march=native", "-Q", "--help=target"], capture_output=True, text=True).stdout
    named = "\n".join([*(source.read_text() for source in SOURCES), compiler, about, JAXLIB, *FLAGS])
    made = runtime.cache_folder() / "native" / f"{hashlib.sha256(named.encode()).hexdigest()[:16]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:  # two processes may build at once
            out = Path(folder, made.name)
            command = [compiler, *FLAGS, "-I", jax.ffi.include_dir(), *map(str, SOURCES), "-o", str(out)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            out.replace(made)
    return made


def runs(x: Array, w: Array) -> bool:
    """Return whether native code multiplies `x` by a weight: if it can, for more rows than a few, and by default.

    With few rows, memory is the limit and nothing is worth packing: `ops/few_rows.py` is for those. LLM_JAX_NATIVE=0 in
    the environment leaves all to XLA.
    """
    float32 = x.dtype == w.dtype == jnp.float32
    return runtime.NATIVE and float32 and x.size >= FEW * x.shape[-1] and refusal() is None


def used() -> bool:
    """Return whether programs of this process use native code by default, which decides the last bits of a run."""
    return runtime.NATIVE and jax.default_backend() == "cpu" and not_built() is None


def refusal() -> str | None:
    """Return why the program that is traced can't use native code; None if it can."""
    if (here := platform()) != "cpu":
        return f"it runs on cpu, got {here}"
    if (devices := jax.sharding.get_abstract_mesh().size) > 1:
        return f"it runs on one device, got {devices}"
    return not_built()


def matmul(x: Float[Array, "M K"], w: Float[Array, "..."], *, transposed: bool = False) -> Float[Array, "M N"]:
    """Return `x @ w` of a weight [K N], or `transposed`, `x @ w.T` of one that is stored as [N K]."""
    return _linear(transposed, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(transposed: bool, x: Array, w: Array) -> Array:
    return _linear_forward(transposed, x, w)[0]


def _linear_forward(transposed: bool, x: Array, w: Array) -> tuple[Array, tuple[Array, Array]]:
    out = jax.ShapeDtypeStruct((len(x), w.shape[0 if transposed else 1]), x.dtype)
    return _call("llm_jax_linear", out, x, w, **_shape(x, out, transposed)), (x, w)


def _linear_backward(transposed: bool, saved: tuple[Array, Array], g: Float[Array, "M N"]) -> tuple[Array, Array]:
    x, w = saved
    dx, dw = _call("llm_jax_linear_backward", (x, w), x, w, g, **_shape(x, g, transposed))
    return dx, dw


_linear.defvjp(_linear_forward, _linear_backward)


@jax.custom_vjp
def few_rows(x: Float[Array, "M I"], w: Shaped[Array, "I O"]) -> Float[Array, "M O"]:
    """Return `x @ w` in float32, where `x` is float32, and `w` float32, bfloat16 or int8 (`native_few_rows.cc`)."""
    return _call("llm_jax_few_rows", jax.ShapeDtypeStruct((len(x), w.shape[1]), jnp.float32), x, w)


def _few_rows_backward(saved: tuple[Array, Array], g: Float[Array, "M O"]) -> tuple[Array, Array | None]:
    x, w = saved
    return g @ w.T.astype(g.dtype), (x.T @ g).astype(w.dtype) if jnp.issubdtype(w.dtype, jnp.floating) else None


few_rows.defvjp(lambda x, w: (few_rows(x, w), (x, w)), _few_rows_backward)


def _call(name: str, like: Any, *arrays: Array, **attributes: Any) -> Any:
    """Call native code by its name; its results have the shapes of `like`."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    return jax.ffi.ffi_call(name, shapes, vmap_method="sequential")(*arrays, **attributes)


def _shape(x: Any, y: Any, transposed: bool) -> dict[str, Any]:
    return {"M": np.int64(len(x)), "N": np.int64(y.shape[1]), "K": np.int64(x.shape[1]), "transposed": transposed}


def products(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Keep products of `matmul` for the backward pass: a policy of `jax.checkpoint`."""
    return primitive.name == "ffi_call" and parameters.get("target_name") == "llm_jax_linear"


def native(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, scores: Scores
) -> Float[Array, "B L K G H"]:
    """Attend block by block with a running softmax, as FlashAttention does (arXiv:2205.14135); memory is linear in L.

    Blocks that no query sees, for order, window or documents, are skipped. Raise `Declined` for what it can't do.
    """
    if (reason := refusal()) is not None:
        raise Declined(f"native: {reason}")
    if q.shape[1] != k.shape[1] or mask.kv_length is not None:
        raise Declined(f"native takes as many keys as queries, and no cache, got {k.shape[1]} and {q.shape[1]}")
    if q.shape[-1] > WIDEST:
        raise Declined(f"native takes heads of at most {WIDEST}, got {q.shape[-1]}")
    if (scale := scores.factor(q.shape[-1])) <= 0:
        raise Declined(f"native takes a positive scale, got {scale}")
    asked = {"sinks": mask.sinks, "sparse": mask.sparse, "prefix": mask.prefix is not None}
    asked |= {"softcap": scores.softcap, "alibi": scores.alibi}
    if beyond := [name for name, value in asked.items() if value]:
        raise Declined(f"native has no {' and no '.join(beyond)}; 'chunked' and 'reference' have")
    segments = jnp.zeros(0, jnp.int32) if mask.segments is None else mask.segments.astype(jnp.int32)
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    out: Array = _attend((scale, mask.causal, mask.window or 0), q32, k32, v32, segments)
    return out.astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rules: tuple[float, bool, int], q: Array, k: Array, v: Array, segments: Int[Array, "..."]) -> Array:
    return _forward(rules, q, k, v, segments)[0]


def _attributes(rules: tuple[float, bool, int]) -> dict[str, Any]:
    scale, causal, window = rules
    return {"scale": np.float32(scale), "causal": causal, "window": np.int64(window)}


def _forward(
    rules: tuple[float, bool, int], q: Array, k: Array, v: Array, segments: Array
) -> tuple[Array, tuple[Array, ...]]:
    B, L, K, G, _ = q.shape
    like = q, jax.ShapeDtypeStruct((B, K, G, L), q.dtype)
    out, lse = _call("llm_jax_attention", like, q, k, v, segments, **_attributes(rules))
    return out, (q, k, v, segments, out, lse)


def _backward(rules: tuple[float, bool, int], saved: tuple[Array, ...], g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, lse = saved
    found = _call("llm_jax_attention_backward", (q, k, v), q, k, v, out, lse, g, segments, **_attributes(rules))
    return *found, None


_attend.defvjp(_forward, _backward)
