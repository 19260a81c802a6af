"""`import llm_jax` gives the names that a user needs, and starts nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import llm_jax

SOURCE = Path(llm_jax.__file__)


def test_the_import_alone_starts_no_jax_and_takes_no_time():
    program = "import sys, time; t = time.process_time(); import llm_jax; t = time.process_time() - t; "
    program += "print('jax' in sys.modules, t)"
    said = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
        for _ in range(3)
    ]
    assert {started for started, _ in said} == {"False"}
    assert min(float(seconds) for _, seconds in said) < 0.1  # of CPU time, whatever else this machine does


@pytest.mark.parametrize("name", sorted(llm_jax._HOMES))
def test_every_public_name_is_there_and_explained(name: str):
    value = getattr(llm_jax, name)
    assert value.__doc__
    assert name in dir(llm_jax)


def test_editors_and_the_interpreter_find_the_same_names():
    block = next(node for node in ast.parse(SOURCE.read_text()).body if isinstance(node, ast.If))
    seen = {
        alias.asname: f"{node.module.removeprefix('llm_jax.')}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == llm_jax._HOMES


def test_a_name_that_is_none_is_refused_with_those_that_are():
    with pytest.raises(AttributeError, match=r"llm_jax has no 'fitt'; did you mean 'fit'\? it has .*fit"):
        _ = llm_jax.fitt
    with pytest.raises(AttributeError, match=r"llm_jax has no 'zzz'; it has AttentionConfig, "):
        _ = llm_jax.zzz
