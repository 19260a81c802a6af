"""The generated corpora say what is true, by checks that share no line with what wrote them."""

import re

import pytest

from llm_jax.data import generated
from llm_jax.data.sources import documents, fingerprint, holds_records

GERMAN = "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn fünfzehn sechzehn"
GERMAN += " siebzehn achtzehn neunzehn"
GERMAN_TENS = "zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"
ENGLISH = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
ENGLISH += " seventeen eighteen nineteen"
ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"


def values(units: str, tens: str) -> dict[str, int]:
    return {word: n for n, word in enumerate(units.split())} | {
        word: 10 * n for n, word in enumerate(tens.split(), start=2)
    }


def read_german(text: str) -> int:
    known = values(GERMAN, GERMAN_TENS) | {"": 0, "ein": 1}
    for word, size in (("tausend", 1000), ("hundert", 100)):
        before, found, after = text.partition(word)
        if found:
            return size * read_german(before) + read_german(after)
    return known[text] if text in known else sum(known[part] for part in text.split("und"))


def read_english(text: str) -> int:
    known, whole, part = values(ENGLISH, ENGLISH_TENS), 0, 0
    for word in re.split("[ -]", text):
        if word == "thousand":
            whole, part = whole + 1000 * part, 0
        elif word == "hundred":
            part *= 100
        elif word != "and":
            part += known[word]
    return whole + part


def test_both_languages_read_as_the_same_number_and_each_comes_once():
    pairs = [text.split("\t") for text in generated.numbers()]
    read = [(read_german(german), read_english(english)) for german, english in pairs]
    assert read == [(n, n) for n in range(10_000)]


@pytest.mark.parametrize(
    ("n", "german", "english"),
    [
        (0, "null", "zero"),
        (1, "eins", "one"),
        (17, "siebzehn", "seventeen"),
        (21, "einundzwanzig", "twenty-one"),
        (30, "dreißig", "thirty"),
        (101, "einhunderteins", "one hundred and one"),
        (412, "vierhundertzwölf", "four hundred and twelve"),
        (1001, "eintausendeins", "one thousand and one"),
        (21_345, "einundzwanzigtausenddreihundertfünfundvierzig", "twenty-one thousand three hundred and forty-five"),
        (101_001, "einhunderteintausendeins", "one hundred and one thousand and one"),
    ],
)
def test_numbers_are_spelled_as_in_a_grammar(n: int, german: str, english: str):
    assert (generated.german(n), generated.english(n)) == (german, english)


@pytest.fixture(scope="module")
def brackets() -> list[list[str]]:
    """Every text of brackets, and its answer."""
    return [document.split("\t") for document in generated.brackets()]


def test_an_answer_says_whether_nothing_is_left_when_pairs_are_struck_out(brackets: list[list[str]]):
    for text, answer in brackets:
        left = None
        while left != text:
            left, text = text, re.sub(r"\(\)|\[\]|\{\}|<>", "", text)
        assert answer == ("no" if text else "yes")


def test_neither_length_nor_counts_tell_the_answer(brackets: list[list[str]]):
    assert len({text for text, _ in brackets}) == len(brackets) == generated.TEXTS
    for (right, yes), (wrong, no) in zip(brackets[::2], brackets[1::2], strict=True):
        assert (yes, no) == ("yes", "no")
        assert sorted(right) == sorted(wrong)
        assert sum(a != b for a, b in zip(right, wrong, strict=True)) == 2


@pytest.mark.parametrize(("uri", "begins"), [("builtin:numbers", "e9ae0a78209d"), ("builtin:brackets", "1aca24d3ed23")])
def test_a_generated_source_is_read_like_any_other_and_never_changes(uri: str, begins: str):
    first = next(documents(uri))
    assert first.text == next(generated.GENERATED[uri]())
    assert first.origin == f"{uri}#0"
    assert fingerprint(uri).startswith(begins)  # scores in configs/ and docs/ are of these texts
    assert holds_records(uri)
    with pytest.raises(ValueError, match=f"separator=' ' cuts text, and {uri} comes as documents; leave it out"):
        next(documents(uri, " "))


def test_an_unknown_generated_source_is_told_those_that_are_there():
    with pytest.raises(ValueError, match=r"'builtin:letters'; .* builtin:python, builtin:numbers, builtin:brackets"):
        next(documents("builtin:letters"))
