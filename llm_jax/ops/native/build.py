"""The library of native code: compiled where a compiler is, declined where none is, called from a jitted program."""

import ctypes
import functools
import hashlib
import os
import platform as system
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxlib.version import __version__ as JAXLIB
from jaxtyping import Array

from llm_jax import runtime
from llm_jax.ops.attention import platform

SOURCE = Path(__file__).with_name("native.cc")  # which includes the headers
FAST = "-O3 -march=native -ffp-contract=fast -fno-math-errno -fopenmp-simd -fno-semantic-interposition"
FLAGS = (*FAST.split(), "-std=c++17", "-shared", "-fPIC", "-w")
FEW = 16  # rows: with fewer, memory is the limit, and there is nothing that threads could share


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
    for name in re.findall(r"DEFINE_HANDLER_SYMBOL\((\w+)", SOURCE.read_text()):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    return None


def compile_library(compiler: str) -> Path:
    """Return the compiled library, from the cache if source, compiler, processor and jaxlib are those of before."""
    about = subprocess.run([compiler, "-march=native", "-Q", "--help=target"], capture_output=True, text=True).stdout
    sources = [SOURCE.read_text(), *(path.read_text() for path in sorted(SOURCE.parent.glob("*.h")))]
    named = "\n".join([*sources, compiler, about, JAXLIB, *FLAGS])
    made = runtime.cache_folder() / "native" / f"{hashlib.sha256(named.encode()).hexdigest()[:16]}.so"
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent) as folder:  # two processes may build at once
            out = Path(folder, made.name)
            command = [compiler, *FLAGS, "-I", jax.ffi.include_dir(), str(SOURCE), "-o", str(out)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            out.replace(made)
    return made


def covers(x: Array, *others: Array) -> bool:
    """Return whether native code computes with `x`: where it `runs`, for more rows than a decoder has."""
    return x.size >= FEW * x.shape[-1] and runs(x, *others)


def runs(*arrays: Array) -> bool:
    """Return whether native code computes with these arrays: if it can, in float32, and by default.

    LLM_JAX_NATIVE=0 in the environment leaves all to XLA.
    """
    return runtime.NATIVE and all(x.dtype == jnp.float32 for x in arrays) and refusal() is None


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


def call(name: str, like: Any, *arrays: Array, aliases: dict[int, int] | None = None, **attributes: Any) -> Any:
    """Call native code by its name; its results have the shapes of `like`.

    `aliases` maps the index of an argument to that of the result which is stored in its memory.
    """
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
    found = jax.ffi.ffi_call(f"llm_jax_{name}", shapes, input_output_aliases=aliases, vmap_method="sequential")
    return found(*arrays, **attributes)
