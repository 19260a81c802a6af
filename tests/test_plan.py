"""A plan says of a run on other devices what the compiler and arithmetic know, and they agree."""

import dataclasses
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from tiny_run import tiny

from llm_jax.cli.main import main
from llm_jax.config import override
from llm_jax.plan import hlo, search, topology
from llm_jax.plan.estimate import flops_a_token, gradient_bytes, numbers_here, rate_along
from llm_jax.plan.plan import UNTOLD, Figures, Plan, bytes_here, figures, plan, render, too_large, traffic_of
from llm_jax.plan.topology import parse_topology
from llm_jax.sharding import MeshConfig
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

CPU = parse_topology("cpu:8")


def printed(page: RenderableType) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(page)
    return console.export_text()


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return dataclasses.replace(tiny(Path("nowhere")), mesh=MeshConfig(data=2, fsdp=4), accumulate=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="module")
def planned(config: RunConfig, folder: Path) -> Plan:
    return plan(config, CPU, price=2.0, folder=folder)


def test_the_arithmetic_of_the_state_is_what_the_compiler_says_of_the_arguments(config, planned):
    memory = Program.on(config, CPU.devices()).lowered().compile().memory_analysis()
    assert memory is not None
    weights = sum(planned.parameters.values())
    batch = 4 * config.data.batch_size // 8 * config.data.seq_len * 4  # tokens, targets, segments, positions
    assert weights + planned.optimizer + batch + 4 == planned.arguments == memory.argument_size_in_bytes
    assert planned.temporary == memory.temp_size_in_bytes
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert planned.needed == planned.arguments + planned.temporary + new
    assert planned.peak == planned.needed  # of a CPU nobody knows it; what JAX 0.12 says leaves temporaries out
    assert "peak" not in printed(render(planned)).partition("weights, by path")[0]


def test_temporaries_read_from_the_program_are_about_what_the_compiler_needs(planned):
    assert 0.5 < sum(planned.temporaries.values()) / planned.temporary < 1.5
    assert any("attention" in place for place in planned.temporaries)


def test_a_step_at_best_takes_as_long_as_the_slowest_of_compute_memory_and_wire(planned):
    assert planned.traffic is not None
    assert planned.seconds["wire"] == pytest.approx(sum(one.bytes for one in planned.traffic) / CPU.chip.wire)
    known = dataclasses.replace(planned, seconds={"compute": 2.0, "memory": 0.5, "wire": 3.0})
    assert (known.tokens, known.chips, known.price) == (512, 8, 2.0)
    assert known.step_seconds == 3
    assert known.tokens_per_day == 14_745_600
    assert known.cost == pytest.approx(26_041.67)  # 1,627.6 hours of 8 chips


def test_of_a_small_program_nothing_is_said_that_the_compiler_can_not_tell(planned):
    small = dataclasses.replace(planned, topology="v5e:2x4", needed=52, peak=52, temporary=7, seconds={"compute": 1e-6})
    page = printed(render(small))
    assert page.count(UNTOLD) == 2
    assert "52 B" not in page
    assert "batch" not in page
    assert "temporary" not in page
    assert (small.tokens_per_day, small.cost) == (None, None)
    large = dataclasses.replace(small, needed=4 * 10**9, peak=3 * 10**9, seconds={"compute": 1.0})
    assert UNTOLD not in printed(render(large))
    assert "4 GB set apart of 4.29 GB, 3 GB in use at the peak" in printed(render(large))
    assert large.tokens_per_day == 512 * 24 * 3600


def test_collectives_that_nobody_can_count_are_said_and_not_left_out(planned):
    assert planned.more == 0
    assert "3 more in loops" in printed(render(dataclasses.replace(planned, more=3)))


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
    assert "a day" not in printed(render(found))


def test_what_a_device_holds_of_the_parameters_is_the_same_by_letters_as_by_shardings(config):
    experts = [
        "model.layers=global+moe",
        "model.experts.number=4",
        "mesh.data=1",
        "mesh.fsdp=2",
        "mesh.expert=2",
        "mesh.tensor=2",
    ]
    program = Program.on(override(config, experts), CPU.devices())
    params = program.abstract_state.params
    assert 4 * numbers_here(params, program.mesh.shape) == bytes_here(params)


def test_gradients_are_float32_where_microbatches_add_up(config):
    half = override(config, ["model.dtype=bfloat16"])
    alone, stages = {"pipeline": 1}, {"pipeline": 2}
    assert gradient_bytes(half, alone) == 2
    assert gradient_bytes(half, stages) == gradient_bytes(override(half, ["accumulate=2"]), alone) == 4


