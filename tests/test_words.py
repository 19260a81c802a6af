"""Texts that people read say the field's words, and not private ones: the glossary, kept."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A private word, as a pattern -> what to say in its place.
GLOSSARY = {
    r"\bbehind\b": "after",
    r"\bparted\b": "split, sharded, reduce-scattered",
    r"\bparts\b": "shards, slices, pieces",
    r"\broads?\b": "code path",
    r"(?<!\bin )\bturns?\b(?! (on|off|out|into|true|of)\b)": "rotate, transpose",
    r"\bturned\b(?! (on|off|out|into|true)\b)": "rotated, transposed",
    r"\bwires?\b": "communication",
    r"\bby hand\b": "manual",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\bgo(es|ing)? on\b|\bwent on\b": "resume, continue",
    r"(?<!\bin )(?<!\bin the )(?<!\bin (its|our) )(?<!\btakes )(?<!\btake )\bplaces?\b": "index, position, slot",
    r"\b(told|tells?) \w+ ?apart\b|\btold apart\b": "segmented, distinguished",
    r"\bat hand\b": "available",
    r"\bdear\b": "expensive",
    r"\blets? it write\b|\bwrites nothing\b": "generate, sample",
}
# Where a word of the left is the right one: file, the words around it, why.
EXCEPTIONS: list[tuple[str, str, str]] = []

SOURCES = [
    *ROOT.glob("llm_jax/**/*.py"),
    *ROOT.glob("scripts/**/*"),
    *ROOT.glob("configs/*.py"),
    *ROOT.glob("examples/*.py"),
]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "findings/README.md"]
DIARY = {"log.md", "CHANGELOG.md"}  # what was said then


def said(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that a person reads: of Python its comments and strings, of a page all of it."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield from enumerate(text.split("\n"), start=1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            for offset, line in enumerate(token.string.split("\n")):
                yield token.start[0] + offset, line


def allowed(path: Path, line: str) -> bool:
    return any(path.name == file and words in line for file, words, _ in EXCEPTIONS)


@pytest.mark.parametrize("pattern", GLOSSARY, ids=lambda pattern: GLOSSARY[pattern])
def test_nothing_that_people_read_uses_a_private_word(pattern: str):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in [*SOURCES, *PAGES]
        if path.is_file() and path.name not in DIARY and path.suffix in (".py", ".md", "")
        for number, line in said(path)
        if re.search(pattern, line, re.IGNORECASE) and not allowed(path, line)
    ]
    assert not found, f"say {GLOSSARY[pattern]}:\n" + "\n".join(found)


def test_every_exception_is_still_needed():
    for file, words, reason in EXCEPTIONS:
        assert reason
        assert any(words in path.read_text(encoding="utf-8") for path in [*SOURCES, *PAGES] if path.name == file), words


@pytest.mark.parametrize("path", sorted(ROOT.glob("llm_jax/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_begins_with_a_verb_or_a_name(path: Path):
    """`Return ...`, not `Returns ...`: the first line says what to do with the function."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    third = r"(Returns|Gives|Yields|Raises|Writes|Reads|Makes|Takes|Prints|Shows|Says|Drops|Appends|Keeps|Sets|Runs)\b"
    found = [
        f"{node.name}: {doc.splitlines()[0]}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node)) and re.match(third, doc)
    ]
    assert not found, "\n".join(found)
