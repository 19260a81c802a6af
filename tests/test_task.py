"""A task asks for the answer, the model sees the question and no more, and the score is what it would answer."""

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grid import weights
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import console, evaluated, generate, said

from llm_jax import log, runtime
from llm_jax.cli.main import main
from llm_jax.config import override
from llm_jax.data import loader
from llm_jax.data.loader import IGNORE, Batch, DataConfig, Loader, heldout_rows
from llm_jax.data.prepare import prepare
from llm_jax.data.shards import Shards, open_shards
from llm_jax.data.task import Task, TaskConfig, resolve
from llm_jax.data.tokenizer import ByteTokenizer, CharTokenizer
from llm_jax.infer.classify import classify, probabilities
from llm_jax.infer.generate import Sampler
from llm_jax.model.config import ModelConfig
from llm_jax.model.transformer import Transformer, forward
from llm_jax.ops.sampling import Sampling
from llm_jax.plan import describe
from llm_jax.runs import folder as run_folder
from llm_jax.runs.data import open_run_data
from llm_jax.runs.fit import fit
from llm_jax.runs.start import load_recipe
from llm_jax.train.config import RunConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.step import LossConfig, TrainState, make_gradient, make_loss, make_train_step, score
from llm_jax.train.update import make_update

TRANSLATE, CLASSIFY = TaskConfig("translate"), TaskConfig("classify", answers=("yes", "no"))
SEPARATOR, END, PADDING = 0, 9, 0  # the separator is what padding is filled with, as in an alphabet with a tab

words = st.lists(st.integers(1, 5), max_size=4)
answers = st.lists(st.integers(0, 5), max_size=4)  # a separator in an answer is a token like any other
packed = st.lists(st.lists(st.tuples(words, answers), min_size=1, max_size=4), min_size=1, max_size=3)


def row_of(documents: list[tuple[list[int], list[int]]], length: int) -> np.ndarray:
    """Tokens, targets, segments, what translate keeps, and the question, token by token; then padding."""
    columns = []
    for segment, (question, answer) in enumerate(documents, start=1):
        document = [*question, SEPARATOR, *answer, END]
        for index, target in enumerate(document):
            token = document[index - 1] if index else END
            asked = index > len(question)
            columns.append((token, target, segment, target if asked else IGNORE, index <= len(question) + 1))
    columns += [(PADDING, IGNORE, 0, IGNORE, False)] * (length - len(columns))
    return np.array(columns, np.int32).T


def batch_of(rows: list[list[tuple[list[int], list[int]]]]) -> Iterator[np.ndarray]:
    length = 1 + max(sum(len(q) + len(a) + 2 for q, a in documents) for documents in rows)
    return (np.stack(parts) for parts in zip(*(row_of(documents, length) for documents in rows), strict=True))


@given(packed)
def test_translate_keeps_every_target_after_the_separator_of_its_document(rows: list):
    tokens, targets, segments, kept, question = batch_of(rows)
    selected = Task("translate", SEPARATOR, np.zeros(0, np.int64)).select(tokens, targets, segments)
    np.testing.assert_array_equal(selected.targets, kept)
    np.testing.assert_array_equal(selected.prefix, question.astype(bool))


@given(packed)
def test_classify_has_one_target_per_document_the_class_of_its_answer(rows: list):
    rows = [[(question, [5 if n % 2 else 3, *rest]) for n, (question, rest) in enumerate(row)] for row in rows]
    tokens, targets, segments, *_ = batch_of(rows)
    selected = Task("classify", SEPARATOR, np.array([5, 3])).select(tokens, targets, segments)
    assert selected.prefix is None
    for row, documents in zip(selected.targets, rows, strict=True):
        assert row[row != IGNORE].tolist() == [0 if answer[0] == 5 else 1 for _, answer in documents]
    at = selected.targets != IGNORE
    assert (tokens[at] == SEPARATOR).all()
    assert (at.cumsum(1)[segments != 0] <= segments[segments != 0]).all()


