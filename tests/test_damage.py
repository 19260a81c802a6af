"""What is wrong with a file that was read is one line; what is not the file's fault is raised."""

import sys

import pytest

from llm_jax.runs.damage import attempt, gist


def failing(error: Exception):
    def read():
        raise error

    return read


def test_what_could_be_read_comes_without_a_complaint():
    assert attempt(lambda: 7) == (7, None)


def test_damage_is_a_line_and_not_an_error():
    error = ValueError("DATA_LOSS: crc32c mismatch.\n In a chunk of params/w")
    assert attempt(failing(error)) == (None, gist(error))
    assert "\n" not in gist(error)
    assert gist(OSError("reading x: No such file or directory [os_error_code=2]")) == "No such file or directory"
    assert gist(KeyError()) == "KeyError"


@pytest.mark.parametrize(
    "error", [MemoryError("all"), PermissionError("x"), RuntimeError("RESOURCE_EXHAUSTED: out of memory")], ids=repr
)
def test_what_other_bytes_would_not_change_is_raised(error: Exception):
    with pytest.raises(type(error)):
        attempt(failing(error))


def test_reads_that_are_abandoned_are_silent_and_later_errors_are_not():
    hook = sys.unraisablehook

    def read():
        assert sys.unraisablehook is not hook
        raise ValueError("damaged")

    assert attempt(read) == (None, "damaged")
    assert sys.unraisablehook is hook
