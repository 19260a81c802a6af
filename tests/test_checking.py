"""`llm-jax compare`, `llm-jax verify` and `llm-jax check` as a user types them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llm_jax import runtime
from llm_jax.cli.main import main
from llm_jax.compat import compare
from llm_jax.plan import check
from llm_jax.plan.check import BOUND, CASES, Finding

ROOT = Path(__file__).parents[1]


def test_what_a_disk_has_no_room_for_was_told_before(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "compare.json")

    for name, value in (("compare", lambda *_, **__: None), ("facts_as_text", lambda _: "the facts"), ("write", full)):
        monkeypatch.setattr(compare, name, value)
    monkeypatch.setattr(runtime, "start", lambda: None)
    assert main(["compare", "quickstart", "--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == "the facts\n"
    assert "no space left on the disk for compare.json" in err


def test_the_verb_fails_by_its_status_where_something_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(runtime, "start", lambda: None)
    monkeypatch.setattr(check, "check", lambda config: [Finding("cpu", "norm", 1.0, 0.0, BOUND)])
    assert main(["check", "quickstart"]) == 2
    said = capsys.readouterr()
    assert "WRONG" in said.out
    assert "wrong here: norm on cpu" in said.err


@pytest.mark.slow
def test_the_verb_passes_here_with_every_piece_and_a_step_of_the_config():
    command = [sys.executable, "-m", "llm_jax", "check", "quickstart", "model.n_layers=2", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    found = json.loads(done.stdout)["findings"]
    assert done.returncode == 0, done.stderr
    assert {finding["what"] for finding in found} > {*CASES}
    assert all(finding["right"] for finding in found)
    assert any("gradient of the config" in finding["what"] for finding in found)


@pytest.mark.slow
def test_the_verb_prints_what_it_found_and_refuses_axes_that_are_none(tmp_path: Path):
    def verify(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {name: x for name, x in os.environ.items() if name not in ("NPROC", "JAX_PLATFORMS")}
        command = [sys.executable, "-m", "llm_jax", "verify", "quickstart", *words]
        return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=500)

    found = json.loads(verify("--axes", "data", "model.attention.implementation=chunked", "--json").stdout)
    assert [(layout["mesh"], layout["equal"]) for layout in found["layouts"]] == [({"data": 8}, True)]
    assert "'dta' is no mesh axis; did you mean 'data'?" in verify("--axes", "dta").stderr
