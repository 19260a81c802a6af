"""Every public name says what it does, and that it raises where it does."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "llm_jax"
# What can't happen, and what a subclass has to give: neither is for a caller to handle, so neither needs a word.
INTERNAL = ("AssertionError", "NotImplementedError")

Definition = ast.FunctionDef | ast.ClassDef


def definitions(body: list[ast.stmt], outer: str) -> Iterator[tuple[str, Definition]]:
    """Yield the public functions, classes and methods, with their names; nothing that stands inside a function."""
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from definitions(node.body, outer)
        elif isinstance(node, Definition) and not node.name.startswith("_"):
            yield f"{outer}{node.name}", node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node.body, f"{outer}{node.name}.")


def public() -> Iterator[tuple[str, Definition]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from definitions(tree.body, f"{path.relative_to(PACKAGE)}: ")


def makers(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """Return what runs when an instance is made."""
    names = ("__init__", "__post_init__")
    return [inner for inner in node.body if isinstance(inner, ast.FunctionDef) and inner.name in names]


def raising(node: Definition) -> bool:
    """Return whether there is a `raise` in a function, or in what makes an instance of a class."""
    if isinstance(node, ast.ClassDef):
        return any(map(raising, makers(node)))
    found = [inner for inner in ast.walk(node) if isinstance(inner, ast.Raise)]
    return any(not ast.unparse(inner.exc or inner).startswith(INTERNAL) for inner in found)


def said(node: Definition) -> str:
    """Return the docstring; of a class with those of its `makers`."""
    nodes = [node, *makers(node)] if isinstance(node, ast.ClassDef) else [node]
    return " ".join(ast.get_docstring(inner) or "" for inner in nodes)


def test_a_public_name_says_what_it_is():
    silent = [name for name, node in public() if not ast.get_docstring(node)]
    assert not silent, "\n".join(silent)


def test_what_raises_says_so():
    silent = [name for name, node in public() if raising(node) and "raise" not in said(node).lower()]
    assert not silent, "\n".join(silent)
