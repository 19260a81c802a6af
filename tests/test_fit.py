"""A run from Python: `fit`, `resume`, and the run that they return."""

import json
from pathlib import Path
from typing import Any

import jax
import jaxtyping
import numpy as np
import optax
import pytest
from tiny_run import console, said, tiny, write_corpus

import llm_jax as lj
from llm_jax.runs import data as data_module
from llm_jax.runs import fit as fit_module
from llm_jax.runs.report import card


def halved(model, params, batch, key):
    loss, _ = lj.cross_entropy(lj.forward_batch(model, params, batch, key).logits, batch.targets)
    return loss.sum() / 2, {"nll": loss.sum()}


class Watch:
    """Notes the steps that it sees, and stops at one of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[int] = []
        self.stop = stop

    def __call__(self, step: int, state: Any, metrics: Any) -> dict[str, jax.Array]:
        self.seen.append(step)
        if step == self.stop:
            raise lj.Stop("this is enough")
        return {"width": optax.tree.norm(state.params), "ratio": metrics["nll"] / metrics["loss"]}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory):
    """A run with code of its own that a callback stopped at step 5 of 8, the callback, and what was printed."""
    folder, watch, by = tmp_path_factory.mktemp("fit"), Watch(stop=5), console()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(folder / "cache"))
        config = tiny(write_corpus(folder / "corpus"), mesh=lj.MeshConfig(data=8))
        run = lj.fit(config, folder / "run", loss=halved, optimizer=optax.adam(1e-3), metrics=watch, console=by)
        yield run, watch, said(by)


def test_a_callback_sees_every_step_adds_metrics_and_stops_the_run(stopped):
    run, watch, text = stopped
    assert watch.seen == [1, 2, 3, 4, 5] == run.metrics["step"].tolist()
    assert (run.progress.step, run.progress.stopped) == (5, True)
    assert "step 5: this is enough" in text
    np.testing.assert_allclose(run.metrics["ratio"][:4], 2, rtol=1e-6)
    assert np.isnan(run.metrics["width"][4])  # it stopped before it could return one
    assert np.isfinite(run.metrics["width"][:4]).all()


def test_a_run_returns_what_it_last_measured_and_evaluates_to_the_same(stopped):
    run, _, _ = stopped
    losses = run.metrics["heldout_loss"]
    assert run.progress.heldout_loss == pytest.approx(losses[4])  # where the callback ended it
    assert run.step == 1 + np.nanargmin(losses)
    assert run.evaluate().loss == pytest.approx(np.nanmin(losses), rel=1e-5)
    assert "Run(" in repr(run)


def test_metrics_are_columns_with_nan_where_a_row_has_no_number(stopped):
    columns = stopped[0].metrics
    assert {len(column) for column in columns.values()} == {5}
    assert np.isnan(columns["heldout_loss"]).tolist() == [True, True, True, False, False]


WRONG_OPTIONS = {
    "temprature": "temperature",
    "max_new_tokens": "max_tokens",
    "greedy": "temperature=0",
    "topk": "top_k",
}


@pytest.fixture
def unchecked():
    """Arguments of any type reach the code, as with a user, whom no type checker stops."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_one_text_is_one_prompt_and_one_stop_text_everywhere(stopped):
    run, _, _ = stopped
    options = {"temperature": 0.0, "max_tokens": 4}
    one = run.sampler.generate(["abc"], **options)
    assert one == run.generate("abc", **options) == run.sampler.generate("abc", lj.Sampling(0.0), max_tokens=4)
    assert [text.prompt for text in run.sampler.texts("abc", **options)] == ["abc"]
    assert {piece.row for piece in run.sampler.stream("abc", **options)} == {0}
    whole = run.generate("abc", max_tokens=12)[0]
    assert run.generate("abc", max_tokens=12, stop=whole[4:6]) == run.generate("abc", max_tokens=12, stop=[whole[4:6]])


def test_what_is_no_prompt_is_refused_in_a_line(stopped, unchecked):
    run, _, _ = stopped
    for wrong in (3, ["ab", 3], [[97]], b"ab"):
        with pytest.raises(ValueError, match=r"prompts= takes a text, or a list of them; got"):
            run.generate(wrong)
    for options, says in (
        ({"stop": 3}, "stop= takes a text"),
        ({"max_tokens": "9"}, "max_tokens='9'"),
        ({"seed": 0.5}, "seed"),
    ):
        with pytest.raises(ValueError, match=says):
            run.generate("ab", **options)
    with pytest.raises(ValueError, match=r"takes a Sampling, got 0.5; write temperature=0.5"):
        run.generate("ab", 0.5)
    with pytest.raises(ValueError, match=r"is no classifier; use run.generate\(prompts\)"):
        run.classify("ab")