# Through shards and loader.

LETTERS = "abcdef"


def write_pairs(path: Path, task: TaskConfig) -> Path:
    """Three letters, backwards; or whether their first comes before their last. Every triple once."""
    triples = ["".join(letters) for letters in itertools.product(LETTERS, repeat=3)]
    say = (lambda t: t[::-1]) if task.kind == "translate" else lambda t: "yes" if t[0] < t[2] else "no"
    path.write_text("<|endoftext|>".join(f"{triple}\t{say(triple)}" for triple in triples))
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Shards]:
    folder, made = tmp_path_factory.mktemp("shards"), {}
    for task in (TRANSLATE, CLASSIFY):
        text = write_pairs(folder / f"{task.kind}.txt", task)
        prepare(str(text), folder / task.kind, tokenizer="char", heldout=0.3)
        made[task.kind] = open_shards(folder / task.kind)
    return made


def rows_of(task: TaskConfig | None, **changes: Any) -> DataConfig:
    small: dict[str, Any] = {"seq_len": 24, "batch_size": 4}
    return DataConfig(task=task, **small | changes)


def test_the_loader_asks_in_training_and_on_held_out_rows_alike(shards: dict[str, Shards]):
    for split, kind in itertools.product(("train", "heldout"), ("translate", "classify")):
        store, coder = shards[kind].split(split), shards[kind].tokenizer
        config = rows_of(TRANSLATE if kind == "translate" else CLASSIFY, batch_size=1)
        loader = Loader(store, config)
        batches = list(heldout_rows(store, config))
        trained_on = [loader.batch(step) for step in range(loader.steps_per_epoch)]
        for batch in batches if split == "heldout" else trained_on:
            assert (batch.prefix is None) == (kind == "classify")
            for segment in range(1, batch.segments.max() + 1):
                here = batch.segments == segment
                question, _, answer = coder.decode(batch.tokens[here]).partition("\t")
                asked = batch.targets[here & (batch.targets != IGNORE)].tolist()
                if kind == "translate":
                    assert coder.decode(asked) == answer + "<|endoftext|>"
                    assert question.endswith(answer[::-1])
                else:
                    assert [CLASSIFY.answers[n] for n in asked] == [answer]
        if split == "heldout":
            documents = np.concatenate([batch.documents[batch.targets != IGNORE] for batch in batches])
            assert set(documents) == set(range(store.n_documents))


def test_a_batch_without_a_task_is_as_it_was(shards: dict[str, Shards]):
    batch = Loader(shards["translate"].split("train"), rows_of(None)).batch(0)
    assert batch.prefix is None
    assert (batch.targets != IGNORE).sum() == (batch.segments != 0).sum()


# What the model sees.

CODER = CharTokenizer(LETTERS + "\tnosyez")
MODEL = ModelConfig(vocab_size=CODER.vocab_size, d_model=16, n_layers=2, n_heads=2, max_seq_len=24)
HEAD = dataclasses.replace(MODEL, n_classes=2)


def documents(texts: list[str], task: TaskConfig) -> Batch:
    """`texts` packed into one row, as the loader does it."""
    parts = [np.append(CODER.encode(text), CODER.end_of_text) for text in texts]
    targets = np.concatenate(parts).astype(np.int32)[None]
    tokens = np.roll(targets, 1)
    segments = np.repeat(np.arange(1, len(parts) + 1), [len(part) for part in parts]).astype(np.int32)[None]
    positions = np.concatenate([np.arange(len(part)) for part in parts]).astype(np.int32)[None]
    selected = resolve(task, CODER).select(tokens, targets, segments)
    return jax.tree.map(jnp.asarray, Batch(tokens, selected.targets, segments, positions, prefix=selected.prefix))


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, batch: Batch) -> jax.Array:
    inputs = {"segments": batch.segments, "positions": batch.positions, "prefix": batch.prefix}
    out = forward(Transformer(config), weights(config), batch.tokens, **inputs).logits
    assert out is not None
    return out


