"""`llm-jax train` and `llm-jax resume` as a user types them, on a model of one layer."""

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from llm_jax.cli.main import main
from llm_jax.runs import fit
from llm_jax.runs.checkpoint import Checkpoints
from llm_jax.train.program import Program


def test_a_run_is_a_folder_named_after_its_config_and_says_what_is_next(workspace: Path, error: Any):
    assert {"config.json", "tokenizer", "checkpoints", "metrics.jsonl", "report.html"} <= {
        path.name for path in (workspace / "runs" / "tiny").iterdir()
    }
    assert "llm-jax resume runs/tiny, or llm_jax.resume('runs/tiny'); or choose another folder (--run)" in error(
        "train", "tiny.py"
    )


def test_resume_continues_to_a_new_total(workspace: Path, output: Any):
    said = output("train", "tiny.py", "--run", "runs/longer", "prompts=")
    assert "done; read runs/longer/report.html" in said
    with Checkpoints(workspace / "runs/longer", read_only=True) as checkpoints:
        assert f"the best checkpoint is of step {checkpoints.best()}: generate and evaluate take it\n" in said
    assert "llm-jax generate runs/longer" in output("resume", "runs/longer", "--steps", "6")
    assert (workspace / "runs/longer/checkpoints/6").is_dir()


def test_train_and_resume_print_one_json_object_where_it_is_asked_for(output: Any):
    end = json.loads(output("train", "tiny.py", "--run", "runs/machine", "--json"))
    assert (end["run"], end["step"], end["steps"], end["skipped"]) == ("runs/machine", 4, 4, 0)
    assert end["tokens"] > 0
    assert end["heldout_loss"] > 0
    assert json.loads(output("resume", "runs/machine", "--steps", "6", "--json"))["step"] == 6
    Path("runs/machine/metrics.jsonl").unlink()  # what is gone is nothing that a script waits for
    end = json.loads(output("train", "tiny.py", "--run", "runs/machine", "--resume", "--json"))
    assert end == {"run": "runs/machine", "steps": 6, "step": 6}


def test_a_run_that_starts_from_the_weights_of_another_says_so(output: Any):
    said = output("train", "tiny.py", "init_from=runs/tiny", "--run", "runs/again", "prompts=", "steps=2")
    assert re.search(r"restored from runs/tiny at step 4: weights, nothing else", said)


def test_a_run_resumes_though_the_one_that_it_came_from_is_gone(workspace: Path, capsys: pytest.CaptureFixture[str]):
    words = ("train", "tiny.py", "--run", "runs/tiny", "--from", "runs/gone")
    assert main((*words, "--resume")) == 0
    assert "trained already" in capsys.readouterr().err
    assert main(words) == 2  # but none begins from it


@pytest.mark.parametrize(
    ("content", "changes", "says"),
    [
        (None, [], "missing.txt"),
        (b"", [], "no text in it"),
        (b"\x00\xff\xfe" * 99, [], "not text"),
        (b"a\nb\nc\nd\ne\n", [], "12 tokens are too few for one row: data.seq_len=32 needs 33"),
        (b"a text of many words\n" * 50, ["model.vocab_size=100"], "257 ids.*model.vocab_size=100"),
        (b"a text of many words\n" * 50, ["data.epochs=1", "steps=1000"], "data.epochs=1 allows 5"),
    ],
    ids=["missing", "empty", "binary", "too short", "too many ids", "too few epochs"],
)
def test_data_that_cannot_train_leaves_no_files(
    content: bytes | None, changes: list[str], says: str, workspace: Path, error: Any
):
    file = workspace / "missing.txt"
    if content is not None:
        file = workspace / "data.txt"
        file.write_bytes(content)
    line = error("train", "tiny.py", f"data.uri={file}", "data.heldout_by=tail", "--run", "runs/none", *changes)
    assert re.search(says, line)
    assert not (workspace / "runs/none").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            ["steps=20", "optimizer.warmup_steps=20"],
            "warmup_steps=20 leaves nothing of steps=20; set optimizer.warmup_steps=2",
        ),
        (["mesh.data=3"], "mesh .* takes 3 devices, but there are 8"),
    ],
)
def test_what_no_data_can_put_right_is_refused_before_it_is_prepared(
    changes: list[str], says: str, error: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fit, "open_data", lambda *args: pytest.fail("the data was prepared"))
    assert re.search(says, error("train", "tiny.py", "--run", "runs/none", *changes))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_ends_with_its_status_and_resumes_by_the_same_line(
    number: int, status: int, workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    words = ["train", "tiny.py", "--run", f"runs/stopped-{number}", "prompts=", "--resume"]
    step = Program.train_step

    def interrupted(program: Program, *batch: Any) -> Any:
        monkeypatch.undo()
        os.kill(os.getpid(), number)
        return step(program, *batch)

    monkeypatch.setattr(Program, "train_step", interrupted)
    assert main(words) == status
    assert f"stopped at step 1 of 4; resume with: llm-jax resume runs/stopped-{number}" in capsys.readouterr().out
    for _ in range(2):  # to the end, and once more for nothing
        assert main([*words, "steps=4"]) == 0
        assert "done; read" in capsys.readouterr().out
    assert main([*words, "steps=9"]) == 0
    assert "resumes with its own config: steps is 4 there, 9 here" in capsys.readouterr().err


def test_prepared_shards_are_trained_on(workspace: Path, output: Any):
    options = ("--tokenizer", "byte", "--separator", "\n", "--heldout", "0.2")
    manifest = json.loads(output("prepare", "text.txt", "--out", "shards", *options, "--json"))
    assert (
        manifest["splits"]["train"]["bytes"] + manifest["splits"]["heldout"]["bytes"]
        == (workspace / "text.txt").stat().st_size
    )
    output("train", "tiny.py", "data.uri=shards", "--run", "runs/shards", "steps=2", "prompts=")
    assert (workspace / "runs/shards/checkpoints/2").is_dir()