def test_a_sampler_takes_a_tokenizer_by_name_and_refuses_other_models(stopped):
    run, _, _ = stopped
    config, params = run.config.model, run.params
    by_name = lj.Sampler(config, params, "byte")
    assert by_name.generate("ab", temperature=0, max_tokens=3) == run.generate("ab", temperature=0, max_tokens=3)
    for wrong, says in (
        ((run.model, params), r"takes a ModelConfig, got a Transformer; give its \.config"),
        ((run.config, params), r"takes a ModelConfig, got a RunConfig; give its \.model"),
        ((config, {"params": params}), r"which have 'embedding' among them; give variables\[\"params\"\]"),
        ((config, None), r"are no parameters of this model"),
    ):
        with pytest.raises(ValueError, match=says):
            lj.Sampler(*wrong, "byte")


def test_what_is_no_row_of_tokens_and_no_array_is_refused_in_a_line(stopped, unchecked):
    run, _, _ = stopped
    model, params, row = run.model, run.params, run.tokens("ab")
    for wrong, says in (
        (row[0], r"got shape \(3,\) of int32; give tokens\[None\]"),
        (["ab"], r"got list; give an array, or run\.tokens\(text\)"),
        (row / 2, r"got shape \(1, 3\) of float32; give whole numbers"),
    ):
        for use in (lj.capture, lj.forward):
            with pytest.raises(ValueError, match=rf"tokens are rows of ids, \[B, L\]; {says}"):
                use(model, params, wrong)
    for use in (run.tokens, run.capture):
        with pytest.raises(ValueError, match="takes one text, got a list; call it for each text"):
            use(["ab", "c"])
    for wrong, says in (
        ({"attn_out": np.zeros_like}, r"a function, not an array"),
        ({"attn_out": 0.0}, "float"),
        (3, "edits="),
    ):
        with pytest.raises(ValueError, match=says):
            run.edit("ab", wrong)


def test_a_run_scores_documents_as_fit_takes_them(stopped, monkeypatch, tmp_path: Path):
    run, _, _ = stopped
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    texts = ["ab cd", "efgh ab", "a"]
    found = run.evaluate(texts)
    assert (found.documents, found.bytes) == (3, 13)
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text)
    assert run.evaluate(tmp_path / "texts").loss == pytest.approx(found.loss)
    assert run.evaluate([run.tokenizer.encode(text) for text in texts]).loss == pytest.approx(found.loss)
    with pytest.raises(ValueError, match="column='body' is for rows at an address; leave it out with documents"):
        run.evaluate(texts, column="body")
    with pytest.raises(
        ValueError, match=r"'a text, not a path' is no file.*to score a text itself give a list: \[text\]"
    ):
        run.evaluate("a text, not a path")


def test_an_edit_of_fewer_layers_than_the_model_has_is_refused(stopped):
    run, _, _ = stopped
    with pytest.raises(ValueError, match=r"first axis is the layers that have it, 2; `capture` shows the shape"):
        run.edit("ab", {"attn_out": run.capture("ab")["attn_out"][:1]})


def test_a_fit_of_no_config_says_how_to_get_one(unchecked, tmp_path: Path):
    for wrong, says in (
        ("quickstart", r"got a str; give llm_jax\.recipe\('quickstart'\)"),
        (3, r"got a int; give RunConfig"),
    ):
        with pytest.raises(ValueError, match=rf"config= takes a RunConfig, {says}"):
            lj.fit(wrong, tmp_path / "run")


def test_the_weights_of_a_teacher_are_restored_while_a_loss_is_traced(stopped):
    run = lj.Run.open(stopped[0].folder)
    norm = jax.jit(lambda: optax.tree.norm(run.params))()
    np.testing.assert_allclose(norm, optax.tree.norm(stopped[0].params), rtol=1e-6)


def test_a_run_is_found_from_another_working_directory(stopped, tmp_path: Path, monkeypatch):
    folder = stopped[0].folder
    monkeypatch.chdir(folder.parent)
    run = lj.Run.open(folder.name)
    assert str(run.folder) == folder.name
    monkeypatch.chdir(tmp_path)
    assert run.folder == folder
    assert len(run.metrics["step"]) == 5


def test_what_is_no_path_of_a_folder_is_refused(unchecked, config):
    for begin in (lambda: lj.fit(config, None), lambda: lj.resume(3), lambda: lj.Run.open(None)):
        with pytest.raises(ValueError, match="the folder of a run is a path, such as 'runs/a'; got"):
            begin()


def test_a_run_in_a_line_says_how_far_it_came(stopped):
    run, _, _ = stopped
    last = run.metrics["loss"][-1]
    assert str(run) == f"run {run.folder}: newest checkpoint of step 5, 5 of 8 steps, last loss {last:.4f}"


def test_a_run_generates_by_the_fields_of_sampling_and_refuses_others(stopped):
    run, _, _ = stopped
    one = run.generate(["ab", "c"], temperature=0.0, max_tokens=4)
    assert one == run.generate(["ab", "c"], lj.Sampling(temperature=0.0), max_tokens=4)
    assert run.sampler is run.sampler
    for wrong, meant in WRONG_OPTIONS.items():
        for ask in (run.generate, run.sampler.generate):
            with pytest.raises(ValueError, match=rf"{wrong}= is no way to sample; did you mean .*{meant}"):
                ask("ab", **{wrong: 1})
    with pytest.raises(ValueError, match="sampling= and temperature= both say how to sample"):
        run.generate("ab", lj.Sampling(), temperature=1.0)


