"""What a user types is understood, and what goes wrong is said on one line."""

import errno
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from llm_jax import __version__
from llm_jax.cli.main import SYNTAX, main, parser
from llm_jax.keys import OPTIONS

VERBS = ["train", "resume", "prepare", "generate", "evaluate", "show", "compare", "import", "export", "configs"]
VERBS += ["tokenize"]
RECIPE = """
from llm_jax.model.config import ModelConfig
from llm_jax.train.config import RunConfig

config = RunConfig(model=ModelConfig(vocab_size=264, d_model=16, n_layers=1, n_heads=2, max_seq_len=256))
"""


def said(capsys: pytest.CaptureFixture[str], status: int, expected: int = 2) -> str:
    """The one line of an error."""
    out, err = capsys.readouterr()
    assert (status, out) == (expected, "")
    assert err.startswith("llm-jax: error: ")
    assert err.count("\n") == 1, err
    return err


@pytest.mark.smoke
@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_explains_it_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert re.search(rf"^  llm-jax {verb}", capsys.readouterr().out, re.MULTILINE)


def test_no_words_at_all_are_a_call_for_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main([])
    help = capsys.readouterr().out
    assert [verb for verb in VERBS if f"    {verb} " not in help] == []


def test_changes_of_the_config_may_stand_anywhere():
    words, reads = ["train", "quickstart", "a=1", "--run", "r", "b=2", "--debug", "c=3"], parser()
    for args in (reads.parse_args(words), reads.parse_args(words)):
        assert (args.config, args.assignments, args.run) == ("quickstart", ["a=1", "b=2", "c=3"], "r")
    args = reads.parse_args(["generate", "r", "--prompt", "a", "--prompt", "b", "--stop", "c", "--stop", "d"])
    assert (args.prompt, args.stop) == (["a", "b"], ["c", "d"])


def test_every_option_that_is_meant_by_other_names_is_one_of_a_verb():
    verbs: Any = parser()._actions[-1].choices
    actions = [action for each in verbs.values() for action in each._actions]
    known = {name for action in actions for name in (*action.option_strings, action.metavar)}
    assert {option.split()[0] for option in OPTIONS} <= known


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("trian quickstart", "'trian' is not known; did you mean 'train'"),
        ("prepare x --out y --heldout-by tial", "did you mean 'tail'"),
        ("help trian", "'trian' is not known; did you mean 'train'"),
        ("resume", "required: RUN; see llm-jax resume --help"),
        ("train", "required: CONFIG; see llm-jax train --help"),
        ("generate runs/x steps=5", r"generate takes no 'steps=5' \(its config is that of the run\); see llm-jax gen"),
        ("generate runs/x --promt a", r"has no option --promt; did you mean --prompt\?; see llm-jax generate --help"),
        ("generate runs/x --sam 2", "generate has no option --sam; see llm-jax generate --help"),
        ("train x --stepz 5", "train has no option --stepz; .* without dashes: steps=5; see llm-jax train --help"),
        ("train x --steps=5", "train has no option --steps; .* without dashes: steps=5; see"),
        ("show x --batch-size 5 --json", "without dashes: data.batch_size=5; see llm-jax show --help"),
        ("train x --lr 3e-4", "without dashes: optimizer.learning_rate=3e-4; see"),
        ("train x --zzz", "without dashes: such as model.n_layers=8; see"),
        ("generate runs/x --top-k many", "--top-k: takes a whole number, got 'many'; see"),
        ("generate runs/x --max-tokens 1_000", "--max-tokens: takes a whole number, got '1_000'; write 1000; see"),
        ("generate runs/x --sample 3", r"no option --sample; did you mean --samples\?; see"),
        (
            "plan --config quickstart --topology v5e:4x4",
            r"no option --config; did you mean CONFIG, a word without dashes\?; see",
        ),
        ("train quickstart --out runs/a", r"no option --out; did you mean --run\?; see"),
        ("generate runs/x --max_new_tokens 5", r"no option --max_new_tokens; did you mean --max-tokens\?; see"),
        ("generate runs/x --max-length=5", r"no option --max-length; did you mean --max-tokens\?; see"),
        ("generate runs/x --num-return-sequences 5", r"did you mean --samples\?; see"),
        ("generate runs/x --do-sample", r"did you mean --temperature\?; see"),
        ("generate runs/x --greedy", r"did you mean --temperature 0\?; see"),
        ("generate runs/x -n 5", r"no option -n; did you mean --max-tokens, or --samples\?; see"),
        ("generate --model runs/x", r"no option --model; did you mean RUN, a word without dashes\?; see"),
        ("train --config quickstart", r"did you mean CONFIG, a word w.*; see"),
        ("evaluate runs/x --dataset text.txt", r"did you mean --data\?; see"),
        ("train x --output_dir runs/y", r"did you mean --run\?; see"),
        ("train x steps = 20", "error: a key and its value are one word, .*; write steps=20; see llm-jax train --help"),
        ("train x steps =20 --run y", "; write steps=20; see"),
        ("train x --run y prompts = a;b", "; write 'prompts=a;b'; see"),
        ("show steps = 20", "; write steps=20; see"),
        ("train x --run a --json --run b", "--run is given twice, 'a' and 'b'; keep one of them; see"),
        ("generate runs/x --top-k=5 --top-k 6", "--top-k is given twice, 5 and 6; keep one of them; see"),
        ("generate runs/x --temperature nan", "--temperature: takes a number, got 'nan'; see"),
    ],
)
def test_words_that_make_no_sense_are_named(words: str, says: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        main(words.split())
    assert re.search(says, said(capsys, stop.value.code))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("train quickstrat", "did you mean 'quickstart'"),
        ("train {recipe} model.n_layer=2", r"unknown config key 'model.n_layer'; did you mean model.n_layers=2\?"),
        ("train {recipe} optimizer=lion", r"optimizer is a group of keys; did you mean optimizer.name=lion\?"),
        ("train {recipe} model.vocab_size=2147483648", "more than int32 can count; use at most 2147483647"),
        ("train {recipe} seed=1 seed=2", "seed is set twice, to '1' and to '2'; keep one"),
        ("train {recipe} steps=many", "steps takes a whole number, got 'many'"),
        ("train {recipe} steps", "expected key=value, got 'steps'"),
        ("train {recipe} steps= 20", "expected key=value, got '20'; for example model.n_layers=8, without blanks"),
        ("train {recipe} model.n_heads=3", "model.n_heads=3 does not divide model.d_model=16; .*d_model=15 or 18"),
        ("show {recipe} accumulate=3", "accumulate=3 does not divide data.batch_size=16"),
        ("show {broken}", "fails: NameError: name 'widht' is not defined"),
        ("show {nothing}", "nothing.py"),
        (
            "resume {nowhere}",
            "holds no run .*start one with: llm-jax train quickstart --run .*/nowhere, or llm_jax.fit",
        ),
        ("show {recipe} --config steps=0", "steps=0 must be at least 1"),
        ("configs quickstrat", "did you mean 'quickstart'"),
        ("generate {nowhere} --prompt x --samples 0", "--samples 0 generates nothing"),
        ("evaluate {nowhere}", "holds no run"),
        ("tokenize x --tokenizer gtp2", "unknown tokenizer 'gtp2'.*did you mean 'gpt2'"),
        ("tokenize --decode 300 --tokenizer byte", "300 is not an id of byte"),
        ("tokenize --train {recipe}", "add --out DIR"),
        ("tokenize x --column text", "--column text .*; add --train URI"),
        ("evaluate {nowhere} --column text", "--column text .*; add --data URI"),
        ("tokenize --train foo://bar --out {nowhere}", "cannot read foo://bar: Protocol not known: foo; fsspec reads"),
    ],
)
def test_what_cannot_be_is_refused_with_the_next_move(
    words: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    for name, text in (("recipe", RECIPE), ("broken", RECIPE.replace("d_model=16", "d_model=widht"))):
        (tmp_path / f"{name}.py").write_text(text)
    paths = {name: tmp_path / f"{name}.py" for name in ("recipe", "broken", "nothing")}
    status = main(words.format(**paths, nowhere=tmp_path / "nowhere").split())
    assert re.search(says, said(capsys, status))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.py", "recipe.py"]


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 2, "out of memory; use a smaller data.batch_size"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), 2, "out of memory; use"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 2, "no space left .*runs/x; make room"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), 2, "runs/x: Permission denied"),
        (ValueError("on\n  two lines"), 2, "error: on two lines\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_what_goes_wrong_is_said_on_one_line(
    error: BaseException,
    status: int,
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def fail(args: Namespace) -> None:
        raise error

    monkeypatch.setitem(SYNTAX, fail, ())
    assert re.search(says, said(capsys, main(["fail"]), status))
    assert main(["fail", "--debug"]) == status
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert re.search(says, err)


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("x")])
def test_a_fault_of_ours_is_not_passed_off_as_the_users(error: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(args: Namespace) -> None:
        raise error

    monkeypatch.setitem(SYNTAX, fail, ())
    with pytest.raises(type(error)):
        main(["fail"])


def printed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit, match="0"):
        main(words)
    return capsys.readouterr().out


