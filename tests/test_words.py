"""Texts that people read say the field's words, and not private ones: the glossary, kept."""

import ast
import functools
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# A private word, as a pattern -> what to say in its place.
GLOSSARY = {
    r"\bbehind\b": "after",
    r"\bparted\b": "split, sharded, reduce-scattered",
    r"\bparts\b": "shards, slices, pieces",
    r"\broads?\b": "code path",
    # Right are "in turn", "turn dropout on" and "turn text into tokens".
    r"(?<!\bin )\bturn(s|ed)?\b(?! (\S+ )?(on|off|out|true|of)\b)(?!.*\binto\b)": "rotate, transpose",
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
EXCEPTIONS = [
    ("config.py", "turns over `original_len`", "a turn is a unit of angle, as in the keys low_turns and high_turns"),
    ("config.py", "or by turns", "the same"),
    ("position.py", "whole turns", "the same"),
    ("records.py", "a list of turns", "a chat has turns"),
]

FOLDERS = ("llm_jax", "scripts", "configs", "examples", "tests", "findings", "docs", ".ci", ".github")
UNREAD = {
    "log.md": "a diary: what was said then",
    "CHANGELOG.md": "the same",
    "test_words.py": "it has the words that it looks for",
}
FILES = [
    path
    for path in (*ROOT.glob("[!.]*.*"), *(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*")))
    if path.is_file() and path.suffix in (".py", ".md", ".sh", ".yml", ".yaml", ".toml", ".cff", "")
    if path.name not in UNREAD
]


@functools.cache
def said(path: Path) -> list[tuple[int, str]]:
    """The lines that a person reads: of Python comments, strings and names of functions, of all else every line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return list(enumerate(text.split("\n"), start=1))
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    spoken = (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1))
    return [(node.lineno, node.name.replace("_", " ")) for node in nodes] + [
        (token.start[0] + offset, line)
        for token in tokens
        if token.type in spoken
        for offset, line in enumerate(token.string.split("\n"))
    ]


def allowed(path: Path, line: str) -> bool:
    return any(path.name == file and words in line for file, words, _ in EXCEPTIONS)


@pytest.mark.parametrize("pattern", GLOSSARY, ids=lambda pattern: GLOSSARY[pattern])
def test_nothing_that_people_read_uses_a_private_word(pattern: str):
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in FILES
        for number, line in said(path)
        if re.search(pattern, line, re.IGNORECASE) and not allowed(path, line)
    ]
    assert not found, f"say {GLOSSARY[pattern]}:\n" + "\n".join(found)


def test_every_exception_is_still_needed():
    for file, words, reason in EXCEPTIONS:
        assert reason
        assert any(words in path.read_text(encoding="utf-8") for path in FILES if path.name == file), words


def test_an_attribute_has_a_line_of_its_own():
    """`Attributes:` lists what a class holds, one name an entry, as the site reads it."""
    wrong = []
    for path in ROOT.glob("llm_jax/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and (doc := ast.get_docstring(node)):
                listed = doc.partition("\nAttributes:\n")[2].partition("\n\n")[0]
                held = {ast.unparse(line.target) for line in node.body if isinstance(line, ast.AnnAssign)}
                held |= {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}
                entries = re.findall(r"^  (\S.*?):", listed, re.MULTILINE)
                wrong += [f"{node.name}: {entry}" for entry in entries if entry not in held]
    assert wrong == []


# Words with which a noun phrase or a clause begins, and no command.
NO_VERB = """
A|An|The|This|That|These|Those|It|Its|One|Two|All|Any|Both|Each|Every|No|None|Not|Some|Several|Other|So|True|False|As|At
|After|Before|By|For|From|In|Of|On|To|With|Within|How|What|When|Where|Whether|Which|Who|Whose|Why
""".replace("\n", "")


@pytest.mark.parametrize("path", sorted(ROOT.glob("llm_jax/**/*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_docstring_of_a_function_begins_with_a_verb(path: Path):
    """`Return the ...`, neither `Returns the ...` nor `The ...`. A property is named like an attribute."""
    third_person, noun = r"[A-Z]\w*[^s\W]s\b", rf"(`|\d|({NO_VERB})\b)"
    found = [
        f"{node.name}: {doc.splitlines()[0]}"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (doc := ast.get_docstring(node))
        if not any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        if re.match(f"{third_person}|{noun}", doc)
    ]
    assert not found, "\n".join(found)


def test_a_docstring_raises_in_the_imperative():
    """`Raise `ValueError` for ...`, as its first line says `Return`."""
    found = [
        f"{path.relative_to(ROOT)}: {node.name}: {line}"
        for path in sorted(ROOT.glob("llm_jax/**/*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        for line in (ast.get_docstring(node) or "").splitlines()
        if re.search(r"\bRaises\b", line)
    ]
    assert not found, "\n".join(found)


# Public names that two files define, and why no reader is misled.
SHARED = {
    "Block FeedForward LinearAttention MixtureOfExperts Norm Output alibi_slopes sinusoidal": "the twin's, of ours",
    "check compare evaluate plan prepare resume verify": "a verb of the command line, and what it calls",
    "flash": "a kernel, and the implementation that calls it",
    "rms_norm": "a norm, and the lens of its key",
    "train": "the verb, and with its module, `tokenizer.train`, what makes a tokenizer",
    "read": "called with their modules: `log.read`, `tokenizer_json.read`",
    "parse": "called with their modules: `hlo.parse`, `tokenizer_json.parse`",
    "write": "called with their modules: `compare.write`, `terminal.write`",
    "count": "called with their modules: `processes.count`, `tree.count`",
    "fingerprint": "both identify content: of a tree, of what is at an address",
    "choices": "both are what one may choose: the values of a field, the changes of a config",
    "spans": "both write numbers as spans",
}


def test_a_public_name_means_one_thing():
    files: dict[str, list[str]] = {}
    for path in sorted(ROOT.glob("llm_jax/**/*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                files.setdefault(node.name, []).append(str(path.relative_to(ROOT / "llm_jax")))
    twice = {name: where for name, where in files.items() if len(where) > 1}
    known = set(" ".join(SHARED).split())
    assert twice.keys() - known == set(), {name: twice[name] for name in twice.keys() - known}
    assert known - twice.keys() == set(), "no longer shared"
