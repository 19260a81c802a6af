"""Tables by path: `(regex, value)` rows, of which the first that matches the path of a leaf counts."""

import re
from collections.abc import Sequence
from typing import TypeVar

Value = TypeVar("Value")


def first_match(rows: Sequence[tuple[str, Value]], path: str) -> Value:
    """Return the value of the first `(regex, value)` row that matches `path`. Raise `ValueError` if none does."""
    for pattern, value in rows:
        if re.search(pattern, path):
            return value
    raise ValueError(f"no row matches {path!r}; add one to the table of {len(rows)} rows: {[row[0] for row in rows]}")