def test_a_question_attends_to_all_of_itself_and_to_nothing_else():
    before = logits(MODEL, documents(["abc\tcba", "de\ted"], TRANSLATE))[0]
    answered = logits(MODEL, documents(["abc\tfff", "de\ted"], TRANSLATE))[0]
    asked = logits(MODEL, documents(["abf\tcba", "de\ted"], TRANSLATE))[0]
    same = (before == answered).all(-1)
    assert same[:5].all()  # end of text, a, b, c, separator: what is told there is the first letter of the answer
    assert not same[5:8].any()
    assert same[8:].all()
    assert not (before == asked).all(-1)[:8].any()  # even the first token, which stands before what has changed
    assert (before == asked).all(-1)[8:].all()


def test_the_loss_of_a_class_is_that_of_the_pooled_token():
    batch = documents(["abc\tyes", "de\tno"], CLASSIFY)

    def loss(table: jax.Array) -> jax.Array:
        params = weights(HEAD) | {"embedding": {"table": table}}
        return make_loss(Transformer(HEAD), LossConfig())(params, batch, jax.random.key(0))[0]

    found, gradient = jax.jit(jax.value_and_grad(loss))(weights(HEAD)["embedding"]["table"])
    pooled = jax.nn.log_softmax(logits(HEAD, batch)[0, batch.tokens[0] == resolve(CLASSIFY, CODER).separator])
    np.testing.assert_allclose(found, -pooled[0, 0] - pooled[1, 1], rtol=1e-5)
    read = {*CODER.encode("abcde\t").tolist(), CODER.end_of_text}
    assert {token for token in range(CODER.vocab_size) if gradient[token].any()} == read


GREEDY: dict[str, Any] = {"task": TRANSLATE, "sampling": Sampling(0), "max_tokens": 9}


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_likeliest_tokens_of_a_text_are_those_of_temperature_0(chunk: int | None):
    """The answer of an untrained model, read back with the question, is at every position what the model would say."""
    scored = jax.jit(functools.partial(score, Transformer(MODEL), chunk))
    questions = ["abc", "bdfac"]
    written = generate(MODEL, weights(MODEL), CODER, questions, **GREEDY)
    assert written[0] != written[1]
    for question, right, wrong in zip(questions, written, written[::-1], strict=True):
        at = slice(len(question) + 1, len(question) + 1 + len(right))
        for answer in (right, wrong):
            batch = documents([f"{question}\t{answer}"], TRANSLATE)
            even = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 24 - x.shape[1]))), batch)
            assert scored(weights(MODEL), even).likeliest[0, at].all() == (answer == right)


def test_a_question_may_contain_its_separator_and_begin_its_answer():
    plain, asked = generate(MODEL, weights(MODEL), CODER, ["abc", "abc\t"], **GREEDY)
    assert plain == asked
    begun = generate(MODEL, weights(MODEL), CODER, [f"abc\t{plain[:2]}"] * 2, **GREEDY | {"max_tokens": 7})
    assert begun == [plain[2:]] * 2


def test_a_classifier_answers_with_the_class_of_its_pooled_token():
    prompts = ["abc", "f\tyes", "bdfac", "a"] * 9  # more than one batch
    found = classify(HEAD, weights(HEAD), CODER, CLASSIFY, prompts)
    assert [answer.prompt for answer in found] == prompts
    for answer in found[:4]:
        batch = documents([answer.prompt.partition("\t")[0] + "\tyes"], CLASSIFY)
        at = int((batch.targets[0] != IGNORE).argmax())
        chances = jax.nn.softmax(logits(HEAD, batch)[0, at])
        assert answer.answer == CLASSIFY.answers[int(chances.argmax())]
        assert answer.probability == pytest.approx(float(chances.max()), abs=1e-6)
    assert found[4:8] == found[:4]
    with pytest.raises(ValueError, match=r"a classifier generates nothing; ask run\.classify\(prompts\)"):
        Sampler(HEAD, weights(HEAD), CODER)


