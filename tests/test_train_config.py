"""`RunConfig` refuses groups that do not fit each other, with the numbers of both and a value that works."""

import re
from typing import Any

import pytest
from grid import tiny

from llm_jax.config import replace
from llm_jax.data.config import DataConfig
from llm_jax.train.config import RunConfig

RUN = RunConfig(tiny(max_seq_len=32), DataConfig(seq_len=32, batch_size=6))

MISFITS: list[tuple[dict[str, Any], str]] = [
    ({"keep": 0}, "keep=0 must be at least 1"),
    ({"seed": -1}, "seed=-1 must lie between 0 and 4294967295"),
    ({"data.seed": 2**32}, "data.seed=4294967296 must lie between 0 and 4294967295"),
    ({"accumulate": 4}, "accumulate=4 does not divide data.batch_size=6; use data.batch_size=8"),
    ({"data.seq_len": 33}, "data.seq_len=33 exceeds model.max_seq_len=32; set data.seq_len=32, or of a new model"),
    ({"loss.chunk": 5}, "loss.chunk=5 does not divide data.seq_len=32"),
    ({"offload": "state", "optimizer.name": "adafactor"}, "offload=state updates a layer at a time, and adafactor's"),
    ({"model.n_classes": 2, "prompts": ()}, "model.n_classes=2, but the data has no classes; set model.n_classes=none"),
]


@pytest.mark.parametrize(("changes", "message"), MISFITS, ids=lambda x: x if isinstance(x, str) else None)
def test_groups_that_do_not_fit_each_other_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        replace(RUN, **changes)


def test_angles_that_depend_on_length_are_refused_for_packed_documents():
    """Otherwise the angles of a text would depend on what is packed beside it."""
    scaled = {"model.rotary.scaling": "dynamic", "model.rotary.factor": 2.0, "model.rotary.original_len": 16}
    with pytest.raises(ValueError, match=r"use data.seq_len=16, within which nothing is scaled, or data.packing=win"):
        replace(RUN, **scaled)
    for changes in ({"data.seq_len": 16}, {"data.packing": "windows"}):
        replace(RUN, **scaled | changes)
