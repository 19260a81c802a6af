"""The recipes that come with the library: where they are, and how each describes itself, read without running it."""

import ast
from pathlib import Path


def recipe_folder() -> Path:
    """Return `configs/` of the source tree, or of the installed wheel, where it is inside the package."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def recipes() -> dict[str, Path]:
    """Return all recipes by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("[!_]*.py"))}


def recipe_docstring(path: Path) -> str:
    """Return the docstring of a recipe: what it is, the command, and the result that the command gave."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
