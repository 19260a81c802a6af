"""What every test runs under: eight CPU devices, strict numerics, and every annotated shape checked.

This file is read before any test module, hence before JAX or llm_jax is imported: the settings hold for all.
Programs that tests start in processes of their own inherit the environment, not `jax.config`.
"""

import contextlib
import functools
import gc
import os
import signal
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
# The numbers that tests expect are XLA's; test_native.py has those of native code, which needs a compiler.
os.environ["LLM_JAX_NATIVE"] = "0"
# XLA's CPU client has as many threads as there are devices, unless this says more. Eight are too few: a permute that
# runs beside another collective takes two threads of a device, one device is left with none, and all wait for it.
os.environ["NPROC"] = "32"
# Almost all of the time goes to compiling small programs that run once: without LLVM's optimizations, and by one
# thread, half of it. XLA:CPU's fusion emitters build each kernel through MLIR, which takes as long as all else that XLA
# does to a small program; JAX 0.12 has no other way. XLA's own passes, on which budgets and shardings depend, are as
# they were, and the slow tests of .ci/run have all: there LLM_JAX_TESTS_COMPILE=as-users-do.
if "LLM_JAX_TESTS_COMPILE" not in os.environ:
    quick = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    if version("jaxlib").startswith("0.10."):
        quick.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([*quick, os.environ.get("XLA_FLAGS", "")])
# Compiled programs are kept between runs of the suite; they are loaded as they were, so no number changes.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import beartype
import hypothesis
import jax
import jaxtyping
import optax
import pytest

from llm_jax import runtime  # importing it guards against compilers with known faults, here as in a user's process

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

# A shell's background job ignores Ctrl-C, and so does what it starts: tests that send it would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tracing makes objects by the million, and most of them die by themselves: to look for the others as often as Python
# does took a sixth of the CPU time of some tests (docs/log.md).
gc.freeze()
gc.set_threshold(500_000, 50, 100)


# A run keeps the memory that it frees. Here thousands of programs of other sizes follow it.
runtime.reuse_freed_memory = lambda: None


def standard(function: Callable) -> Callable:
    """Third-party arithmetic keeps JAX's own promotion."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


# optax mixes Python floats with its integer step count: in these three functions and no other.
optax.tree.bias_correction = standard(optax.tree.bias_correction)
for make in (optax.linear_schedule, optax.cosine_decay_schedule):
    setattr(optax, make.__name__, lambda *args, make=make, **kwargs: standard(make(*args, **kwargs)))


def checked(function: Callable) -> Callable:
    """beartype, but not for constructors: JAX rebuilds a struct around shapes and shardings too."""
    return function if function.__name__ == "__init__" else beartype.beartype(function)


jaxtyping.install_import_hook("llm_jax", "conftest.checked")

# A deadline would time the first compile, and a random seed would make one machine red and the next green.
hypothesis.settings.register_profile("llm_jax", deadline=None, derandomize=True)
hypothesis.settings.load_profile("llm_jax")


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Between files, let compiled programs go where there are many."""
    yield
    let_programs_go()


@pytest.fixture
def few_programs_a_test() -> Iterator[None]:
    """The same after each test, for a file of many that share none."""
    yield
    let_programs_go()


def let_programs_go() -> None:
    """Each compiled program takes some memory maps, of which Linux gives a process 65,530; past that JAX ends it."""
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        from llm_jax.train import program

        program._kept.cache_clear()
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="session")
def corpus_and_cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One corpus for all files: equal configs share their programs (`Program.on`) and their prepared shards."""
    from tiny_run import write_corpus

    return write_corpus(tmp_path_factory.mktemp("corpus")), tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def config(corpus_and_cache: tuple[Path, Path]) -> Iterator[Any]:
    """The smallest run that has everything, with a corpus and caches of the tests' own."""
    from tiny_run import tiny

    corpus, cache = corpus_and_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(cache))
        yield tiny(corpus)


@contextlib.contextmanager
def at(folder: Path) -> Iterator[None]:
    """Work in `folder`, as a user does, with a cache of its own."""
    from llm_jax import runtime

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(folder / "cache"))
        patch.setattr(runtime, "start", lambda: None)  # the tests have a cache of compiled programs
        patch.chdir(folder)
        yield


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from command_line import fill

    folder = tmp_path_factory.mktemp("workspace")
    with at(folder):
        fill(folder)
    return folder


@pytest.fixture
def workspace(trained: Path) -> Iterator[Path]:
    """The working directory: a text, a recipe and a trained run (`command_line.py`)."""
    with at(trained):
        yield trained


@pytest.fixture
def output(workspace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a verb; return what it prints on standard output."""
    from llm_jax.cli.main import main

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def error(workspace: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a verb that fails; return its one line."""
    from llm_jax.cli.main import main

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("llm-jax: error: ")
        return line

    return run
