"""Accelerators by name: what is none says which there are, and a missing compiler how to install it."""

import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.plan import topology
from llm_jax.plan.topology import parse_topology


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", r"no topology is called 'v9:4x4'; known .*: v4:2x2x4, .*cpu:8$"),
        ("v5e", "a topology of v5e has 2 sizes, like v5e:4x4; got 'v5e'"),
        ("v5e:٤x4", "a topology of v5e has 2 sizes, like v5e:4x4; got"),
        ("cpu:1_0", "a topology of cpu has 1 sizes, like cpu:8; got"),
        ("cpu:999999", "cpu:999999 has 999,999 devices; use at most 100,000"),
        ("v5p:4x4", "a topology of v5p has 3 sizes, like v5p:2x2x4; got 'v5p:4x4'"),
        ("cpu:0", "a topology of cpu has 1 sizes"),
    ],
)
def test_a_topology_that_is_none_is_an_error_with_those_that_are(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_topology(name)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("v5e:4x4", r'pip install "jax\[tpu\]=='),
        ("h100:1x8", r"pip install --no-deps jax-cuda12-plugin==[\d.]+ jax-cuda12-pjrt=="),
    ],
)
def test_a_missing_compiler_is_an_error_with_the_line_that_installs_it(name: str, line: str, monkeypatch):
    def missing(package: str) -> str:
        raise topology.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(topology.importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=line):
        parse_topology(name).devices()


def test_a_shape_that_the_compiler_refuses_is_an_error_with_its_reason(monkeypatch):
    def refuse(_: topology.Topology) -> None:
        raise RuntimeError("INVALID_ARGUMENT: 3x3 is not divisible by 2x2\nand more")

    monkeypatch.setattr(topology, "_check_installed", lambda *_: None)
    monkeypatch.setattr(topology.Topology, "_described", refuse)
    with pytest.raises(ValueError, match=r"not know v5e:3x3: 3x3 is not divisible by 2x2; v5e:4x4 exists$"):
        parse_topology("v5e:3x3").devices()


def test_every_topology_that_an_error_names_is_one():
    for kind, chip in topology.CHIPS.items():
        assert parse_topology(chip.example).kind == kind


def test_reading_a_topology_does_not_start_jax():
    program = (
        "import sys; from llm_jax.plan import topology as t; t.parse_topology('cpu:8'); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1]).returncode == 0
