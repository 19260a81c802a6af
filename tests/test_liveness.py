"""What a compiled program holds in memory at its peak is read from the order of its instructions."""

from test_hlo import WINDOWED, program

from llm_jax.plan import hlo, liveness


def test_temporaries_are_counted_while_something_still_reads_them():
    module = program(
        '%a = f32[512]{0} broadcast(%x), metadata={op_name="a"}',
        '%b = f32[128]{0} slice(%a), metadata={op_name="b"}',  # a and b live: 2,560 bytes
        '%c = f32[256]{0} broadcast(%b), metadata={op_name="c"}',
        '%near = f32[4096]{0:S(1)} broadcast(%c), metadata={op_name="on the chip"}',
        "ROOT %d = f32[256]{0} add(%c, %x)",
    )
    assert liveness.live(module) == {"a": 2048, "b": 512}


def test_one_part_of_a_tuple_does_not_keep_the_others():
    module = program(
        '%a = f32[512]{0} broadcast(%x), metadata={op_name="a"}',
        '%b = f32[128]{0} slice(%x), metadata={op_name="b"}',
        "%both = (f32[512]{0}, f32[128]{0}) tuple(%a, %b)",
        "%first = f32[512]{0} get-tuple-element(%both), index=0",
        '%c = f32[256]{0} slice(%first), metadata={op_name="c"}',  # a, b and c live
        '%d = f32[384]{0} broadcast(%c), metadata={op_name="d"}',  # a no more
        "%second = f32[128]{0} get-tuple-element(%both), index=1",
        "ROOT %e = f32[256]{0} fusion(%second, %d), calls=%none",
        before="%none (a: f32[256]) -> f32[256] {\n}\n",
    )
    assert liveness.live(module) == {"a": 2048, "b": 512, "c": 1024}


def test_a_loop_works_in_place_and_a_result_is_not_temporary():
    received = beside = 8 * 128 * 2
    assert liveness.live(hlo.parse(WINDOWED)).total() == received + beside


def test_zeros_that_a_loop_fills_are_called_by_what_fills_them():
    metadata = ', metadata={op_name="step/layers/while/body/update"}'
    body = """\
%condition (p: (f32[256])) -> pred[] {
  %p = (f32[256]{0}) parameter(0)
  ROOT %go = pred[] constant(true)
}

%body (q: (f32[256])) -> (f32[256]) {
  %q = (f32[256]{0}) parameter(0)
  %old = f32[256]{0} get-tuple-element(%q), index=0
  %new = f32[256]{0} negate(%old)METADATA
  ROOT %t = (f32[256]{0}) tuple(%new)
}

""".replace("METADATA", metadata)
    module = program(
        '%zeros = f32[256]{0} broadcast(%x), metadata={op_name="broadcast.7"}',
        "%start = (f32[256]{0}) tuple(%zeros)",
        "%loop = (f32[256]{0}) while(%start), condition=%condition, body=%body",
        "%full = f32[256]{0} get-tuple-element(%loop), index=0",
        "ROOT %y = f32[64]{0} slice(%full)",
        before=body,
    )
    assert set(liveness.live(module)) == {"step/layers/while/body/update"}