def test_help_of_a_verb_is_its_help(capsys: pytest.CaptureFixture[str]):
    assert printed(["help", "train"], capsys) == printed(["train", "--help"], capsys)
    assert printed(["help"], capsys) == printed(["--help"], capsys)


def test_the_version_is_that_of_llm_jax_and_of_jax(capsys: pytest.CaptureFixture[str]):
    import jax

    assert printed(["--version"], capsys).startswith(f"llm-jax {__version__} (JAX {jax.__version__}, Python 3.")


def test_the_status_of_a_verb_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch):
    def stop(args: Namespace) -> int:
        return 143

    monkeypatch.setitem(SYNTAX, stop, ())
    assert main(["stop"]) == 143


def test_what_a_recipe_prints_is_no_part_of_the_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "recipe.py").write_text("print('loaded')" + RECIPE)
    for words in (["show"], ["show", "--config"], ["configs"]):
        assert main([*words, str(tmp_path / "recipe.py"), "--json"]) == 0
        out, err = capsys.readouterr()
        assert isinstance(json.loads(out), dict)
        assert err == "loaded\n"


@pytest.mark.parametrize("status", ["", "0", "3", "'no'"])
def test_a_recipe_that_ends_the_process_is_no_success(status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "recipe.py").write_text(f"raise SystemExit({status})")
    error = said(capsys, main(["show", str(tmp_path / "recipe.py"), "--json"]))
    assert "recipe.py fails: SystemExit" in error


def run(program: str, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, *words], text=True, stderr=-1, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("words", [["configs"], ["tokenize", "text"], ["train", "--help"]], ids=" ".join)
def test_what_needs_no_jax_answers_without_it(words: list[str]):
    program = """
import sys
from llm_jax.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print({"jax", "flax", "grain"} & set(sys.modules), file=sys.stderr)
"""
    assert run(program, *words, stdout=-1).stderr.strip() == "set()"


def test_a_reader_who_leaves_early_hears_no_complaint():
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    program = "import sys; from llm_jax.cli.main import main; sys.exit(main(['configs']))"
    done = run(program, stdout=write, env=buffered)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