def test_a_run_captures_its_activations_and_computes_with_edited_ones(stopped):
    run, _, _ = stopped
    taps, (_, length) = run.capture("ab cd"), run.tokens("ab cd").shape
    assert taps["resid_pre"].shape == (2, 1, length, 32)
    np.testing.assert_allclose(run.edit("ab cd", {"resid_post": taps["resid_post"]}), taps["logits"], atol=1e-5)


def test_a_notebook_shows_a_run_and_a_config(stopped):
    run, _, _ = stopped
    assert run._repr_html_() == card(run.folder)
    assert "<svg" in run._repr_html_()
    assert "<code>optimizer.warmup_steps</code></td><td><b>2</b>" in run.config._repr_html_()


def test_resume_says_before_the_first_step_what_code_it_needs(stopped):
    run, _, _ = stopped
    record = json.loads((run.folder / "code.json").read_text())
    assert record["loss"]["path"] == f"{__name__}:halved"
    with pytest.raises(ValueError, match=r"was trained with optimizer= from no module of its own"):
        lj.resume(run.folder, console=console())
    with pytest.raises(
        ValueError, match=r"the optimizer= that was passed does not do what the optimizer does that .* was trained with"
    ):
        lj.resume(run.folder, optimizer=optax.adam(2e-3), console=console())
    assert len(run.metrics["step"]) == 5


@pytest.mark.slow
def test_a_run_with_own_code_resumes_with_it(stopped):
    run, _, _ = stopped
    again = lj.resume(run.folder, optimizer=optax.adam(1e-3), console=console())
    assert (again.progress.step, again.progress.stopped) == (8, False)
    assert again.metrics["step"].tolist() == list(range(1, 9))


def test_a_metric_that_is_there_already_is_refused(config, tmp_path: Path):
    def again(step: int, state: Any, metrics: Any) -> dict[str, Any]:
        return {"loss": metrics["loss"]}

    with pytest.raises(ValueError, match=r"a callback returned a metric 'loss', and metrics\.jsonl has one so called"):
        lj.fit(config, tmp_path / "run", metrics=[again], console=console())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("metrics", ["loss", 3, [print, 3], lambda state: None], ids=["name", "number", "list", "one"])
def test_what_is_no_callback_is_refused_before_any_data(metrics: Any, unchecked, config, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(fit_module, "open_data", None)
    with pytest.raises(ValueError, match=r"metrics=.* is not a function \(step, state, metrics\) -> "):
        lj.fit(config, tmp_path / "run", metrics=metrics, console=console())


def test_texts_of_a_program_are_read_whatever_column_the_config_has(config, tmp_path: Path, monkeypatch):
    class Opened(Exception):
        pass

    def opened(config: Any, folder: Path, console: Any, shards: Any, *_: Any) -> None:
        raise Opened(shards.split("train").n_documents + shards.split("heldout").n_documents)

    monkeypatch.setattr(fit_module.Session, "open", opened)
    texts = [f"text number {n}" for n in range(30)]
    with pytest.raises(Opened, match="30"):
        lj.fit(lj.replace(config, {"data.column": "body"}), tmp_path / "run", data=texts, console=console())


def test_resume_takes_no_other_documents_than_the_run_began_with(stopped):
    run, _, _ = stopped
    with pytest.raises(
        ValueError, match=r"data= holds other documents than .*; leave it out, or start a new run on these"
    ):
        lj.resume(run.folder, optimizer=optax.adam(1e-3), data=["other texts"], console=console())


def test_documents_that_are_gone_can_be_given_again(stopped, tmp_path: Path, monkeypatch):
    run, _, _ = stopped
    config = lj.replace(run.config, {"data.uri": str(tmp_path / "given" / "0123.jsonl")})
    monkeypatch.setattr(data_module.run_folder, "shards_folders", lambda *_: [tmp_path / "gone"])
    with pytest.raises(ValueError, match=r"give them again: llm_jax.resume\(.*, data=...\), or score others"):
        data_module.open_run_data(run.folder, config, print)


def test_a_recipe_is_a_config_with_changes(unchecked):
    config = lj.recipe("quickstart", "steps=200", "data.batch_size=16")
    assert (config.steps, config.data.batch_size) == (200, 16)
    with pytest.raises(ValueError, match=r"did you mean model\.n_layers=3"):
        lj.recipe("quickstart", "n_layer=3")
    assert lj.recipe("quickstart", "steps=200", **{"data.batch_size": 16}) == config
    assert lj.recipe("quickstart", {"data.batch_size": 16}, steps=200) == config
    with pytest.raises(ValueError, match="steps is set twice; keep one of them"):
        lj.recipe("quickstart", {"steps": 3}, steps=4)
    with pytest.raises(ValueError, match=r"expected 'key=value' or \{key: value\}, got 3"):
        lj.replace(config, 3)
    assert lj.recipe("quickstart", steps=3, **{"data.seq_len": 9}).data.seq_len == 9
    with pytest.raises(ValueError, match="steps takes a whole number, got '3'"):
        lj.recipe("quickstart", steps="3")
