"""What compiles for long is said, with its seconds, and whether the cache had it; what is fast is not."""

import io
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from llm_jax.runs import compiling
from llm_jax.runs.compiling import COMPILED, HIT, LOWERED, TRACED, told


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


CACHE = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[None]:
    """An empty cache of compiled programs, which takes programs of any size."""
    before = {name: getattr(jax.config, name) for name in CACHE}
    for values in (CACHE | {"jax_compilation_cache_dir": str(tmp_path)}, before):
        compilation_cache.reset_cache()
        for name, value in values.items():
            jax.config.update(name, value)
        if values is not before:
            yield


@pytest.mark.usefixtures("cache")
def test_a_program_is_named_with_its_seconds_and_where_it_came_from(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiling, "PATIENCE", 0.0)
    console = Console(file=io.StringIO())

    def ours(x: jax.Array) -> jax.Array:
        return jnp.sin(x) * 3

    with told(console):
        jax.jit(ours)(1.0)
        jax.clear_caches()
        jax.jit(ours)(1.0)
    jax.jit(lambda x: x + 2)(1.0)  # nobody listens any more
    found = [line for line in lines(console) if " ours " in line]
    assert [line.rpartition(" s, ")[2] for line in found] == ["anew", "from the cache"]


def said(seconds: dict[str, float], *, terminal: bool = False, cached: bool = False, wait: float = 0.0) -> list[str]:
    """The lines of a program whose events are these."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
    watch = compiling._Watch(console)
    watch.duration(TRACED, seconds["trace"], fun_name="train_step")
    watch.duration(LOWERED, 0.1, fun_name="jit(train_step)")
    time.sleep(wait)
    if cached:
        watch.event(HIT)
    watch.duration(COMPILED, seconds["compile"], fun_name="jit(train_step)")
    return lines(console)


def test_what_takes_less_than_a_second_is_not_worth_a_line():
    assert said({"trace": 0.3, "compile": 0.5}) == said({"trace": 0.3, "compile": 0.5}, terminal=True) == []


def test_tracing_and_lowering_count_too_and_a_log_gets_one_line():
    assert said({"trace": 0.8, "compile": 12.34}) == ["compiled train_step in 13.2 s, anew"]
    assert said({"trace": 1.1, "compile": 0.2}, cached=True) == ["compiled train_step in 1.4 s, from the cache"]


def test_on_a_terminal_a_line_comes_while_it_compiles():
    found = said({"trace": 1.5, "compile": 4.0}, terminal=True, wait=0.2)
    assert found == ["compiling train_step ...", "compiled train_step in 5.6 s, anew"]
