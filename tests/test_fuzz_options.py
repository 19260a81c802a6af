"""Thousands of command lines that nobody means: each is answered, on one line, and nothing endless gets through."""

import dataclasses
import functools
import math
import random
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from llm_jax.cli import main
from llm_jax.cli.shared import config_or_run_of
from llm_jax.keys import SYNONYMS, keys
from llm_jax.recipes import recipes
from llm_jax.runs.start import load_recipe
from llm_jax.train.config import RunConfig

LINES = 4000
KEYS = [key.name for key in keys(RunConfig)]
NUMBERS = [
    "0",
    "-1",
    "1",
    "7",
    "64",
    "1e3",
    "0.5",
    "-0.0",
    "1e-3",
    "1e-45",
    "1e38",
    "1e39",
    "1e400",
    "-1e400",
    "nan",
    "inf",
]
NUMBERS += [
    "-inf",
    "2147483647",
    "2147483648",
    "4294967296",
    "-2147483649",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "1_000",
    "١٢",
    "²",
]
NUMBERS += ["1e", "1e+", ".", "1.", ".5", "+3", "--3", " 3", "3 ", "1,5", "Infinity", "NaN", "1e99999999999"]
WORDS = [
    "",
    "none",
    "None",
    "true",
    "True",
    "yes",
    "a",
    "a,b",
    ",",
    ",,,",
    "global,local",
    "x" * 5000,
    "1," * 20_000,
    "\n",
]
WORDS += [
    "\x1b[31m",
    "\ud800",
    "\u202e",
    "'",
    '"',
    "$(ls)",
    "%s",
    "{}",
    "a=b",
    "=",
    "==",
    "\t",
    "🙂",
    "adamw",
    "builtin:python",
]
STRANGE_KEYS = ["", ".", "..", "model.", ".steps", "a.b.c", "model.model", "steps.steps", "model.__class__", "__init__"]
STRANGE_KEYS += [
    ".".join("a" * 5000),
    "model." * 500 + "n_layers",
    "steps ",
    "STEPS",
    "model.attention.sparse",
    "\n",
    "é",
]


def mutated(word: str, draw: random.Random) -> str:
    """`word` with a letter lost, doubled or another."""
    if not word:
        return word
    at = draw.randrange(len(word))
    return word[:at] + draw.choice(["", word[at] * 2, draw.choice("abz_.-=0")]) + word[at + 1 :]


def assignment(draw: random.Random) -> str:
    synonyms = [other for others in SYNONYMS.values() for other in others]
    key = draw.choice([draw.choice(KEYS)] * 6 + [draw.choice(synonyms), draw.choice(STRANGE_KEYS)])
    key = mutated(key, draw) if draw.random() < 0.15 else key
    value = draw.choice(draw.choice([NUMBERS, WORDS]))
    return draw.choice([f"{key}={value}"] * 9 + [key])


def option(verb: str, draw: random.Random) -> list[str]:
    choices = next(action for action in main.parser()._actions if action.dest == "function" or action.choices).choices
    names = [name for name in choices[verb]._option_string_actions if name not in ("-h", "--help", "--debug")]
    name = draw.choice(
        [draw.choice(names or ["--yes"])] * 6 + ["--lr", "--steps", "--zzz", "-x", "--", "-", "--" + "x" * 3000]
    )
    name = mutated(name, draw) if draw.random() < 0.1 else name
    value = draw.choice(draw.choice([NUMBERS, WORDS]))
    return draw.choice([[name], [name, value], [f"{name}={value}"]])


def line(draw: random.Random) -> list[str]:
    """A verb, what it is about, some changes of keys, some options, in any order."""
    verb = draw.choice([function.__name__.rstrip("_") for function in main.SYNTAX])
    about = draw.choice([draw.choice(list(recipes()))] * 5 + [draw.choice(WORDS)])
    rest = [[assignment(draw)] for _ in range(draw.choice([0, 1, 1, 2, 3]))]
    rest += [option(verb, draw) for _ in range(draw.choice([0, 0, 1, 2]))]
    draw.shuffle(rest)
    verb = mutated(verb, draw) if draw.random() < 0.03 else verb
    return [verb, about, *(word for words in rest for word in words)]


def leaves(config: Any) -> Iterator[Any]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value)
        else:
            yield from value if isinstance(value, tuple) else (value,)


def stand_in(verb: Callable[..., Any], accepted: list[Any]) -> Callable[[Namespace], None]:
    """`verb` up to where its work begins: its config is made, and what it accepts is noted."""

    @functools.wraps(verb)
    def run(args: Namespace) -> None:
        values = [value for value in vars(args).values() if isinstance(value, int | float)]
        assert all(math.isfinite(value) and (value < 2**32 or isinstance(value, float)) for value in values)
        if "config" in vars(args):
            numbers = [x for x in leaves(config_or_run_of(args)) if isinstance(x, int | float)]
            assert all(math.isfinite(x) and abs(x) <= 3.5e38 for x in numbers)
        accepted.append(values)

    return run


@pytest.mark.slow
def test_any_words_are_accepted_or_refused_on_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    loaded, accepted = {name: load_recipe(name) for name in recipes()}, []
    monkeypatch.setattr(
        "llm_jax.runs.start.load_recipe", lambda name: loaded[name] if name in loaded else load_recipe(name)
    )
    syntax = {
        function if function.__name__.startswith("help") else stand_in(function, accepted): arguments
        for function, arguments in main.SYNTAX.items()
    }
    monkeypatch.setattr(main, "SYNTAX", syntax)
    parser = main.parser()
    monkeypatch.setattr(main, "parser", lambda: parser)
    draw, refused = random.Random(0), 0
    for _ in range(LINES):
        words = line(draw)
        started = time.monotonic()
        try:
            status = main.main(words)
        except SystemExit as stop:
            status = stop.code
        err = capsys.readouterr().err
        assert status in (0, 2), words
        assert err.count("\n") == (status == 2), (words, err)
        assert len(err) < 3000, words
        assert not status or err.startswith("llm-jax: error: ")
        assert all(c.isprintable() or c == "\n" for c in err), (words, err)
        assert time.monotonic() - started < 5, words
        refused += status == 2
    assert len(accepted) > LINES / 20
    assert refused > LINES / 4
