"""A damaged run folder gives what it gave, or one line that says what is damaged: never another number."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from arrays import quiet
from tiny_run import console, evaluated, tiny, write_corpus

from llm_jax import log, tree
from llm_jax.data.shards import open_shards
from llm_jax.runs.checkpoint import Checkpoints
from llm_jax.runs.fit import fit
from llm_jax.runs.folder import check_data, first_machine, load_config, shards_folders, tokenizer_of_run
from llm_jax.runs.report import write_report
from llm_jax.runs.seal import changes, seal_of_folder
from llm_jax.train.program import Program

pytestmark = pytest.mark.slow

BESIDE = 800  # damages to the files beside the checkpoints
INSIDE = 150  # to those of a checkpoint, which are read by Orbax
VALUES = ("null", "[]", "{}", "-1", "0", "1e999", "NaN", '"x"', "true", "99999999999999999999", "[[[]]]", '{"a": 1}')

Damage = Callable[[random.Random, bytes], bytes]


def truncated(draw: random.Random, content: bytes) -> bytes:
    return content[: draw.randrange(len(content))]


def flipped(draw: random.Random, content: bytes) -> bytes:
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :]


def cut(draw: random.Random, content: bytes) -> bytes:
    first, last = sorted(draw.randrange(len(content)) for _ in range(2))
    return content[:first] + content[last + 1 :]


def doubled(draw: random.Random, content: bytes) -> bytes:
    first, last = sorted(draw.randrange(len(content)) for _ in range(2))
    return content[:last] + content[first:]


def a_digit_away(draw: random.Random, content: bytes) -> bytes:
    digits = [place for place, byte in enumerate(content) if 48 <= byte <= 57]
    if not digits:
        return content[::-1]
    place = draw.choice(digits)
    return content[:place] + str((content[place] - 48 + draw.randrange(1, 10)) % 10).encode() + content[place + 1 :]


def another_value(draw: random.Random, content: bytes) -> bytes:
    """JSON in which one value is replaced by another of any kind."""
    try:
        found = json.loads(content.split(b"\n")[0] if content.count(b"}\n{") else content)
    except ValueError:
        return b"null"
    groups: list[Any] = [found]
    for group in groups:
        inside = group.values() if isinstance(group, dict) else group
        groups += [x for x in inside if isinstance(x, dict | list) and x]
    group = draw.choice([group for group in groups if group])
    key = draw.choice(list(group)) if isinstance(group, dict) else draw.randrange(len(group))
    group[key] = "SLOT"
    return json.dumps(found).replace('"SLOT"', draw.choice(VALUES)).encode() + b"\n"


DAMAGES: tuple[Damage, ...] = (truncated, flipped, cut, doubled, a_digit_away, another_value)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of three steps that has sampled, what it is, and its program."""
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(folder / "cache"))
        config = tiny(write_corpus(folder / "corpus"), steps=3, prompts=("ab",), sample_every=3)
        fit(config, folder / "run", console=console())
        program = Program.on_one_device(config)
        yield folder / "run", program, seal_of_folder(folder / "run"), weights(folder / "run", program)


def weights(folder: Path, program: Program) -> dict[int, str]:
    """What the weights of a folder are, by their step."""
    with Checkpoints(folder, read_only=True) as checkpoints:
        params, step = checkpoints.restore_params(program.abstract_state.params, quiet, "last")
    return {step: tree.fingerprint(params)}


def one_line_or(read: Callable[..., Any], *given: Any) -> Any:
    """What `read` gives; None where it raises `ValueError` in one line. Nothing else may come of it."""
    try:
        return read(*given)
    except ValueError as error:
        said = str(error)
    assert len(said.strip().splitlines()) == 1, said
    assert len(said) > 20, said
    return None


def damaged(draw: random.Random, path: Path) -> None:
    content = path.read_bytes()
    if draw.random() < 0.05:
        path.unlink()
    else:
        path.write_bytes(draw.choice(DAMAGES)(draw, content) if content else b"{")


def test_a_damaged_file_beside_the_checkpoints_changes_no_number(finished, tmp_path: Path):
    whole, program, seal, expected = finished
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    files = [path for path in files if path.parts[0] not in ("checkpoints", "report.html", ".lock")]
    run, draw, read = shutil.copytree(whole, tmp_path / "run"), random.Random(0), 0
    for number in range(BESIDE):
        path = draw.choice(files)
        damaged(draw, run / path)
        for reader in (write_report, log.read, first_machine, tokenizer_of_run):
            one_line_or(reader, run)
        one_line_or(log.missing, run, 3)
        one_line_or(shards_folders, run, load_config(whole))
        config, here = one_line_or(load_config, run), one_line_or(seal_of_folder, run)
        if config is not None and here is not None and number % 8 == 0:
            found = one_line_or(weights, run, program)
            assert found in (None, expected), path
            # What is sealed is as it was, or else the weights are not given.
            assert (found is None) == bool(changes(seal, here)), path
            read += found is not None
        shutil.copy(whole / path, run / path)
    assert read > BESIDE / 100


def test_a_damaged_file_of_a_checkpoint_gives_no_other_weights(finished, tmp_path: Path):
    whole, program, _, expected = finished
    files = sorted(path.relative_to(whole) for path in (whole / "checkpoints" / "3").rglob("*") if path.is_file())
    run, draw, known = shutil.copytree(whole, tmp_path / "run"), random.Random(1), dict(expected)
    for step in (path.name for path in (whole / "checkpoints").iterdir() if path.name != "3"):
        with Checkpoints(whole, read_only=True) as checkpoints:
            params, _ = checkpoints.restore_params(program.abstract_state.params, quiet, step)
        known[int(step)] = tree.fingerprint(params)
    for _ in range(INSIDE):
        path = draw.choice(files)
        damaged(draw, run / path)
        for step, found in (one_line_or(weights, run, program) or {}).items():
            assert found == known[step], path
        shutil.copy(whole / path, run / path)


def test_a_damaged_folder_is_evaluated_as_it_was_or_not_at_all(finished, tmp_path: Path):
    whole, *_ = finished
    expected = evaluated(whole)[0].loss
    run, draw = shutil.copytree(whole, tmp_path / "run"), random.Random(2)
    for name in ("config.json", "data.json", "environment.json", "metrics.jsonl") * 6:
        damaged(draw, run / name)
        found = one_line_or(evaluated, run)
        assert found is None or found[0].loss == pytest.approx(expected, rel=1e-6), name
        shutil.copy(whole / name, run / name)


def test_data_that_is_not_what_a_run_began_with_is_one_line(finished, tmp_path: Path):
    whole, *_ = finished
    run, draw = shutil.copytree(whole, tmp_path / "run"), random.Random(3)
    shards = open_shards(*shards_folders(run, load_config(run)))
    for _ in range(100):
        damaged(draw, run / "data.json")
        one_line_or(check_data, run, shards)
        shutil.copy(whole / "data.json", run / "data.json")