def test_the_head_of_a_classifier_has_a_table_of_its_own_and_a_letter():
    config = RunConfig(HEAD, rows_of(CLASSIFY), prompts=())
    described = describe.describe(config)
    last = described.activations[-1]
    assert (last.name, last.letters, last.shape) == ("logits", "B L C", (4, 24, 2))
    assert described.parameters["unembedding"] == 2 * 16
    without = describe.describe(RunConfig(dataclasses.replace(MODEL, tied=False), rows_of(None)))
    assert without.flops_per_token - described.flops_per_token == 6 * 16 * (MODEL.vocab_size - 2)


def test_metrics_count_all_tokens_read_and_the_loss_the_targets_kept():
    batch = documents(["abc\tcba", "de\ted"], TRANSLATE)
    state = TrainState(jnp.zeros((), jnp.int32), weights(MODEL), optax.sgd(0.0).init(weights(MODEL)))
    loss, schedule = make_loss(Transformer(MODEL), LossConfig()), lambda step: jnp.zeros(())
    metrics = jax.jit(make_train_step(make_gradient(loss), make_update(optax.sgd(0.0)), schedule))(state, batch)[1]
    asked = batch.targets[0] != IGNORE
    told = jax.nn.log_softmax(logits(MODEL, batch)[0, asked])
    assert (metrics["tokens"], asked.sum()) == (8 + 6, 4 + 3)
    np.testing.assert_allclose(metrics["loss"], -told[jnp.arange(7), batch.targets[0, asked]].mean(), rtol=1e-5)


# What can't work.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: TaskConfig("classify"),
            "data.task.kind=classify chooses among answers; got (); set data.task.answers=yes,no",
        ),
        (lambda: TaskConfig("translate", answers=("a",)), "generates any answer; leave out data.task.answers=a"),
        (lambda: rows_of(TRANSLATE, packing="windows"), "data.packing=windows cuts them; use data.packing=documents"),
        (lambda: rows_of(TRANSLATE, end_of_text=False), "must learn where an answer ends; set data.end_of_text=true"),
        (
            lambda: resolve(TaskConfig("translate", "=>"), ByteTokenizer()),
            "data.task.separator='=>' must be one token, and is 2 of byte; use another",
        ),
        (
            lambda: resolve(TaskConfig("classify", answers=("yes", "no", "nope")), ByteTokenizer()),
            "data.task.answers: 'no' and 'nope' begin with the same token of byte",
        ),
        (lambda: RunConfig(MODEL, rows_of(CLASSIFY)), "model.n_classes=None, but the data has 2 classes; set model."),
        (
            lambda: RunConfig(HEAD, rows_of(TRANSLATE)),
            "n_classes=2, but the data has no classes; set model.n_classes",
        ),
        (lambda: RunConfig(HEAD, rows_of(CLASSIFY)), "generates no text, and prompts=('',) ask it to; set prompts=()"),
    ],
)
def test_a_task_that_can_not_be_asked_is_refused(make: Any, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["ab\tyes", "no separator", "ab\tno"], "a.jsonl#1 is not a question and its answer: it has no separator"),
        (["ab\tyes", "ab\tmaybe"], "a.jsonl#1 is not a question and its answer: its answer begins like none of"),
        (["ab\tyes", "ab\t"], "a.jsonl#1 is not a question and its answer: its answer begins like none of"),
        (
            ["ab\tyes", "abc" * 9 + "\tno"],
            "its 31 tokens exceed data.seq_len=24, which would split question and answer",
        ),
    ],
)
def test_a_document_that_is_no_question_with_its_answer_is_named(texts: list[str], message: str, tmp_path: Path):
    lines = [json.dumps({"text": text}) + "\n" for text in [*texts, *["ab\tyes"] * 4]]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer="byte", heldout=0.0)
    store = open_shards(tmp_path / "out").split("train")
    with pytest.raises(ValueError, match=re.escape(message)):
        Loader(store, rows_of(CLASSIFY))
    with pytest.raises(ValueError, match=re.escape(message)):
        list(heldout_rows(store, rows_of(CLASSIFY)))


