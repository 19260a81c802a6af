"""Settings of attention, positions and experts that can't be are refused, with a way out."""

import re
from typing import Any

import numpy as np
import pytest

from llm_jax.ops.config import Experts, Rotary, Sparse

ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"number": 1}, "model.experts.number=1 must be at least 2; for one expert set model.experts=none"),
    ({"active": 0}, "model.experts.active=0 must lie in [1, model.experts.number=8]"),
    ({"active": 9}, "model.experts.active=9 must lie in [1, model.experts.number=8]"),
    (
        {"active": 1},
        "model.experts.active=1 renormalised is always weighted 1, from which the router learns nothing; "
        "set model.experts.renormalise=false",
    ),
    ({"d_ff": 0}, "model.experts.d_ff=0 must be at least 1; none is the model's"),
    ({"shared": -1}, "model.experts.shared=-1 must not be negative; 0 is off"),
    ({"balance_weight": -0.1}, "model.experts.balance_weight=-0.1 must not be negative; 0 is off"),
    ({"bias_rate": -0.1}, "model.experts.bias_rate=-0.1 must not be negative; 0 is off"),
    ({"router_z_loss": -0.1}, "model.experts.router_z_loss=-0.1 must not be negative; 0 is off"),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message.split(";")[0] for _, message in ERRORS])
def test_a_setting_that_can_not_be_is_refused_with_a_way_out(changes: dict, message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Experts(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scaling": "yarn", "factor": 4.0}, "model.rotary.scaling=yarn needs model.rotary.original_len"),
        ({"fraction": 0.0}, r"model.rotary.fraction=0.0 must lie in \(0, 1\]"),
        ({"theta": -1.0}, "model.rotary.theta=-1.0 must be positive"),
        ({"scaling": "dynamic", "factor": 4.0}, "model.rotary.scaling=dynamic needs model.rotary.original_len"),
        ({"scaling": "longrope", "original_len": 8}, "model.rotary.short_factors has 0 numbers .* give both lists"),
        ({"long_factors": (1.0, 2.0)}, "model.rotary.long_factors has 2 numbers where model.rotary.scaling=none"),
        (
            {"scaling": "longrope", "original_len": 8, "short_factors": (1.0, 0.0), "long_factors": (1.0, 2.0)},
            "model.rotary.short_factors=0.0 must be positive",
        ),
        ({"scaling": "yarn", "original_len": 1}, "model.rotary.original_len=1 must be at least 2"),
        ({"low_turns": 4.0, "high_turns": 4.0}, "model.rotary.high_turns=4.0 must exceed model.rotary.low_turns=4.0"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Rotary(**changes)


def test_local_layers_have_a_theta_of_their_own_and_no_scaling():
    config = Rotary(theta=1e6, scaling="linear", factor=4.0, fraction=0.5, local_theta=100.0)
    assert config.local == Rotary(theta=100.0, fraction=0.5)
    assert Rotary().local == Rotary()


def test_random_blocks_are_as_many_as_asked_for_and_do_not_move():
    """Rows of a longer text begin as those of a shorter one, or a cache would change what was seen."""
    sparse = Sparse("bigbird", local=1, first=0, random=3)
    view = sparse.view(64)
    assert (view[:40, :40] == sparse.view(40)).all()
    assert (view[4:].sum(1) == 4).all()
    assert not np.triu(view, 1).any()
