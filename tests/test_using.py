"""`llm-jax generate` and `llm-jax evaluate` as a user types them, on a model of one layer."""

import io
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from llm_jax.cli.main import main
from llm_jax.runs import folder as run_folder
from llm_jax.runs import restore
from llm_jax.runs.evaluate import Evaluation
from llm_jax.runs.run import Run


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
        patch.setattr(Run, "evaluate", lambda *_, **__: found)
        said = json.loads(output("evaluate", "runs/tiny", "--json"), parse_constant=pytest.fail)
    assert (said["loss"], said["perplexity"], said["bits_per_byte"], said["tokens"]) == (None, None, None, 3)
    assert (said["loss_interval"], said["bits_per_byte_interval"]) == ([None, None], [None, None])


def test_another_text_is_scored_whole(workspace: Path, output: Any):
    (workspace / "other.txt").write_text("so ein anderer Text\nnoch einer\n")
    found = json.loads(output("evaluate", "runs/tiny", "--data", str(workspace / "other.txt"), "--json"))
    assert (found["documents"], found["bytes"]) == (2, 31)


def test_text_that_is_one_document_has_no_interval(workspace: Path, capsys: pytest.CaptureFixture[str]):
    (workspace / "one.txt").write_text("ein Text")
    words = ["evaluate", "runs/tiny", "--data", str(workspace / "one.txt")]
    assert main(words) == 0
    out, err = capsys.readouterr()
    assert re.search(r"^loss +\d+\.\d{4}   -$", out, re.MULTILINE)
    assert f"scoring all of {workspace}/one.txt: 9 tokens of 1 documents\n" in err
    assert "train" not in err
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [found[f"{name}_interval"] for name in ("loss", "perplexity", "bits_per_byte")] == [None] * 3


@pytest.mark.parametrize("which", ["best", "last", "4"])
def test_the_newest_good_weights_replace_damaged_ones_of_no_named_step(which: str, workspace: Path):
    copy, told = shutil.copytree(workspace / "runs/tiny", workspace / f"runs/damaged-{which}"), []
    shutil.rmtree(copy / "checkpoints/4/params")
    program = restore.on_one_device(run_folder.load_config(copy))
    if which == "4":
        with pytest.raises(ValueError, match=r"no checkpoint that can be read \(tried \[4\]\)"):
            restore.weights(copy, program, which, report=told.append)
    else:
        assert restore.weights(copy, program, which, report=told.append)[1] == 2
    assert "passed over the checkpoint of step 4" in told[0]


def test_records_are_scored_though_the_run_cut_its_text_at_a_separator(workspace: Path, output: Any):
    (workspace / "other.jsonl").write_text('{"text": "so ein anderer Text"}\n{"text": "noch einer"}\n')
    found = json.loads(output("evaluate", "runs/tiny", "--data", str(workspace / "other.jsonl"), "--json"))
    assert (found["documents"], found["bytes"]) == (2, 29)


def test_prepared_shards_are_scored_whole_if_their_tokens_are_the_runs(workspace: Path, output: Any, error: Any):
    options = ("--separator", "\n", "--heldout", "0.3")
    output("prepare", "text.txt", "--out", "ours", "--tokenizer", "runs/tiny/tokenizer", *options)
    found = json.loads(output("evaluate", "runs/tiny", "--data", "ours", "--json"))
    assert (found["documents"], found["bytes"]) == (200, (workspace / "text.txt").stat().st_size)
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


def test_a_draft_leaves_greedy_text_as_it_is_and_says_what_it_kept(capsys: pytest.CaptureFixture[str], output: Any):
    words = ("generate", "runs/tiny", "--prompt", "the words", "--temperature", "0", "--max-tokens", "16")
    alone = output(*words)
    for draft in ("lookup", "runs/tiny"):
        assert main([*words, "--draft", draft]) == 0
        out, err = capsys.readouterr()
        assert out == alone
        assert re.search(r"^draft: \d+ of \d+ tokens kept, \d+%$", err, re.MULTILINE)
    text = json.loads(output(*words, "--draft", "runs/tiny", "--json"))["texts"][0]
    assert text["kept"] == text["drafted"] > 0


def test_int8_weights_generate(output: Any):
    assert output("generate", "runs/tiny", "--prompt", "the", "--weights", "int8", "--max-tokens", "4")


@pytest.mark.parametrize(("piped", "prompts"), [("the\na\n", ["the", "a"]), ("", ["a little"])])
def test_prompts_come_from_a_pipe_or_else_from_the_run(
    piped: str, prompts: list[str], output: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sys.stdin", io.StringIO(piped))
    texts = json.loads(output("generate", "runs/tiny", "--max-tokens", "8", "--json"))["texts"]
    assert [text["prompt"] for text in texts] == prompts
    assert {text["finish"] for text in texts} <= {"length", "end_of_text"}


def test_a_prompt_longer_than_the_context_is_refused(error: Any):
    assert "a prompt of 41 tokens leaves no room in model.max_seq_len=32" in error(
        "generate", "runs/tiny", "--prompt", "x" * 40
    )


def test_a_folder_that_holds_no_run_is_answered_with_the_runs_nearby(workspace: Path, error: Any):
    assert "did you mean runs/" in error("generate", ".")
    assert "did you mean runs/tiny?" in error("generate", "runs/tini")
    assert re.search("did you mean .*/runs/tiny[?]", error("generate", "runs/tiny/checkpoints"))
