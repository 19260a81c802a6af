"""`llm-jax verify`: on every layout of eight devices a config trains as on one, and what does not is seen.

`python tests/test_verify.py` writes the tables of docs/parallelism.md from `golden/verify.json`.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from tiny_run import tiny

from llm_jax.config import override
from llm_jax.ops.position import Rotary
from llm_jax.plan.verify import (
    BOUNDS,
    WITH_TIES,
    Layout,
    Outcome,
    Verdict,
    bounds_of,
    gradient_gap,
    laid_out,
    layouts,
    like,
    shrunk,
    small_model,
    verdict_line,
    verdicts_to_json,
    verify,
)
from llm_jax.recipes import recipes
from llm_jax.runs.start import load_recipe
from llm_jax.train.config import RunConfig
from llm_jax.train.program import Program

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "parallelism.md", ROOT / "tests" / "golden" / "verify.json"
TINY = tiny(Path("nowhere"))
MIXTURE = ("model.layers=local,global+moe", "model.attention.window=8", "model.experts.number=8")


def verdicts(config: RunConfig, *wanted: Layout) -> list[Verdict]:
    return list(verify(config, wanted))


@pytest.mark.slow
def test_a_layout_is_held_to_one_device_and_what_can_not_be_says_why():
    same, never = verdicts(TINY, Layout(("fsdp", "tensor")), Layout(("pipeline",), {"pipeline.chunks": 3}))
    assert same.equal
    assert same.mesh == {"fsdp": 4, "tensor": 2}
    assert 0 < same.gaps["gradient"] < BOUNDS["gradient"]
    assert "pipeline.chunks=3" in verdict_line(never)
    assert verdicts_to_json([same])["layouts"][0]["equal"]


def test_a_gradient_that_is_a_little_wrong_is_seen():
    def given(one: float, another: float) -> Outcome:
        return Outcome(1.0, {"a": one * np.ones(9), "b": another * np.ones(9)}, np.ones((2, 2)))

    gaps = [gradient_gap(found, given(1, 0)) for found in (given(1, 0), given(1.0001, 0), given(1, 1e-10))]
    np.testing.assert_allclose(gaps, [0, 1e-4, 1e-6], rtol=1e-6)  # of one that is 0 but for rounding, a share of all
    verdict = Verdict("data", BOUNDS, {"data": 8}, {"loss": 0, "gradient": gaps[1], "curve": 0})
    assert "DIFFERENT" in verdict_line(verdict)


def test_only_the_curve_of_a_mixture_of_experts_has_a_wider_bound():
    gaps = {"loss": 0.0, "gradient": 0.0, "curve": 6e-4}
    dense, mixture = (bounds_of(override(TINY, words)) for words in ([], MIXTURE))
    assert not Verdict("data", dense, {}, gaps).equal
    assert Verdict("data", mixture, {}, gaps).equal
    assert not Verdict("data", mixture, {}, gaps | {"gradient": 6e-4}).equal


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_shrinks_to_a_model_of_its_own_kind(name: str):
    config = load_recipe(name)
    small = shrunk(config)
    assert small.model.layers == config.model.layers
    assert (small.model.K == 1, small.model.G == 1) == (config.model.K == 1, config.model.G == 1)
    for size in ("d_model", "vocab_size", "F", "K"):
        assert getattr(small.model, size) % 8 == getattr(config.model, size) % 8
    Program.on_one_device(small).abstract_state  # noqa: B018


def test_sizes_that_do_not_divide_here_do_not_divide_there():
    assert [like(n, 8) for n in (5, 8, 12, 30, 64)] == [5, 8, 12, 14, 8]
    uneven = override(TINY, ["model.n_heads=6", "model.n_kv_heads=6", "model.head_dim=8"])
    assert laid_out(shrunk(uneven), Layout(("tensor",))).mesh.shape["tensor"] == 2


def table() -> str:
    """The table of docs/parallelism.md."""
    rows = ["| layout | mesh | loss | gradient | 20 steps |", "|---|---|---|---|---|"]
    for found in json.loads(RESULTS.read_text())["layouts"]:
        mesh = " ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
        gaps = [f"{gap:.0e}" for gap in found["gaps"].values()] or ["", "", ""]
        rows.append(f"| {' | '.join([found['layout'], mesh or 'refused', *gaps])} |")
    return "\n".join(rows) + "\n"


PLACE = re.compile(r"(?<=<!-- begin table -->\n).*?(?=<!-- end table -->)", re.DOTALL)


def test_the_table_of_the_page_is_what_verify_found_of_every_layout():
    assert PLACE.findall(PAGE.read_text()) == [table()]
    found = json.loads(RESULTS.read_text())
    assert all(layout["equal"] and layout["bounds"] == WITH_TIES for layout in found["layouts"])
    assert [layout["layout"] for layout in found["layouts"]] == [str(layout) for layout in layouts()]


@pytest.mark.slow
@pytest.mark.parametrize("layout", layouts(), ids=str)
def test_every_layout_trains_as_one_device(layout: Layout):
    """Of a dense model, whose curves can be held closer; the table of the page is of a mixture."""
    experts = MIXTURE if "expert" in layout.axes else ()
    (verdict,) = verdicts(override(TINY, [*experts, "model.n_layers=8", "model.n_heads=8"]), layout)
    assert verdict.equal, verdict_line(verdict)


if __name__ == "__main__":
    PAGE.write_text(PLACE.sub(lambda _: table(), PAGE.read_text()))


def test_positions_that_depend_on_length_are_shrunk_to_both_of_their_cases():
    model = dataclasses.replace(
        load_recipe("quickstart").model,
        rotary=Rotary(
            scaling="longrope", original_len=128, factor=2.0, short_factors=(1.0,) * 16, long_factors=(2.0,) * 16
        ),
    )
    small = small_model(model, 32)
    assert len(small.rotary.short_factors) == len(small.rotary.long_factors) == small.H // 2
    assert small.rotary.original_len == 16 < small.max_seq_len
