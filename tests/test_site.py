"""The docs site: it builds from what is here, without the network, and every link of it leads to a page of it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest
from test_architecture import FLOORS, GROUND, PACKAGE

import llm_jax

for name in ("mkdocs", "material", "mkdocstrings_handlers"):
    pytest.importorskip(name, reason="pip install 'llm-jax[docs]'")

ROOT = PACKAGE.parent
ROOMS = {name for name, _, words in FLOORS if words and (PACKAGE / name).is_dir()}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_link_of_the_site_leads_to_a_file_of_it(site: Path):
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"]+)"', page.read_text()):
            target = unquote(urldefrag(link).url)
            if target and not re.match(r"[a-z]+:|//|/", target):
                assert (page.parent / target).exists(), f"{page.relative_to(site)} links to {link}"


def test_each_name_of_the_front_door_leads_to_its_documentation(site: Path):
    links = dict(re.findall(r'href="([^"]+)"><code>(\w+)</code></a>', (site / "reference" / "index.html").read_text()))
    assert {name: anchor for anchor, name in links.items()}.keys() == set(dir(llm_jax)) - {"__version__"}
    for link in links:
        page, anchor = link.split("#")
        assert f'id="{anchor}"' in (site / "reference" / page).read_text()


def test_the_site_loads_nothing_from_elsewhere(site: Path):
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="(?:https?:)?//[^"]*"', page.read_text()), page


def test_the_search_finds_a_page_and_a_name_of_the_reference(site: Path):
    found = {entry["location"] for entry in json.loads((site / "search" / "search_index.json").read_text())["docs"]}
    assert "sharding.html" in found
    assert "reference/train.html#llm_jax.train.step.TrainState" in found
    assert not [location for location in found if location.startswith("source/")]


def test_the_first_page_leads_to_every_other():
    linked = set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_the_reference_has_each_room_and_each_module_of_the_ground_floor():
    assert {path.stem for path in (ROOT / "docs" / "reference").glob("*.md")} == ROOMS | {"index", "ground"}
    ground = re.findall(r"^::: llm_jax\.(\w+)$", (ROOT / "docs" / "reference" / "ground.md").read_text(), re.MULTILINE)
    assert set(ground) == set(GROUND.split("|"))