def test_documents_are_looked_through_once_and_never_all_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    texts = ["ab\tyes"] * 5
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer="byte", heldout=0.0)
    shards = open_shards(tmp_path / "out")
    store, read = shards.split("train"), []
    monkeypatch.setattr(loader, "CHECKED", 2)
    monkeypatch.setattr(
        store, "read", lambda start, stop: (read.append((start, stop)), store.take(np.arange(start, stop)))[1]
    )
    for _ in range(2):
        list(heldout_rows(shards.split("train"), rows_of(CLASSIFY)))
    assert read == [(0, 14), (14, 28), (28, 35)]


def test_of_documents_in_pieces_the_right_one_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loader, "CHECKED", 2)
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps({"text": f"ab\t{text}"}) + "\n" for text in ["yes"] * 3 + ["x"])
    )
    prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer="byte", heldout=0.0)
    with pytest.raises(ValueError, match=r"a.jsonl#3 is not a question and its answer"):
        Loader(open_shards(tmp_path / "out").split("train"), rows_of(CLASSIFY))


# The whole path.


def tiny(task: TaskConfig, uri: Path) -> RunConfig:
    classes = len(task.answers) or None
    return RunConfig(
        model=ModelConfig(vocab_size=16, d_model=32, n_layers=2, n_heads=2, max_seq_len=32, d_ff=64, n_classes=classes),
        data=DataConfig(str(uri), "char", heldout=0.3, seq_len=32, batch_size=16, task=task),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        prompts=() if classes else ("abc", "fed\t"),
        steps=50,
        evaluate_every=25,
        sample_every=50,
    )


