"""The train step on the twin skips a bad batch, as ours does. Its curves are compared in test_torch_twin.py."""

import dataclasses

import pytest
from grid import tiny, weights

torch = pytest.importorskip("torch")

from test_torch_twin import rows, run_of  # noqa: E402

from llm_jax.compat.torch_step import TorchStep  # noqa: E402
from llm_jax.compat.torch_twin import parameters  # noqa: E402


def test_a_bad_step_changes_nothing_and_the_rate_moves_on():
    step = TorchStep(run_of(tiny()), weights(tiny()), [1.0, 0.0])
    before = {path: parameter.clone() for path, parameter in parameters(step.twin).items()}
    step.twin.config = dataclasses.replace(tiny(), logit_scale=3e38)
    assert not step(rows())[0].isfinite()
    step.twin.config = tiny()
    step(rows())  # at the second rate, which is 0
    assert all(parameter.equal(before[path]) for path, parameter in parameters(step.twin).items())
