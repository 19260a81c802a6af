"""`llm-jax check`: what is right is right, and what is wrong is named, with the public report that fits."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from test_runtime import printed
from tiny_run import tiny

from llm_jax import runtime
from llm_jax.plan.check import BOUND, CASES, Case, Finding, finding_line, findings_to_json, one_of_each_kind, run_case

ROOT = Path(__file__).parents[1]
TINY = tiny(Path("nowhere"))


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_every_piece_of_a_step_is_what_numpy_computes(norm: str):
    config = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, norm=norm))
    cases = CASES if norm == "rmsnorm" else {"norm": CASES["norm"]}
    for what, make in cases.items():
        case = dataclasses.replace(make(np.random.default_rng(0), config), calls=1)
        found = run_case(jax.devices()[0], what, case)
        assert found.right, finding_line(found)
        assert found.report is None


def test_an_error_above_the_bound_is_wrong_and_names_its_report():
    x = np.arange(1, 9, dtype=np.float32)
    case = Case(lambda x: x.at[7].multiply(1 + 3 * BOUND), (x,), x.astype(np.float64))
    found = run_case(jax.devices()[0], "sums of rows", case)
    assert not found.right
    assert "WRONG, as jax#39103 says" in finding_line(found)
    assert not Finding("cpu", "norm", float("nan"), 0.0, BOUND).right


def test_a_device_of_every_kind_is_checked_once():
    assert [device.platform for device in one_of_each_kind()] == ["cpu"]  # of the eight


UNGUARDED = """
import jax
from llm_jax.plan import check
config = None
for what in check.KNOWN:
    case = check.CASES[what](check.np.random.default_rng(0), config)
    print(check.finding_line(check.run_case(jax.devices()[0], what, case)))
print(*check.about(), sep="\\n")
"""


@pytest.mark.slow
@pytest.mark.skipif(not runtime.known_faults(), reason="this jaxlib has no known fault")
def test_a_compiler_that_is_not_guarded_is_found_out():
    out, _ = printed(UNGUARDED, JAX_PLATFORMS="cpu", XLA_FLAGS=f"{runtime.FUSIONS}=reduce")
    known = [fault.reports for fault in runtime.known_faults()]
    assert all(f"({reports}): NOT GUARDED" in out for reports in known)
    assert "WRONG, as jax#39103 says" in out or "jax#39103" not in known  # the other depends on how threads meet


def test_everything_is_there_for_machines():
    written = findings_to_json([Finding("cpu", "norm", 1e-7, 2e-7, BOUND), Finding("cpu", "loss", 1.0, None, BOUND)])
    assert [finding["right"] for finding in written["findings"]] == [True, False]
    assert all(fault["guarded"] for fault in written["known_faults"])
    assert json.loads(json.dumps(written)) == json.loads(json.dumps(written))
