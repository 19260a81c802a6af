"""A table by path: its first row that matches counts, and a path without one is an error."""

import pytest

from llm_jax.paths import first_match


def test_the_first_row_that_matches_wins():
    rows = [(r"b_\w+$", 1), (r"layers", 2), (r"", 3)]
    found = [first_match(rows, path) for path in ("layers/b_q", "layers/w_q", "b_q/table")]
    assert found == [1, 2, 3]


def test_a_path_without_a_row_raises_and_is_named():
    with pytest.raises(ValueError, match="no row matches 'layers/new'; add one to the table of 1 rows"):
        first_match([("w_q", 1)], "layers/new")
