"""The grammar of `data.uri`: one address is what it always was, and a mixture has a weight for each."""

import re
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.data.config import DataConfig, format_uri, parse_uri

ADDRESSES = [
    "a.jsonl",
    "b/",
    "s3://bucket:9000/a.txt",
    "hf://datasets/owner/name@main/x.parquet",
    "C:\\books\\a.txt",
    "src/**/*.[ch]",
    "builtin:numbers",
    "one,two.txt",
    "verse:two, a song.txt",
    "v1:2/x",
]
WEIGHTS = ["1", "0.7", ".5", "2.", "120", "0.000001"]


@pytest.mark.parametrize("uri", [*ADDRESSES, "a.jsonl:0.7", "a,b", "a,b:0.3", "a:b,c:d", "", "a:,b:"])
def test_text_in_which_no_comma_follows_a_weight_is_one_address(uri: str):
    (source,) = DataConfig(uri=uri).sources
    assert (source.uri, source.share) == (uri, 1)
    assert format_uri(["elsewhere"], [source]) == "elsewhere"


@given(st.lists(st.sampled_from(ADDRESSES), min_size=2, unique=True), st.data())
def test_a_mixture_has_its_addresses_and_shares_that_add_up_to_one(addresses: list[str], data):
    weights = [data.draw(st.sampled_from(WEIGHTS)) for _ in addresses]
    uri = ",".join(f"{address}:{weight}" for address, weight in zip(addresses, weights, strict=True))
    sources = parse_uri(uri)
    assert [source.uri for source in sources] == addresses
    assert sum(source.share for source in sources) == 1
    total = sum(map(Fraction, weights))
    assert [source.share for source in sources] == [Fraction(weight) / total for weight in weights]
    assert len({source.name for source in sources}) == len(addresses)
    assert format_uri(addresses, sources) == uri


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("a:0.7,b", "the last one has none; write b:1, leave it out, or write ? for a comma"),
        ("a:0.7,", "the last one has none; write ADDRESS:1"),
        ("a:0,b:1", "a has the weight 0, expected a positive decimal such as 0.7"),
        ("a:-1,b:1", "a has the weight -1"),
        ("a:1,b:nan", "b has the weight nan"),
        ("a:inf,b:1", "a has the weight inf"),
        ("a:1e3,b:1", "a has the weight 1e3"),
        ("a:+1,b:1", "a has the weight +1"),
        ("a:٣,b:1", "a has the weight ٣"),
        (f"a:{'9' * 5000},b:1", "a has the weight 999"),
        (":1,b:1", "has a weight without an address"),
        ("a:1,b:1,a:2", "names a 2 times"),
    ],
)
def test_a_mixture_without_a_good_weight_for_each_says_which(uri: str, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        DataConfig(uri=uri)


def test_names_are_the_same_for_relative_and_absolute_addresses():
    for folder in (Path("x"), Path("/data/x"), Path("C:\\x")):
        names = [source.name for source in parse_uri(f"{folder}/a.jsonl:1,{folder}/b/:2,builtin:python:1")]
        assert names == ["a.jsonl", "b", "builtin:python"]
    assert [source.name for source in parse_uri("x/a.txt:1,y/a.txt:1")] == ["a.txt#1", "a.txt#2"]