def test_only_stages_that_there_are_compute_their_layers_again(config):
    left = override(config, ["mesh.data=1", "mesh.pipeline=-1"])
    one, two = (flops_a_token(left, {"pipeline": stages}) for stages in (1, 2))
    assert one["with recomputation"] == one["model"]
    head = 6 * config.model.vocab_size * config.model.d_model
    assert two["with recomputation"] == pytest.approx(one["model"] + (one["model"] - head) / 3)


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


def test_a_kernel_too_large_for_the_memory_on_the_chip_is_an_error_and_no_program_of_few_bytes():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 22.36M of 16.00M vmem. Exceeded vmem "
        "capacity by 6.36M.\n\nProgram vmem requirement 22.36M"
    )
    with pytest.raises(ValueError, match=r"refuses the program: Ran out of memory in memory space vmem\. .* 6\.36M\.$"):
        too_large(message)


def test_bytes_between_slices_go_at_the_rate_of_their_network():
    two = parse_topology("v5e:2x2", slices=2)
    assert (two.n_devices, two.island, str(two)) == (8, 4, "2 slices of v5e:2x2")
    text = """\
ENTRY %main (x: f32[256]) -> f32[256] {
  %x = f32[256]{0} parameter(0)
  %a = f32[256]{0} all-reduce(%x), channel_id=1, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %b = f32[256]{0} all-reduce(%a), channel_id=2, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}
"""
    mesh = {"data": 2, "fsdp": 4}
    found = {one.axes: one for one in traffic_of(hlo.collectives(hlo.parse(text), mesh), mesh, two)}
    assert found["data"].seconds == found["data"].bytes / two.chip.between
    assert found["fsdp"].seconds == found["fsdp"].bytes / two.chip.wire
    assert rate_along(["fsdp"], {"data": 1, "fsdp": 8}, two) == two.chip.between
    assert rate_along(["data"], {"data": 1, "fsdp": 8}, two) == two.chip.wire


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:4x4", r"no topology is called 'v9:4x4'; known .*: v4:2x2x4, .*cpu:8$"),
        ("v5e", "a topology of v5e is 2 sizes, as v5e:4x4; got 'v5e'"),
        ("v5e:٤x4", "a topology of v5e is 2 sizes, as v5e:4x4; got"),
        ("cpu:1_0", "a topology of cpu is 1 sizes, as cpu:8; got"),
        ("cpu:999999", "cpu:999999 has 999,999 devices, and no more than 100,000 are planned for"),
        ("v5p:4x4", "a topology of v5p is 3 sizes, as v5p:2x2x4; got 'v5p:4x4'"),
        ("cpu:0", "a topology of cpu is 1 sizes"),
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
def test_a_compiler_that_is_missing_is_an_error_with_the_line_that_installs_it(name: str, line: str, monkeypatch):
    def missing(package: str) -> str:
        raise topology.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(topology.importlib.metadata, "version", missing)
    with pytest.raises(ValueError, match=line):
        parse_topology(name).devices()


def test_a_shape_that_the_compiler_refuses_is_an_error_with_its_reason_and_an_example(monkeypatch):
    def refuse(_: topology.Topology) -> None:
        raise RuntimeError("INVALID_ARGUMENT: 3x3 is not divisible by 2x2\nand more")

    monkeypatch.setattr(topology, "_check_installed", lambda *_: None)
    monkeypatch.setattr(topology.Topology, "_described", refuse)
    with pytest.raises(ValueError, match=r"no v5e:3x3: 3x3 is not divisible by 2x2; v5e:4x4 is one that there is$"):
        parse_topology("v5e:3x3").devices()


def test_every_topology_that_an_error_names_is_one():
    for kind, chip in topology.CHIPS.items():
        assert parse_topology(chip.example).kind == kind


@pytest.mark.slow
def test_a_search_compiles_within_its_budget_and_names_the_fastest_that_fits(config, folder):
    found = search.search(config, CPU, 2, folder=folder, report=lambda _: None)
    assert found.tried[0].choice.changes == ()
    assert len(found.tried) <= 2 < found.considered
    assert found.fastest is not None
    assert found.fastest.seconds_a_token == min(one.seconds_a_token for one in found.tried)
    assert search.as_json(found)["fastest"] == list(found.fastest.choice.changes)
    assert search.as_json(found)["smallest"] == []


