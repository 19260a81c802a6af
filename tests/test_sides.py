"""Each side of a comparison is a process that ends with this one, and is named if it is killed."""

import os
import signal
import time
from pathlib import Path

import pytest
from test_compare import start

from llm_jax.compat.sides import Side


def test_a_side_that_is_killed_is_named():
    with Side("eager") as side:
        side._process.kill()
        with pytest.raises(ValueError, match=r"process of PyTorch was killed.*status -9"):
            side.train(1)


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_running(tmp_path: Path):
    pytest.importorskip("torch")
    process = start(tmp_path, "--no-compile", "--steps", "100000", steps=100000)
    try:
        assert process.stderr is not None
        assert any("PyTorch: compiles" in line for line in process.stderr)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err.strip().splitlines()[-1]) == (130, "llm-jax: error: interrupted")
        deadline = time.monotonic() + 10  # what has ended is still there until the system has noticed
        while there(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not there(process.pid)
    finally:
        if there(process.pid):  # a test that fails leaves nothing running either
            os.killpg(process.pid, signal.SIGKILL)


def there(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
