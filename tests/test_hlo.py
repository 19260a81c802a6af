"""The text of a compiled program is read right, in the spellings of the compilers for CPU and TPU."""

import pytest

from llm_jax.plan import hlo

# Of a TPU: a windowed product whose loop is unrolled by two, and counts in a u32 from 0 to 8.
WINDOWED = """\
HloModule step, is_scheduled=true

%condition (p: (bf16[8,128], u32[], /*index=2*/u32[])) -> pred[] {
  %p = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}, /*index=2*/u32[]) parameter(0)
  %end = u32[]{:T(128)} constant(8)
  %i = u32[]{:T(128)} get-tuple-element(%p), index=1
  ROOT %less = pred[]{:T(512)} compare(%i, %end), direction=LT
}

%body (q: (bf16[8,128], u32[], /*index=2*/u32[])) -> (bf16[8,128], u32[], /*index=2*/u32[]) {
  %q = (bf16[8,128]{1,0:T(8,128)(2,1)}, u32[]{:T(128)}, /*index=2*/u32[]) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%q), index=0
  %j = u32[]{:T(128)} get-tuple-element(%q), index=1
  %other = u32[] get-tuple-element(%q), index=2
  %go = (bf16[8,128]{1,0}, bf16[8,128]{1,0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=4, \
source_target_pairs={{0,1},{1,2},{2,3},{3,0}}, metadata={op_name="jit(step)/layers/BLD,DF->BLF/dot_general"}
  %work = bf16[8,128]{1,0} fusion(%x), kind=kLoop, calls=%work.1, backend_config={"estimated_cycles":"100"}
  %got = bf16[8,128]{1,0} collective-permute-done(%go)
  %next = u32[]{:T(128)} add(%j, %two)
  ROOT %t = (bf16[8,128]{1,0}, u32[]{:T(128)}, /*index=2*/u32[]) tuple(%got, %next, %other)
}

%work.1 (a: bf16[8,128]) -> bf16[8,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  ROOT %twice = bf16[8,128]{1,0} add(%a, %a), backend_config={"estimated_cycles":"7"}
}

ENTRY %main (x: bf16[8,128]) -> bf16[8,128] {
  %x.1 = bf16[8,128]{1,0} parameter(0)
  %zero = u32[]{:T(128)} constant(0)
  %start = (bf16[8,128]{1,0}, u32[]{:T(128)}, /*index=2*/u32[]) tuple(%x.1, %zero, %zero)
  %loop = (bf16[8,128]{1,0}, u32[]{:T(128)}, /*index=2*/u32[]) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%loop), index=0
}
"""


def program(*lines: str, before: str = "") -> hlo.Module:
    """A program of one parameter `%x`, 1,024 bytes."""
    first = "ENTRY %main (x: f32[256]) -> f32[256] {\n  %x = f32[256]{0} parameter(0)\n"
    return hlo.parse(before + first + "".join(f"  {line}\n" for line in lines) + "}\n")


def only(module: hlo.Module, **mesh: int) -> hlo.Collective:
    (found,) = hlo.collectives(module, mesh)
    return found


def test_a_loop_runs_as_often_as_its_counter_needs_to_its_end():
    found = only(hlo.parse(WINDOWED), data=1, fsdp=4)
    assert (found.kind, found.axes, found.count, found.sent) == ("collective-permute", "fsdp", 4, 8 * 128 * 2)
    assert found.overlapped
    assert found.scope == "jit(step)/layers/BLD,DF->BLF/dot_general"


def test_cycles_are_those_of_what_is_scheduled_times_the_trips_of_its_loop():
    assert hlo.cycles(hlo.parse(WINDOWED)) == 4 * 100


