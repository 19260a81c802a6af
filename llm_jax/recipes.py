"""The recipes that come with the library: where they are, and what each says of itself, read without running it."""

import ast
from pathlib import Path


def recipe_folder() -> Path:
    """`configs/` of the source tree, or of the installed wheel, where it lies inside the package."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def recipes() -> dict[str, Path]:
    """All recipes by name."""
    return {path.stem: path for path in sorted(recipe_folder().glob("[!_]*.py"))}


def recipe_docstring(path: Path) -> str:
    """What a recipe is, the command, and the result that the command gave."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
