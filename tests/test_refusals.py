"""Why a run stops, in words that say what to do."""

import errno
from pathlib import Path

import pytest

from llm_jax.runs.checkpoint import Checkpoints
from llm_jax.runs.refusals import check_layout, disk_failed, moved_away, not_saved


@pytest.fixture
def checkpoints(tmp_path: Path):
    with Checkpoints(tmp_path) as found:
        yield found


def test_a_resumed_run_may_change_how_it_is_computed_and_not_what():
    check_layout(Path("a"), {"mesh.fsdp": 2, "accumulate": 4, "model.attention.implementation": "chunked"})
    with pytest.raises(ValueError, match=r"optimizer.b1=0.8: a run resumes with its own config, .* init_from=a"):
        check_layout(Path("a"), {"mesh.fsdp": 2, "optimizer.b1": 0.8})


def test_what_a_disk_said_comes_with_the_way_to_resume(checkpoints: Checkpoints):
    named, unnamed = OSError(errno.ENOSPC, "No space left on device", "a/x"), OSError(errno.EIO, "Input/output error")
    assert str(disk_failed(Path("a"), named, checkpoints)) == (
        "a/x: No space left on device; there is no checkpoint yet; fix this, then start again"
    )
    assert str(disk_failed(Path("a"), unnamed, checkpoints)).startswith("a: Input/output error; ")


def test_a_run_that_was_moved_says_where_it_is(checkpoints: Checkpoints):
    said = str(moved_away(Path("a"), "b", checkpoints))
    assert said.startswith("a was moved or removed while its run trained; there is no checkpoint yet")
    assert said.endswith("continue with: llm-jax resume b, or llm_jax.resume('b')")
    assert "start anew" in str(not_saved(ValueError("w is not finite"), checkpoints))
