"""A finished run is used with the data and the tokens that it was trained on, or not at all."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from arrays import quiet
from tiny_run import console, evaluated, write_corpus

from llm_jax.data.prepare import prepare
from llm_jax.runs import folder as run_folder
from llm_jax.runs.data import all_text, open_text
from llm_jax.runs.fit import fit
from llm_jax.train.config import RunConfig


@pytest.fixture(scope="module")
def finished(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(config, folder, console=console())
    return folder


@pytest.mark.slow
def test_held_out_text_of_a_changed_corpus_is_not_scored(finished: Path, tmp_path: Path):
    kept = {name: (finished / name).read_text() for name in ("data.json", "config.json")}
    config = json.loads(kept["config.json"])
    config["data"]["uri"] = str(write_corpus(tmp_path / "corpus", documents=50))
    (finished / "config.json").write_text(json.dumps(config))
    (finished / "data.json").write_text(json.dumps(json.loads(kept["data.json"]) | {"folder": "deleted"}))
    with pytest.raises(ValueError, match=r"is not what .* has been trained on"):
        evaluated(finished)
    for name, text in kept.items():
        (finished / name).write_text(text)
    assert evaluated(finished)[0].documents > 0


@pytest.mark.slow
def test_a_mixture_is_scored_by_source_and_other_mixtures_too(config: RunConfig, tmp_path: Path):
    small = write_corpus(tmp_path / "small", documents=30, seed=1)
    mixed = dataclasses.replace(config, data=dataclasses.replace(config.data, uri=f"{config.data.uri}:0.7,{small}:0.3"))
    fit(dataclasses.replace(mixed, steps=4), tmp_path / "run", console=console())
    result, _ = evaluated(tmp_path / "run")
    first, second = result.sources.values()
    assert result.loss == pytest.approx(0.7 * first.loss + 0.3 * second.loss)
    assert (result.tokens, result.documents) == (first.tokens + second.tokens, first.documents + second.documents)

    for shards in run_folder.shards_folders(tmp_path / "run", run_folder.load_config(tmp_path / "run")):
        shutil.rmtree(shards)  # and are prepared again
    assert evaluated(tmp_path / "run")[0] == result

    others = [write_corpus(tmp_path / name, documents=n, seed=n) for name, n in (("x", 6), ("y", 9))]
    uri = f"{others[0]}:1,{others[1]}:3"
    result, _ = evaluated(tmp_path / "run", uri)
    assert [source.documents for source in result.sources.values()] == [6, 9]
    assert result.loss == pytest.approx(result.sources["x"].loss / 4 + result.sources["y"].loss * 3 / 4)
    assert result.bytes == sum(path.stat().st_size for other in others for path in other.iterdir())


def test_a_mixture_of_prepared_and_other_text_is_scored_whole(finished: Path, tmp_path: Path):
    prepared, text = (write_corpus(tmp_path / name, documents=n, seed=n) for name, n in (("x", 20), ("y", 9)))
    prepare(str(prepared), tmp_path / "out", tokenizer="byte", heldout=0.05, heldout_by="tail")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"story": "abc"}))
    uri = f"{tmp_path}/out:1,{text}:2,{tmp_path}/rows.jsonl:1"
    config = run_folder.load_config(finished)
    found = open_text(uri, finished, config, quiet, "story")
    whole, _ = all_text(found, config.data)
    assert [source.documents.stop - source.documents.start for source in whole.sources] == [20, 9, 1]
    assert [float(source.share) for source in whole.sources] == [0.25, 0.5, 0.25]
    prepare(str(prepared), tmp_path / "other", tokenizer="char", heldout=0.05, heldout_by="tail")
    with pytest.raises(ValueError, match=r"other is in the tokens of char, but .* knows those of byte"):
        open_text(uri.replace("/out:", "/other:"), finished, config, quiet, "story")


def test_any_text_is_scored_in_the_tokens_of_the_run(finished: Path, tmp_path: Path):
    corpus = write_corpus(tmp_path / "corpus", documents=7, seed=1)
    result, step = evaluated(finished, str(corpus), "last")
    assert (result.documents, step) == (7, 8)
    assert result.bytes == sum(path.stat().st_size for path in corpus.iterdir())


def test_rows_are_scored_by_a_column_of_their_own(finished: Path, tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"story": "abc" * n, "label": "d"}) + "\n" for n in range(1, 5)))
    with pytest.raises(ValueError, match="no 'text' or 'content' in its first rows, only 'story', 'label'"):
        evaluated(finished, str(rows), "last")
    result, _ = evaluated(finished, str(rows), "last", column="story")
    assert (result.documents, result.bytes) == (4, 30)
    prepare(str(rows), tmp_path / "out", tokenizer="byte", column="label", heldout=0.0)
    with pytest.raises(ValueError, match="is prepared already, of the column 'label'; leave out column=story"):
        evaluated(finished, str(tmp_path / "out"), "last", column="story")
