"""Every row of the tables names parameters that exist, and a format with exactly their letters."""

import re

import pytest

from llm_jax.compat.families import FAMILIES
from llm_jax.paths import first_match
from llm_jax.sharding import LETTERS


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_letters_of_a_format_are_those_of_its_parameters(family):
    for name, text, leaves in family.tensors:
        letters = {letter for leaf in leaves for letter in first_match(LETTERS, _path(name, leaf))}
        skipped = {"N"} | ({"E"} if "{e}" in name else set())
        assert set(re.findall("[A-Z]", text)) == letters - skipped, name
        assert max(text.count("|"), 0) + 1 == len(leaves), name


def _path(name: str, leaf: str) -> str:
    return f"layers/{leaf}" if "{i}" in name else leaf


def test_no_family_names_a_tensor_twice():
    for family in FAMILIES.values():
        names = [name for name, _, _ in family.tensors]
        assert len(set(names)) == len(names), family.name