@pytest.mark.parametrize(
    ("direction", "start", "end", "step", "times"),
    [
        ("LT", 0, 8, "add(%j, %two)", 4),
        ("LT", 0, 7, "add(%two, %j)", 4),
        ("LE", 0, 8, "add(%j, %two)", 5),
        ("LE", 0, 7, "add(%j, %two)", 4),
        ("GT", 8, 0, "subtract(%j, %two)", 4),
        ("GE", 8, 1, "subtract(%j, %two)", 4),
        ("NE", 2, 8, "add(%j, %two)", 3),
        ("NE", 1, 8, "add(%j, %two)", None),
        ("LT", 0, 8, "multiply(%j, %two)", None),
        ("GT", 0, 8, "add(%j, %two)", None),
        ("EQ", 0, 8, "add(%j, %two)", None),
    ],
)
def test_a_loop_counts_in_every_direction_or_as_unknown(direction: str, start: int, end: int, step: str, times: object):
    text = WINDOWED.replace("constant(0)", f"constant({start})").replace("add(%j, %two)", step)
    text = text.replace("%end = u32[]{:T(128)} constant(8)", f"%end = u32[]{{:T(128)}} constant({end})")
    ahead = text.replace("direction=LT", f"direction={direction}")
    assert only(hlo.parse(ahead), fsdp=4).count == times
    flipped = direction.translate(str.maketrans("LG", "GL"))
    swapped = text.replace("compare(%i, %end), direction=LT", f"compare(%end, %i), direction={flipped}")
    assert only(hlo.parse(swapped), fsdp=4).count == times


def test_a_loop_whose_start_is_known_at_run_time_is_in_no_total():
    dynamic = WINDOWED.replace("%zero = u32[]{:T(128)} constant(0)", "%zero = u32[]{:T(128)} custom-call(%x.1)")
    found = only(hlo.parse(dynamic), fsdp=4)
    assert found.count is None
    assert hlo.totals([found]) == {}
    assert hlo.cycles(hlo.parse(dynamic)) == 0


def test_a_collective_of_a_kind_that_is_not_known_is_an_error():
    with pytest.raises(ValueError, match=r"unknown collective collective-shuffle; give it a row in hlo\.SENT"):
        only(program("ROOT %y = f32[256]{0} collective-shuffle(%x), channel_id=1"), fsdp=4)


def test_a_trip_count_that_the_compiler_knows_is_taken_at_its_word():
    known = WINDOWED.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"3"}}')
    assert only(hlo.parse(known), fsdp=4).count == 3


@pytest.mark.parametrize(
    ("kind", "result", "sent"),
    [
        ("all-gather", 1024, 3 * 1024),
        ("reduce-scatter", 64, 3 / 4 * 1024),
        ("all-reduce", 256, 2 * 3 / 4 * 1024),
        ("all-to-all", 256, 3 / 4 * 1024),
    ],
)
def test_what_a_device_sends_follows_from_kind_and_size_of_its_group(kind: str, result: int, sent: float):
    line = f"ROOT %y = f32[{result}]{{0}} {kind}(%x), channel_id=1, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}"
    found = only(program(line), fsdp=4)
    assert (found.kind, found.devices, found.sent, found.overlapped) == (kind, 4, sent, False)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", "fsdp+tensor"),
        ("{{0,2},{1,3},{4,6},{5,7}}", "fsdp"),
        ("[4,2]<=[8]", "tensor"),
        ("[4,2]<=[2,4]T(1,0)", "data"),
        ("[2,4]<=[2,2,2]T(1,0,2)", "data+tensor"),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", "tensor"),
        ("mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_1'}", "data+fsdp"),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", "data"),
        ("{{0,1,2,3,4,5,6,7}}", "data+fsdp+tensor"),
        ("{{0,3},{1,2},{4,7},{5,6}}", ""),
    ],
)
def test_groups_in_every_spelling_are_told_by_the_axes_of_the_mesh(groups: str, axes: str):
    line = f"ROOT %y = f32[256]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"
    assert only(program(line), data=2, fsdp=2, tensor=2).axes == axes


