"""Matrix products and attention in C++ for a CPU, compiled where a compiler is there, and declined where none is.

XLA's products of small matrices reach a half to three quarters of what a core can do, and its attention copies heads
back and forth; `native.cc`, 330 lines, reaches 90 % on both. JAX calls it by its foreign function interface: it is an
operation of a jitted program like any other, with a gradient of its own.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform as machine
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextvars import ContextVar
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxlib.version import __version__ as JAXLIB
from jaxtyping import Array, Float, Int

from llm_jax.ops.attention import Declined, Scores, platform
from llm_jax.ops.mask import Mask
from llm_jax.runtime import cache_folder

SOURCE = Path(__file__).with_name("native.cc")
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-std=c++17", "-shared", "-fPIC", "-w")
TARGETS = ("llm_jax_matmul", "llm_jax_attention", "llm_jax_attention_backward")
WIDEST = 256  # heads: what a block of outputs in native.cc has room for

_off: ContextVar[bool] = ContextVar("off", default=False)


@contextlib.contextmanager
def without() -> Generator[None]:
    """Trace programs without native code within it."""
    token = _off.set(True)
    try:
        yield
    finally:
        _off.reset(token)


@functools.cache
def missing() -> str | None:
    """Return why there is no native code here, None if there is: it is built at the first call, in some seconds."""
    if os.environ.get("LLM_JAX_NATIVE") == "0":
        return "LLM_JAX_NATIVE=0"
    if machine.machine() != "x86_64" or os.name != "posix":
        return f"native code is for x86-64 on Linux and macOS, and this is {machine.machine()} on {machine.system()}"
    found = list(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))))
    if not found:
        return "there is no C++ compiler; install g++ (apt install g++), or set CXX"
    try:
        library = ctypes.CDLL(str(build(found[0])))
    except (OSError, subprocess.CalledProcessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"{found[0]} could not build it: {(said.strip().splitlines() or ['no reason given'])[0]}"
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def build(compiler: str) -> Path:
    """Return the compiled library, from the cache if source, compiler, processor and jaxlib are those of before."""
    about = subprocess.run([compiler, "-march=native", "-Q", "--help=target"], capture_output=True, text=True).stdout
    named = "\n".join([SOURCE.read_text(), compiler, about, JAXLIB, *FLAGS])
    made = cache_folder() / "native" / f"{hashlib.sha256(named.encode()).hexdigest()[:16]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:  # two processes may build at once
            out = Path(folder, made.name)
            command = [compiler, *FLAGS, "-I", jax.ffi.include_dir(), str(SOURCE), "-o", str(out)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            out.replace(made)
    return made


def runs(*arrays: Array) -> bool:
    """Return whether native code takes these arrays: float32, in a program for one CPU device, where it is built."""
    mesh = jax.sharding.get_abstract_mesh()
    plain = not _off.get() and all(x.dtype == jnp.float32 for x in arrays)
    return plain and platform() == "cpu" and mesh.size <= 1 and missing() is None


def matmul(a: Float[Array, "..."], b: Float[Array, "..."], *, ta: bool = False, tb: bool = False) -> Float[Array, "M N"]:
    """Return `a @ b`, of matrices stored as [M K] and [K N], or `ta` and `tb`, as [K M] and [N K]."""
    (M, K), N = a.shape[::-1] if ta else a.shape, b.shape[0 if tb else 1]
    call = jax.ffi.ffi_call("llm_jax_matmul", jax.ShapeDtypeStruct((M, N), jnp.float32), vmap_method="sequential")
    return call(a, b, M=np.int64(M), N=np.int64(N), K=np.int64(K), ta=ta, tb=tb)


def native(
    q: Float[Array, "B L K G H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask, scores: Scores
) -> Float[Array, "B L K G H"]:
    """Attend block by block with a running softmax, as FlashAttention does (arXiv:2205.14135); memory is linear in L.

    Blocks that no query sees, for order, window or documents, are skipped. Raise `Declined` for what it can't do.
    """
    if (reason := missing()) is not None:
        raise Declined(f"native: {reason}")
    if not runs(q, k, v):
        raise Declined(f"native takes float32 on one CPU device, got {q.dtype} on {platform()}")
    if q.shape[1] != k.shape[1] or mask.kv_length is not None:
        raise Declined("native attends to the row of its queries, not to a cache")
    if q.shape[-1] > WIDEST:
        raise Declined(f"native takes heads of at most {WIDEST}, got {q.shape[-1]}")
    asked = {"sinks": mask.sinks, "sparse": mask.sparse, "prefix": mask.prefix is not None, "alibi": scores.alibi}
    if beyond := [name for name, value in (asked | {"softcap": scores.softcap}).items() if value]:
        raise Declined(f"native has no {' and no '.join(beyond)}")
    segments = jnp.zeros(0, jnp.int32) if mask.segments is None else mask.segments.astype(jnp.int32)
    return _attend((scores.factor(q.shape[-1]), mask.causal, mask.window or 0), q, k, v, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(rules: tuple[float, bool, int], q: Array, k: Array, v: Array, segments: Int[Array, "..."]) -> Array:
    return _forward(rules, q, k, v, segments)[0]


def _attributes(rules: tuple[float, bool, int]) -> dict[str, object]:
    scale, causal, window = rules
    return {"scale": np.float32(scale), "causal": causal, "window": np.int64(window)}


def _forward(rules: tuple[float, bool, int], q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple]:
    B, L, K, G, _ = q.shape
    like = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, K, G, L), q.dtype))
    call = jax.ffi.ffi_call("llm_jax_attention", like, vmap_method="sequential")
    out, lse = call(q, k, v, segments, **_attributes(rules))
    return out, (q, k, v, segments, out, lse)


def _backward(rules: tuple[float, bool, int], saved: tuple, g: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out, lse = saved
    like = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v))
    call = jax.ffi.ffi_call("llm_jax_attention_backward", like, vmap_method="sequential")
    return *call(q, k, v, out, lse, g, segments, **_attributes(rules)), None


_attend.defvjp(_forward, _backward)
