"""A search orders choices by arithmetic, compiles the best within its budget, and names the smallest change."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
from arrays import quiet
from test_plan import CPU, plans_folder, printed, tiny_config, tiny_plan

from llm_jax.config import override, replace
from llm_jax.plan import search, topology
from llm_jax.plan.plan import Plan, plan
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program


@pytest.fixture(autouse=True, scope="module")
def found_once() -> Iterator[None]:
    """All tests look at the choices of two configs; to find these takes most of the time."""
    original = search.choices
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "choices", functools.cache(lambda *given: list(original(*given))))
        yield


@pytest.fixture
def config() -> RunConfig:
    return tiny_config()


@pytest.fixture
def folder() -> Path:
    return plans_folder()


@pytest.fixture
def planned() -> Plan:
    return tiny_plan()


@pytest.mark.slow
def test_a_search_stays_within_its_budget_and_names_the_fastest_that_fits(config, folder):
    found = search.search(config, CPU, 2, folder=folder, report=quiet)
    assert not found.tried[0].choice.changes
    assert len(found.tried) <= 2 < found.considered
    assert found.fastest is not None
    assert found.fastest.seconds_a_token == min(one.seconds_a_token for one in found.tried)
    assert found.to_json()["fastest"] == found.fastest.choice.words
    assert found.to_json()["smallest"] == []


@pytest.mark.slow
def test_a_search_finds_the_smallest_change_that_makes_a_run_fit(config, folder, monkeypatch):
    whole = plan(config, CPU, folder=folder)
    tight = dataclasses.replace(CPU.chip, memory=whole.needed - 1)
    monkeypatch.setitem(topology.CHIPS, "cpu", tight)
    found = search.search(config, CPU, 3, folder=folder, report=quiet)
    assert not found.tried[0].fits
    assert found.smallest is not None
    assert found.smallest.choice.fields == 1


@pytest.mark.parametrize("budget", [100, 3])
def test_the_smallest_change_is_looked_for_though_a_larger_one_fits(config, planned, monkeypatch, budget: int):
    every = [one for one in search.choices(config, CPU) if one.changes]
    quick = min(every, key=lambda one: (one.seconds_a_token, one.fields))
    last = max((one for one in every if one.fields == 1), key=lambda one: one.seconds_a_token)
    assert quick.fields > 1

    def stub(config: RunConfig, *_: object) -> Plan:
        return dataclasses.replace(
            planned, needed=planned.limit + (config not in (quick.config, last.config)), seconds={"compute": 1e-9}
        )

    monkeypatch.setattr(search, "plan", stub)
    found = search.search(config, CPU, budget, report=quiet)
    assert found.smallest is not None
    known = budget == 100
    assert found.smallest.choice.changes == (last if known else quick).changes
    assert ("smallest change that makes it fit" in printed(found)) == known


@pytest.mark.slow
def test_choices_change_what_they_say_and_the_library_takes_them(config):
    of_mesh, split = {}, set()
    for choice in search.choices(config, CPU):
        mesh = search.mesh_sizes(choice.config.mesh, 8)
        of_mesh[tuple(mesh.values())] = choice.config
        split |= {axis for axis, size in mesh.items() if size > 1}
        assert (choice.fields > 0) == bool(choice.changes)
        assert replace(config, **choice.changes) == override(config, choice.words) == choice.config
    assert split == {"pipeline", "data", "fsdp", "context", "tensor"}  # it has no experts
    for changed in of_mesh.values():
        assert Program.on(changed, CPU.devices()).abstract_state


def quickest(config: RunConfig, *changes: str) -> dict[str, int]:
    """The mesh that arithmetic puts first."""
    every = search.choices(override(config, changes), CPU)
    return search.mesh_sizes(min(every, key=lambda one: (one.seconds_a_token, one.fields)).config.mesh, 8)


@pytest.mark.slow
def test_many_experts_call_for_the_expert_axis_and_long_rows_for_context(config):
    experts = ["model.layers=global+moe", "model.experts.number=8", "model.d_ff=4096"]
    assert quickest(config, *experts)["expert"] > 1
    long = ["model.max_seq_len=4096", "data.seq_len=4096", "data.batch_size=2", "model.n_kv_heads=1", "mesh.data=-1"]
    assert quickest(config, *long, "mesh.fsdp=1")["context"] >= 4


@pytest.mark.slow
def test_what_the_library_refuses_takes_no_compile(config, planned, monkeypatch):
    """Ulysses declines more devices than there are heads, which only attention itself knows."""
    split = override(config, ["model.attention.implementation=ulysses", "mesh.data=1", "mesh.context=2"])
    compiled = []

    def stub(config: RunConfig, *_: object) -> Plan:
        compiled.append(search.mesh_sizes(config.mesh, 8))
        return dataclasses.replace(planned, seconds={"compute": 1.0})

    monkeypatch.setattr(search, "plan", stub)
    refused = [one for one in search.choices(split, CPU) if one.config.mesh.context > 2]
    found = search.search(split, CPU, 20, report=quiet)
    assert refused
    assert len(found.tried) == 20
    assert all(one.plan is not None for one in found.tried)
    assert {mesh["context"] for mesh in compiled} == {1, 2}
