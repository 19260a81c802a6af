"""What a device sends with nothing computed beside it is what it waits for."""

import pytest

from llm_jax.plan import hlo
from llm_jax.plan.topology import parse_topology
from llm_jax.plan.traffic import traffic_of

# Two gathers over `tensor` of 1 and 3 kB each a shard; a product runs while the first is on its way.
TEXT = """\
%twice (a: f32[256]) -> f32[256] {
  %a = f32[256]{0} parameter(0)
  ROOT %b = f32[256]{0} add(%a, %a)
}

ENTRY %main (x: f32[256], y: f32[768]) -> f32[3072] {
  %x = f32[256]{0} parameter(0)
  %y = f32[768]{0} parameter(1)
  %go = (f32[256]{0}, f32[1024]{0}) all-gather-start(%x), channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}
  %work = f32[256]{0} fusion(%x), kind=kLoop, calls=%twice
  %done = f32[1024]{0} all-gather-done(%go)
  ROOT %all = f32[3072]{0} all-gather(%y), channel_id=2, replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def test_a_device_waits_for_what_has_nothing_computed_beside_it():
    mesh, four = {"fsdp": 1, "tensor": 4}, parse_topology("v5e:2x2")
    (found,) = traffic_of(hlo.collectives(hlo.parse(TEXT), mesh), mesh, four)
    assert (found.count, found.bytes, found.overlapped) == (2, 3 * 4096, 3 * 1024)
    assert found.seconds == found.bytes / four.chip.link_rate
    assert found.waited == pytest.approx(3 / 4 * found.seconds)
