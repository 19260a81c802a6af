"""The whole path as a user walks it: prepare, train, resume, evaluate, generate, show, on a model of one layer."""

import io
import json
import math
import os
import random
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_jax import runtime
from llm_jax.cli.main import main
from llm_jax.recipes import recipe_docstring, recipes
from llm_jax.runs import fit, restore
from llm_jax.runs import folder as run_folder
from llm_jax.runs.checkpoint import Checkpoints
from llm_jax.runs.evaluate import Evaluation
from llm_jax.train.program import Program

WORDS = ["a", "little", "model", "reads", "the", "words", "of", "a", "short", "text", "and", "writes", "some"]
RECIPE = '''"""A model of one layer.

    llm-jax train {path}
"""

from llm_jax.data.loader import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.config import RunConfig

config = RunConfig(
    model=ModelConfig(vocab_size=264, d_model=16, n_layers=1, n_heads=2, max_seq_len=32, d_ff=16),
    data=DataConfig(uri="{text}", tokenizer="byte", separator="\\n", heldout=0.2, seq_len=32, batch_size=8),
    optimizer=OptimizerConfig(warmup_steps=1),
    steps=4,
    evaluate_every=2,
    checkpoint_every=2,
    prompts=("a little",),
)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a text, a recipe and a run that is trained; caches of its own."""
    folder = tmp_path_factory.mktemp("place")
    draw = random.Random(0)
    lines = (" ".join(draw.choices(WORDS, k=draw.randrange(3, 20))) for _ in range(200))
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    (folder / "tiny.py").write_text(RECIPE.format(path="tiny.py", text=folder / "text.txt"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(folder / "cache"))
        patch.setattr(runtime, "start", lambda: None)  # the tests have a cache of their own
        patch.chdir(folder)
        assert main(["train", "tiny.py"]) == 0
        yield folder


@pytest.fixture
def output(place: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a verb; what it prints on standard output."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def error(place: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a verb that fails; its one line."""

    def run(*words: str) -> str:
        capsys.readouterr()
        assert main(words) == 2
        *_, line = capsys.readouterr().err.splitlines()
        assert line.startswith("llm-jax: error: ")
        return line

    return run


def test_a_run_is_a_folder_named_after_its_config_and_says_where_to_go_next(place: Path, error: Any):
    assert {"config.json", "tokenizer", "checkpoints", "metrics.jsonl", "report.html"} <= {
        path.name for path in (place / "runs" / "tiny").iterdir()
    }
    assert "llm-jax resume runs/tiny, or choose another --run" in error("train", "tiny.py")


def test_resume_goes_on_to_a_new_total(place: Path, output: Any):
    said = output("train", "tiny.py", "--run", "runs/longer", "prompts=")
    assert "done; read runs/longer/report.html" in said
    with Checkpoints(place / "runs/longer", read_only=True) as checkpoints:
        assert f"the best checkpoint is of step {checkpoints.best()}: generate and evaluate take it\n" in said
    assert "llm-jax generate runs/longer" in output("resume", "runs/longer", "--steps", "6")
    assert (place / "runs/longer/checkpoints/6").is_dir()


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


def test_a_run_resumes_though_the_one_that_it_came_from_is_gone(place: Path, capsys: pytest.CaptureFixture[str]):
    words = ("train", "tiny.py", "--run", "runs/tiny", "--from", "runs/gone")
    assert main((*words, "--resume")) == 0
    assert "trained already" in capsys.readouterr().err
    assert main(words) == 2  # but none begins from it


def test_evaluation_gives_each_number_within_its_interval(output: Any):
    found = json.loads(output("evaluate", "runs/tiny", "--json"))
    for name in ("loss", "perplexity", "bits_per_byte"):
        low, high = found[f"{name}_interval"]
        assert low < found[name] < high
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["documents"] > 20
    printed = output("evaluate", "runs/tiny")
    assert f"bits per byte {found['bits_per_byte']:10.4f}" in printed


def test_what_is_no_number_is_null_in_an_object(output: Any, monkeypatch: pytest.MonkeyPatch):
    """As of weights that overflow: strict JSON has no NaN, and a parser that is refuses all of it."""
    lost, far = (math.nan, math.nan), (-math.inf, math.inf)
    found = Evaluation(math.nan, lost, math.inf, math.nan, far, None, None, 3, 5, 1)
    with monkeypatch.context() as patch:
        patch.setattr(restore, "evaluate", lambda *_, **__: (found, 4))
        said = json.loads(output("evaluate", "runs/tiny", "--json"), parse_constant=pytest.fail)
    assert (said["loss"], said["perplexity"], said["bits_per_byte"], said["tokens"]) == (None, None, None, 3)
    assert (said["loss_interval"], said["bits_per_byte_interval"]) == ([None, None], [None, None])


def test_another_text_is_scored_whole(place: Path, output: Any):
    (place / "other.txt").write_text("so ein anderer Text\nnoch einer\n")
    found = json.loads(output("evaluate", "runs/tiny", "--data", str(place / "other.txt"), "--json"))
    assert (found["documents"], found["bytes"]) == (2, 31)


def test_text_that_is_one_document_has_no_interval(place: Path, capsys: pytest.CaptureFixture[str]):
    (place / "one.txt").write_text("ein Text")
    words = ["evaluate", "runs/tiny", "--data", str(place / "one.txt")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^loss +\d+\.\d{4}   -$", out, re.MULTILINE)
    assert f"scoring all of {place}/one.txt: 9 tokens of 1 documents\n" in err
    assert "train" not in err
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[f"{name}_interval"] for name in ("loss", "perplexity", "bits_per_byte")] == [None] * 3


@pytest.mark.parametrize("which", ["best", "last", "4"])
def test_the_newest_good_weights_stand_in_for_damaged_ones_unless_a_step_was_asked_for(which: str, place: Path):
    copy, told = shutil.copytree(place / "runs/tiny", place / f"runs/damaged-{which}"), []
    shutil.rmtree(copy / "checkpoints/4/params")
    program = restore.on_one_device(run_folder.load_config(copy))
    if which == "4":
        with pytest.raises(ValueError, match=r"no checkpoint that can be read \(tried \[4\]\)"):
            restore.weights(copy, program, which, report=told.append)
    else:
        assert restore.weights(copy, program, which, report=told.append)[1] == 2
    assert "passed over the checkpoint of step 4" in told[0]


def test_records_are_scored_though_the_run_cut_its_text_at_a_separator(place: Path, output: Any):
    (place / "other.jsonl").write_text('{"text": "so ein anderer Text"}\n{"text": "noch einer"}\n')
    found = json.loads(output("evaluate", "runs/tiny", "--data", str(place / "other.jsonl"), "--json"))
    assert (found["documents"], found["bytes"]) == (2, 29)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("evaluate runs/tiny --data rows.jsonl", "--column NAME"),
        ("prepare rows.jsonl --out rows --tokenizer byte", "--column NAME"),
        ("tokenize --train rows.jsonl --out rows", "--column NAME"),
        ("train tiny.py data.uri=rows.jsonl data.separator=none --run rows", "data.column=NAME"),
        ("prepare other.txt --out rows --tokenizer byte", "--separator $'\\n\\n'"),
    ],
)
def test_advice_names_what_the_verb_takes(words: str, advice: str, place: Path, error: Any):
    (place / "rows.jsonl").write_text('{"txt": "one"}\n{"txt": "two"}\n')
    (place / "other.txt").write_text("so ein anderer Text")
    said = error(*words.split())
    assert advice in said
    assert said.count("data.") == advice.count("data.")


def test_prepared_shards_are_scored_whole_if_they_are_in_the_tokens_of_the_run(place: Path, output: Any, error: Any):
    options = ("--separator", "\n", "--heldout", "0.3")
    output("prepare", "text.txt", "--out", "ours", "--tokenizer", "runs/tiny/tokenizer", *options)
    found = json.loads(output("evaluate", "runs/tiny", "--data", "ours", "--json"))
    assert (found["documents"], found["bytes"]) == (200, (place / "text.txt").stat().st_size)
    output("prepare", "text.txt", "--out", "theirs", "--tokenizer", "char", *options)
    says = "theirs is in the tokens of char, but runs/tiny knows those of byte"
    assert says in error("evaluate", "runs/tiny", "--data", "theirs")


@pytest.mark.parametrize(("which", "step"), [("best", 4), ("last", 4), ("2", 2)])
def test_a_checkpoint_is_chosen_by_name_or_step(which: str, step: int, output: Any):
    options = ("--prompt", "a", "--max-tokens", "1", "--checkpoint", which, "--json")
    assert json.loads(output("generate", "runs/tiny", *options))["step"] == step


@pytest.mark.parametrize(("which", "says"), [("3", "no checkpoint of step 3"), ("beste", "use best, last, or a step")])
def test_a_checkpoint_that_is_not_there_is_refused(which: str, says: str, error: Any):
    assert says in error("generate", "runs/tiny", "--prompt", "a", "--checkpoint", which)


def test_each_prompt_gets_in_company_what_it_gets_alone(output: Any):
    greedy = ("--temperature", "0", "--max-tokens", "8")
    together = output("generate", "runs/tiny", "--prompt", "the words", "--prompt", "a", *greedy)
    alone = [output("generate", "runs/tiny", "--prompt", prompt, *greedy) for prompt in ("the words", "a")]
    assert together == "\n".join(alone)
    assert together.startswith("the words")


def test_samples_differ_and_json_holds_what_is_printed(output: Any):
    options = ("--prompt", "a", "--prompt", "the", "--samples", "2", "--max-tokens", "8", "--seed", "1")
    found = json.loads(output("generate", "runs/tiny", *options, "--json"))
    texts = [(text["prompt"], text["text"]) for text in found["texts"]]
    assert [prompt for prompt, _ in texts] == ["a", "a", "the", "the"]
    assert len(set(texts)) == 4
    assert output("generate", "runs/tiny", *options) == "\n".join(f"{a}{b}\n" for a, b in texts)


@pytest.mark.parametrize(("piped", "prompts"), [("the\na\n", ["the", "a"]), ("", ["a little"])])
def test_prompts_come_from_a_pipe_or_else_from_the_run(
    piped: str, prompts: list[str], output: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    texts = json.loads(output("generate", "runs/tiny", "--max-tokens", "8", "--json"))["texts"]
    assert [text["prompt"] for text in texts] == prompts
    assert {text["finish"] for text in texts} <= {"length", "end_of_text"}


def test_a_prompt_longer_than_the_context_is_refused(error: Any):
    assert "a prompt of 41 tokens leaves no room in max_seq_len=32" in error(
        "generate", "runs/tiny", "--prompt", "x" * 40
    )


def test_what_is_shown_of_a_run_is_what_is_shown_of_its_config(output: Any):
    assert output("show", "runs/tiny", "steps=9") == output("show", "tiny.py", "steps=9")
    assert json.loads(output("show", "runs/tiny", "--json"))["sizes"]["F"] == 16


@pytest.mark.parametrize(
    ("content", "changes", "says"),
    [
        (None, [], "missing.txt"),
        (b"", [], "no text in it"),
        (b"\x00\xff\xfe" * 99, [], "not text"),
        (b"a\nb\nc\nd\ne\n", [], "12 tokens are too few for one row: seq_len=32 needs 33"),
        (b"a text of many words\n" * 50, ["model.vocab_size=100"], "257 ids.*model.vocab_size=100"),
        (b"a text of many words\n" * 50, ["data.epochs=1", "steps=1000"], "epochs=1 allows 5"),
    ],
    ids=["missing", "empty", "binary", "too short", "too many ids", "too few epochs"],
)
def test_data_that_cannot_train_leaves_nothing_behind(
    content: bytes | None, changes: list[str], says: str, place: Path, error: Any
):
    file = place / "missing.txt"
    if content is not None:
        file = place / "data.txt"
        file.write_bytes(content)
    line = error("train", "tiny.py", f"data.uri={file}", "data.heldout_by=tail", "--run", "runs/none", *changes)
    assert re.search(says, line)
    assert not (place / "runs/none").exists()


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
def test_a_run_that_is_stopped_ends_with_the_signals_status_and_goes_on_by_the_same_line(
    number: int, status: int, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
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
    assert "goes on with its own config: steps is 4 there, 9 here" in capsys.readouterr().err


def test_a_folder_that_holds_no_run_is_answered_with_the_runs_nearby(place: Path, error: Any):
    assert "did you mean runs/" in error("generate", ".")
    assert "did you mean runs/tiny?" in error("generate", "runs/tini")
    assert re.search("did you mean .*/runs/tiny[?]", error("generate", "runs/tiny/checkpoints"))


def test_prepared_shards_are_trained_on(place: Path, output: Any):
    options = ("--tokenizer", "byte", "--separator", "\n", "--heldout", "0.2")
    manifest = json.loads(output("prepare", "text.txt", "--out", "shards", *options, "--json"))
    assert (
        manifest["splits"]["train"]["bytes"] + manifest["splits"]["heldout"]["bytes"]
        == (place / "text.txt").stat().st_size
    )
    output("train", "tiny.py", "data.uri=shards", "--run", "runs/shards", "steps=2", "prompts=")
    assert (place / "runs/shards/checkpoints/2").is_dir()


@pytest.mark.parametrize("text", ["plain words", "tab\tand\nline", "naïve 漢字 🙂", "<|endoftext|>", ""])
def test_ids_decode_to_the_text_that_they_were(text: str, output: Any):
    found = json.loads(output("tokenize", text, "--tokenizer", "runs/tiny", "--json"))
    assert found["text"] == text
    assert len(found["ids"]) == len(text.encode())
    if text:
        ids = [str(token) for token in found["ids"]]
        assert output("tokenize", "--tokenizer", "runs/tiny", "--decode", *ids) == text + "\n"


def test_only_when_asked_is_text_read_as_the_special_token(output: Any):
    assert json.loads(output("tokenize", "a<|endoftext|>", "--special", "--json"))["ids"] == [97, 256]


def test_a_tokenizer_trained_here_makes_fewer_tokens(place: Path, output: Any, error: Any):
    assert output("tokenize", "--train", "text.txt", "--vocab", "300", "--out", "new/tok").startswith("300 ids")
    assert json.loads(output("tokenize", "little", "--tokenizer", "new/tok", "--json"))["ids"] != list(b"little")
    assert "4 tokens" not in output("tokenize", "little model", "--tokenizer", "byte")
    assert "new folder" in error("tokenize", "--train", "text.txt", "--out", "new/tok")
    assert [path.name for path in (place / "new").iterdir()] == ["tok"]


def test_every_recipe_is_listed_with_its_first_line(output: Any):
    listed = json.loads(output("configs", "--json"))
    assert list(listed) == list(recipes())
    for name, path in recipes().items():
        assert re.search(rf"^{name} +{re.escape(listed[name])}$", output("configs"), re.MULTILINE)
        assert recipe_docstring(path).startswith(listed[name])
        assert listed[name].endswith(".")