def test_an_all_reduce_of_which_a_device_keeps_a_shard_is_a_reduce_scatter():
    fused = """\
%all-reduce-scatter.1 (a: f32[256]) -> f32[64] {
  %a = f32[256]{0} parameter(0)
  %sum = f32[256]{0} all-reduce(%a), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[64]{0} dynamic-slice(%sum), dynamic_slice_sizes={64}
}
"""
    found = only(program("ROOT %y = f32[64]{0} fusion(%x), calls=%all-reduce-scatter.1", before=fused), fsdp=4)
    assert (found.kind, found.sent, found.overlapped) == ("reduce-scatter", 3 / 4 * 1024, False)


def test_two_reduce_scatters_that_share_a_channel_are_two():
    fused = """\
%all-reduce-scatter.{n} (a: f32[256]) -> f32[64] {{
  %a = f32[256]{{0}} parameter(0)
  %sum = f32[256]{{0}} all-reduce(%a), channel_id=1, replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  ROOT %part = f32[64]{{0}} dynamic-slice(%sum), dynamic_slice_sizes={{64}}
}}
"""
    lines = [f"%y.{n} = f32[64]{{0}} fusion(%x), calls=%all-reduce-scatter.{n}" for n in range(2)]
    module = program(*lines, "ROOT %z = f32[256]{0} copy(%x)", before="".join(fused.format(n=n) for n in range(2)))
    assert [one.kind for one in hlo.collectives(module, {"fsdp": 4})] == ["reduce-scatter"] * 2


def test_a_chain_of_fusions_that_repeats_its_collective_sends_it_once():
    step = """\
%async_collective_fusion.{n} (a: f32[256]) -> f32[1024] {{
  %a = f32[256]{{0}} parameter(0)
  ROOT %all = f32[1024]{{0}} all-gather(%a), channel_id=9, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
}}
"""
    lines = [f"%y.{n} = f32[1024]{{0}} fusion(%x), calls=%async_collective_fusion.{n}" for n in range(3)]
    module = program(*lines, "ROOT %z = f32[256]{0} copy(%x)", before="".join(step.format(n=n) for n in range(3)))
    found = only(module, fsdp=4)
    assert (found.kind, found.count, found.sent, found.overlapped) == ("all-gather", 1, 3 * 1024, True)


def test_a_sum_over_the_network_is_an_all_reduce_of_the_axis_of_slices():
    how = '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"'
    send = "%s = (f32[256]{0}, u32[], token[]) send(%x, %t), channel_id=1, is_host_transfer=true"
    lines = ["%t = token[] after-all()", f"{send}, frontend_attributes={{{how}}}", "ROOT %d = token[] send-done(%s)"]
    found = only(program(*lines), data=2, fsdp=4)
    assert (found.kind, found.axes, found.devices, found.sent) == ("all-reduce", "data", 2, 1024)


def test_a_start_with_its_end_right_after_overlaps_with_nothing():
    between = "%w = f32[256]{0} fusion(%x), calls=%none"
    groups = "channel_id=1, replica_groups={{0,1}}, dimensions={0}"
    start = f"%s = (f32[256]{{0}}, f32[512]{{0}}) all-gather-start(%x), {groups}"
    done, empty = "ROOT %y = f32[512]{0} all-gather-done(%s)", "%none (a: f32[256]) -> f32[256] {\n}\n"
    assert not only(program(start, done, before=empty), fsdp=2).overlapped
    assert not only(program(start, done.removeprefix("ROOT "), between, before=empty), fsdp=2).overlapped
    assert only(program(start, between, done, before=empty), fsdp=2).overlapped


@pytest.mark.parametrize(
    ("array", "size"),
    [
        ("pred[3]", 3),
        ("s4[6]{0}", 3),
        ("bf16[8,128]{1,0:T(8,128)}", 2048),
        ("f8e4m3fn[2]", 2),
        ("c64[]", 8),
        ("token[]", 0),
    ],
)
def test_an_array_is_as_large_as_its_name_says(array: str, size: int):
    assert hlo.array_bytes(array) == size


def test_what_is_no_program_is_an_error_that_shows_it():
    with pytest.raises(ValueError, match="expected the text of a compiled module, got 'nothing'"):
        hlo.parse("nothing")