@pytest.fixture(scope="module")
def half_trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Two runs, half trained: some answers are right and some are not."""
    folder = tmp_path_factory.mktemp("half_trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(folder / "cache"))
        patch.setattr(runtime, "start", lambda: None)
        patch.chdir(folder)
        for task in (TRANSLATE, CLASSIFY):
            say = console()
            fit(tiny(task, write_pairs(folder / f"{task.kind}.txt", task)), folder / task.kind, console=say)
            (folder / f"{task.kind}.said").write_text(said(say))
        yield folder


def heldout_pairs(folder: Path) -> list[list[str]]:
    shards = open_run_data(folder, run_folder.load_config(folder), print)
    store = shards.split("heldout")
    texts = [shards.tokenizer.decode(store.read(a, b - 1)) for a, b in itertools.pairwise(store.offsets.tolist())]
    return [text.split("\t") for text in texts]


def printed(capsys: pytest.CaptureFixture[str], *verb: str) -> str:
    capsys.readouterr()
    assert main(list(verb)) == 0
    return capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["translate", "classify"])
def test_the_accuracy_of_a_run_is_the_share_of_answers_that_it_gives(kind: str, half_trained: Path, capsys):
    result, step = evaluated(half_trained / kind, checkpoint="last")
    pairs = heldout_pairs(half_trained / kind)
    prompts = [word for question, _ in pairs for word in ("--prompt", question)]
    options = ("--checkpoint", "last", "--temperature", "0", "--json")
    answers = json.loads(printed(capsys, "generate", kind, *options, *prompts))
    found = [text["text"] if kind == "translate" else text["answer"] for text in answers["texts"]]
    right = np.mean([answer == expected for answer, (_, expected) in zip(found, pairs, strict=True)])
    assert 0 < right < 1
    assert result.accuracy == right
    assert (result.documents, step) == (len(pairs), 50)
    assert (result.bits_per_byte is None) == (kind == "classify")


@pytest.mark.parametrize("kind", ["translate", "classify"])
def test_a_run_logs_its_accuracy_and_evaluate_gives_it_with_an_interval(kind: str, half_trained: Path, capsys):
    row = log.read(half_trained / kind)[-1]
    assert 0 < row["heldout_accuracy"] < 1
    assert ("bits_per_byte" in row) == (kind == "translate")
    assert f"{row['heldout_accuracy']:.2%} right" in (half_trained / f"{kind}.said").read_text()
    assert "answers right" in (half_trained / kind / "report.html").read_text()
    found = json.loads(printed(capsys, "evaluate", kind, "--json"))
    low, high = found["accuracy_interval"]
    assert low < found["accuracy"] < high
    said = printed(capsys, "evaluate", kind)
    assert f"accuracy       {found['accuracy']:9.4f}   {low:.4f} to {high:.4f}" in said
    assert ("bits per byte" in said) == (kind == "translate")


def test_a_run_that_translates_samples_answers_and_a_classifier_nothing(half_trained: Path):
    samples = log.read(half_trained / "translate")[-1]["samples"]
    assert [sample["prompt"] for sample in samples] == ["abc\t", "fed\t"]
    assert "samples" not in log.read(half_trained / "classify")[-1]


def test_generate_shows_a_question_with_its_answer(half_trained: Path, capsys):
    assert re.fullmatch(r"abc\t[a-f]*\n", printed(capsys, "generate", "translate", "--prompt", "abc"))
    assert re.fullmatch(r"abc  (yes|no)  \d+\.\d\d%\n", printed(capsys, "generate", "classify", "--prompt", "abc"))


def test_other_text_of_the_same_form_is_scored_and_any_other_refused(half_trained: Path, capsys):
    (half_trained / "more.txt").write_text("abc\tcba<|endoftext|>aaa\taaa")
    assert json.loads(printed(capsys, "evaluate", "translate", "--data", "more.txt", "--json"))["documents"] == 2
    (half_trained / "prose.txt").write_text("abc")
    assert main(["evaluate", "translate", "--data", "prose.txt"]) == 2
    assert "prose.txt#0 is not a question and its answer: it has no separator" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["translate", "classify"])
def test_the_recipes_fit_their_data(name: str):
    config = load_recipe(name)
    assert config.data.task is not None
    assert config.data.task.kind == name
    assert describe.describe(config).parameters["embedding"] > 0


@pytest.mark.slow
def test_a_class_is_scored_as_transformers_does(tmp_path: Path):
    """LlamaForSequenceClassification: the score head on the last token that is no padding."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from llm_jax.compat import huggingface, weights

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    theirs = transformers.LlamaConfig(
        vocab_size=40, num_key_value_heads=2, num_labels=3, pad_token_id=0, tie_word_embeddings=True, **sizes
    )
    torch.manual_seed(0)
    scorer = transformers.LlamaForSequenceClassification(theirs).eval()
    writer = transformers.LlamaForCausalLM(theirs)
    writer.model.load_state_dict(scorer.model.state_dict())
    writer.save_pretrained(tmp_path)

    about = huggingface.read_model_json(tmp_path / "config.json")
    family = huggingface.family_of(about)
    config = family.read(about)
    params = weights.read_parameters(tmp_path, family, config) | {
        "classes": {"table": jnp.asarray(scorer.score.weight.detach())}
    }
    lengths = np.array([3, 9, 1, 6])
    tokens = np.random.default_rng(0).integers(1, 40, size=(4, 9)) * (np.arange(9) < lengths[:, None])
    with torch.no_grad():
        expected = torch.softmax(scorer(torch.from_numpy(tokens)).logits, -1).numpy()
    config = override(config, ["n_classes=3"])
    found = probabilities(config, params, jnp.asarray(tokens, jnp.int32), jnp.asarray(lengths - 1, jnp.int32))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert expected.std() > 1e-3
