"""A plan says of a run on other devices what the compiler and arithmetic know, and they agree."""

import atexit
import dataclasses
import functools
import importlib.util
import io
import shutil
import tempfile
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from tiny_run import tiny

from llm_jax import runtime
from llm_jax.config import override
from llm_jax.plan.plan import BELOW_RESOLUTION, Figures, Plan, figures, plan, too_large
from llm_jax.plan.topology import parse_topology
from llm_jax.sharding import MeshConfig
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

CPU = parse_topology("cpu:8")


def printed(page: RenderableType) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(page)
    return console.export_text()


@functools.cache
def tiny_config() -> RunConfig:
    return dataclasses.replace(tiny(Path("nowhere")), mesh=MeshConfig(data=2, fsdp=4), accumulate=1)


@functools.cache
def plans_folder() -> Path:
    """Compiled plans, for all tests of a session."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return folder


@functools.cache
def tiny_plan() -> Plan:
    return plan(tiny_config(), CPU, price=2.0, folder=plans_folder())


@pytest.fixture
def config() -> RunConfig:
    return tiny_config()


@pytest.fixture
def folder() -> Path:
    return plans_folder()


@pytest.fixture
def planned() -> Plan:
    return tiny_plan()


def test_the_state_by_arithmetic_is_that_of_the_compiled_arguments(config, planned):
    memory = Program.on(config, CPU.devices()).lowered().compile().memory_analysis()
    assert memory is not None
    weights = sum(planned.parameters.values())
    batch = 4 * config.data.batch_size // 8 * config.data.seq_len * 4  # tokens, targets, segments, positions
    assert weights + planned.optimizer + batch + 4 == planned.arguments == memory.argument_size_in_bytes
    assert planned.temporary == memory.temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert planned.needed == planned.arguments + planned.temporary + new
    assert planned.peak == planned.needed  # of a CPU nobody knows it; what JAX 0.12 says leaves temporaries out
    assert "peak" not in printed(planned).partition("weights, by path")[0]


def test_temporaries_read_from_the_program_are_near_the_compilers_count(planned):
    assert 0.5 < sum(planned.temporaries.values()) / planned.temporary < 1.5
    assert any("attention" in place for place in planned.temporaries)


def test_a_step_takes_at_least_its_slowest_of_compute_memory_communication(planned):
    assert planned.traffic is not None
    assert planned.seconds["communication"] == pytest.approx(
        sum(one.bytes for one in planned.traffic) / CPU.chip.link_rate
    )
    known = dataclasses.replace(planned, seconds={"compute": 2.0, "memory": 0.5, "communication": 3.0})
    assert (known.tokens, known.chips, known.price) == (512, 8, 2.0)
    assert known.step_seconds == 3
    assert known.tokens_per_day == 14_745_600
    assert known.cost == pytest.approx(26_041.67)  # 1,627.6 hours of 8 chips


def test_of_a_small_program_nothing_is_said_that_the_compiler_can_not_tell(planned):
    small = dataclasses.replace(planned, topology="v5e:2x4", needed=52, peak=52, temporary=7, seconds={"compute": 1e-6})
    page = printed(small)
    assert page.count(BELOW_RESOLUTION) == 2
    assert "52 B" not in page
    assert "batch" not in page
    assert "temporary" not in page
    assert (small.tokens_per_day, small.cost) == (None, None)
    large = dataclasses.replace(small, needed=4 * 10**9, peak=3 * 10**9, seconds={"compute": 1.0})
    assert BELOW_RESOLUTION not in printed(large)
    assert "4 GB allocated of 4.29 GB, 3 GB in use at the peak" in printed(large)
    assert large.tokens_per_day == 512 * 24 * 3600


def test_collectives_that_nobody_can_count_are_said_and_not_left_out(planned):
    assert planned.more == 0
    assert "3 more in loops" in printed(dataclasses.replace(planned, more=3))


def test_what_was_compiled_once_is_read_from_the_cache(config, planned, folder, monkeypatch):
    monkeypatch.setattr("llm_jax.plan.plan._compiled", None)
    again = figures(Program.on(config, CPU.devices()), CPU, folder)
    assert again.temporary == planned.temporary
    with pytest.raises(TypeError):  # another program
        figures(Program.on(override(config, ["model.n_layers=1"]), CPU.devices()), CPU, folder)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--another=compiler")
    with pytest.raises(TypeError):
        figures(Program.on(config, CPU.devices()), CPU, folder)


def test_of_a_program_that_is_too_large_nothing_is_said_that_is_not_known(config, tmp_path, monkeypatch):
    monkeypatch.setattr("llm_jax.plan.plan._compiled", lambda *_: Figures(1, 2, 3, 3, finished=False, text=""))
    found = plan(config, CPU, price=2.0, folder=tmp_path)
    assert (found.fits, found.traffic, found.step_seconds, found.tokens_per_day, found.cost) == (False, *[None] * 4)
    assert set(found.seconds) == {"compute", "memory"}
    assert "a day" not in printed(found)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
            "Used 22.36G of 15.75G hbm. Exceeded hbm capacity by 6.61G.",
            int(22.36 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: CompileTimeHbmOom: the total memory required for HLO temporaries (18.32G) exceeds "
            "available HBM (15.75G)",
            int(18.32 * 2**30),
        ),
    ],
)
def test_a_program_too_large_is_what_it_would_have_needed(message: str, needed: int):
    assert too_large(message) == needed


def test_a_kernel_too_large_for_the_memory_on_the_chip_is_an_error():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 22.36M of 16.00M vmem. Exceeded vmem "
        "capacity by 6.36M.\n\nProgram vmem requirement 22.36M"
    )
    with pytest.raises(ValueError, match=r"refuses the program: Ran out of memory in memory space vmem\. .* 6\.36M\.$"):
        too_large(message)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPU is not installed")
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1"])
def test_a_plan_for_a_tpu_agrees_with_its_compiler(name: str, config, folder):
    topology = parse_topology(name)
    runtime.start(topology=topology)
    small = override(config, ["mesh.data=1", "mesh.fsdp=4", "model.d_model=256", "model.d_ff=512"])
    found = plan(small, topology, folder=folder)
    assert found.fits
    assert found.cycles > 0
    assert found.traffic
    assert "tensor" not in {one.axes for one in found.traffic}
    state = sum(found.parameters.values()) + found.optimizer
    assert found.arguments == pytest.approx(state, rel=0.05)  # a TPU pads small arrays to its tiles
