"""The recipes that come with the library are found, and describe themselves without being run."""

from pathlib import Path

from llm_jax.recipes import recipe_docstring, recipes


def test_every_recipe_is_found_by_its_name_and_has_its_command():
    found = recipes()
    assert "quickstart" in found
    for name, path in found.items():
        assert path.stem == name
        first, _, rest = recipe_docstring(path).partition("\n")
        assert first.endswith(".")
        assert "llm-jax" in rest


def test_a_recipe_is_described_without_being_run(tmp_path: Path):
    (tmp_path / "a.py").write_text('"""What it is."""\nraise SystemExit\n')
    assert recipe_docstring(tmp_path / "a.py") == "What it is."
    (tmp_path / "a.py").write_text("x = 1\n")
    assert recipe_docstring(tmp_path / "a.py") == ""
