"""A process that is alone gets its own values at once. Several are started in test_processes.py."""

import numpy as np
import pytest

from llm_jax import processes
from llm_jax.processes import group


def test_a_process_alone_is_first_and_keeps_its_values():
    assert processes.is_first()
    assert processes.count() == 1
    assert processes.from_first(lambda: 3) == 3
    assert processes.from_all("x") == ["x"]
    tree = {"a": np.ones(2)}
    assert processes.gathered(tree) is tree
    with processes.joined(None, None, None), processes.watched("start again"):
        pass


def test_an_error_of_a_process_alone_is_its_own():
    def fail() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        processes.from_first(fail)


def test_each_thing_done_together_has_a_name_of_its_own():
    assert group.next_name() != group.next_name()