@pytest.mark.slow
def test_of_a_run_that_does_not_fit_a_search_finds_the_smallest_change_that_makes_it(config, folder, monkeypatch):
    whole = plan(config, CPU, folder=folder)
    tight = dataclasses.replace(CPU.chip, memory=whole.needed - 1)
    monkeypatch.setitem(topology.CHIPS, "cpu", tight)
    found = search.search(config, CPU, 3, folder=folder, report=lambda _: None)
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
    found = search.search(config, CPU, budget, report=lambda _: None)
    assert found.smallest is not None
    known = budget == 100
    assert found.smallest.choice.changes == (last if known else quick).changes
    assert ("smallest change that makes it fit" in printed(search.render(found))) == known


def test_choices_change_what_they_say_and_the_library_takes_them(config):
    of_mesh, split = {}, set()
    for choice in search.choices(config, CPU):
        mesh = search.mesh_sizes(choice.config.mesh, 8)
        of_mesh[tuple(mesh.values())] = choice.config
        split |= {axis for axis, size in mesh.items() if size > 1}
        assert (choice.fields > 0) == bool(choice.changes)
        assert override(config, choice.changes) == choice.config
    assert split == {"pipeline", "data", "fsdp", "context", "tensor"}  # it has no experts
    for changed in of_mesh.values():
        assert Program.on(changed, CPU.devices()).abstract_state


def quickest(config: RunConfig, *changes: str) -> dict[str, int]:
    """The mesh that arithmetic puts first."""
    every = search.choices(override(config, changes), CPU)
    return search.mesh_sizes(min(every, key=lambda one: (one.seconds_a_token, one.fields)).config.mesh, 8)


def test_most_parameters_in_experts_ask_for_expert_and_long_rows_for_context(config):
    experts = ["model.layers=global+moe", "model.experts.number=8", "model.d_ff=4096"]
    assert quickest(config, *experts)["expert"] > 1
    long = ["model.max_seq_len=4096", "data.seq_len=4096", "data.batch_size=2", "model.n_kv_heads=1", "mesh.data=-1"]
    assert quickest(config, *long, "mesh.fsdp=1")["context"] >= 4


def test_what_the_library_refuses_takes_no_compile(config, planned, monkeypatch):
    """Ulysses declines more devices than there are heads, which only attention itself knows."""
    split = override(config, ["model.attention.implementation=ulysses", "mesh.data=1", "mesh.context=2"])
    compiled = []

    def stub(config: RunConfig, *_: object) -> Plan:
        compiled.append(search.mesh_sizes(config.mesh, 8))
        return dataclasses.replace(planned, seconds={"compute": 1.0})

    monkeypatch.setattr(search, "plan", stub)
    refused = [one for one in search.choices(split, CPU) if one.config.mesh.context > 2]
    found = search.search(split, CPU, 20, report=lambda _: None)
    assert refused
    assert len(found.tried) == 20
    assert all(one.plan is not None for one in found.tried)
    assert {mesh["context"] for mesh in compiled} == {1, 2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--compiles", "3"], "--compiles 3 says how many --search may take; add --search"),
        (["--search", "--compiles", "0"], "--compiles 0 .* at least 1"),
        (["--price", "-1"], "--price -1.0 is that of a chip an hour, at least 0"),
    ],
)
def test_options_that_mean_nothing_are_refused(words: list[str], message: str, capsys):
    assert main(["plan", "quickstart", "--topology", "cpu:8", *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_verb_prints_its_plan_for_machines(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    recipe = Path(__file__).parents[1] / "configs" / "quickstart.py"
    small = ["model.n_layers=1", "model.d_model=32", "model.vocab_size=264", "data.batch_size=8", "data.seq_len=32"]
    argv = ["plan", str(recipe), "--topology", "cpu:8", *small, "--json"]
    assert main(argv) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["fits"]
    assert written["devices"] == 8
    assert {"parameters", "traffic", "seconds", "tokens_per_day"} <= set(written)
    assert main([*argv[:-1]]) == 0
    assert "fits" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPU is not installed")
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1"])
def test_a_plan_for_a_tpu_agrees_with_its_compiler(name: str, config, folder):
    topology = parse_topology(name)
    topology.prepare()
    small = override(config, ["mesh.data=1", "mesh.fsdp=4", "model.d_model=256", "model.d_ff=512"])
    found = plan(small, topology, folder=folder)
    assert found.fits
    assert found.cycles > 0
    assert found.traffic
    assert "tensor" not in {one.axes for one in found.traffic}
    state = sum(found.parameters.values()) + found.optimizer
    assert found.arguments == pytest.approx(state, rel=0.05)  # a TPU pads small arrays to its tiles


def test_reading_a_topology_does_not_start_jax():
    program = (
        "import sys; from llm_jax.plan import topology as t; t.parse_topology('cpu:8'); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1]).returncode == 0
