"""What a user installs is the whole of it: the wheel alone finds its recipes from any folder."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import llm_jax

ROOT = Path(__file__).parents[1]


def test_the_extra_for_hugging_face_is_what_is_imported_from_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = [re.split("[>=[]", requirement)[0] for requirement in extras["hf"]]
    code = "".join(path.read_text() for path in ROOT.glob("llm_jax/**/*.py"))
    for name in names:
        assert re.search(rf"import {name}\b|from {name}\b|optional\(\"{name}\"\)", code), name
    for name in names + [re.split("[>=[]", requirement)[0] for requirement in extras["parity"]]:
        assert re.search(rf"^{name}==", (ROOT / "constraints.txt").read_text(), re.MULTILINE), name


@pytest.mark.smoke
def test_the_version_is_that_of_the_change_log_and_of_the_citation():
    released = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert released
    assert cited
    assert llm_jax.__version__ == released[1] == cited[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds llm_jax as its wheel installs it, and nothing else."""
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT], check=True)
    (wheel,) = wheels.glob("llm_jax-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


def run(site: Path, folder: Path, *command: str | Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run(command, cwd=folder, env=environment, check=True, text=True, stdout=-1).stdout


@pytest.mark.slow
def test_the_installed_wheel_finds_the_recipes_from_any_folder(site: Path, tmp_path: Path):
    listed = run(site, tmp_path, site / "bin" / "llm-jax", "configs")
    for recipe in (ROOT / "configs").glob("[!_]*.py"):
        assert recipe.stem in listed


@pytest.mark.slow
def test_the_wheel_is_what_runs_there(site: Path, tmp_path: Path):
    where = run(site, tmp_path, sys.executable, "-c", "import llm_jax; print(llm_jax.__file__)")
    assert Path(where.strip()).is_relative_to(site)
