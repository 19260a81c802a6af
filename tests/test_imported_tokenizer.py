"""What an imported tokenizer puts before a text and what ends one, as the library and transformers have it."""

import functools
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arrays import quiet
from tiny_run import evaluated, write_corpus

from llm_jax.cli.main import main
from llm_jax.compat.huggingface import export_run, import_run
from llm_jax.compat.tokenizers import files_of
from llm_jax.data import tokenizer
from llm_jax.data.imported_tokenizer import ImportedTokenizer
from llm_jax.infer.generate import prompt_ids
from llm_jax.runs import folder as run_folder
from llm_jax.runs import restore

TEXT = "The cat's mat: 12345 mats, naïve\n\n    def sit(mat):\n\treturn  mat\r\n ß"
END = "<|endoftext|>"


def byte_level(post: Callable[[Any], Any] = lambda library: None) -> Any:
    """An encoding of bytes in letters, with `<s>` and `<|endoftext|>` before all other entries."""
    library = pytest.importorskip("tokenizers")
    coder = library.Tokenizer(library.models.BPE())
    coder.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=270, special_tokens=["<s>", END], initial_alphabet=alphabet)
    coder.train_from_iterator([TEXT] * 3, trainer)
    if processor := post(library.processors):
        coder.post_processor = processor
    return coder


def gpt2_like() -> Any:
    return byte_level(lambda processors: processors.ByteLevel(trim_offsets=False))


def llama3_like() -> Any:
    template = lambda processors: processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # noqa: E731
    return byte_level(lambda p: p.Sequence([p.ByteLevel(trim_offsets=False), template(p)]))


def llama2_like() -> Any:
    """Blanks as U+2581, other characters as bytes."""
    library = pytest.importorskip("tokenizers")
    vocab = {"<s>": 0, END: 1, "<unk>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {entry: 259 + i for i, entry in enumerate(["▁", "T", "h", "e", "Th", "The", "▁The"])}
    merges = [("T", "h"), ("Th", "e"), ("▁", "The")]
    coder = library.Tokenizer(library.models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    coder.add_special_tokens(["<s>", END, "<unk>"])
    replace = library.normalizers.Replace(" ", "▁")
    coder.normalizer = library.normalizers.Sequence([library.normalizers.Prepend("▁"), replace])
    decoders = library.decoders
    coder.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    coder.post_processor = library.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return coder


def qwen_like() -> Any:
    library = pytest.importorskip("tokenizers")
    coder = byte_level()
    coder.normalizer = library.normalizers.NFC()
    return coder


def t5_like() -> Any:
    """An end after each text, nothing before it."""
    library = pytest.importorskip("tokenizers")
    entries = ["<s>", END, "<unk>", "▁", *"Tehcat", "▁The", "at"]
    scores = [(entry, -float(i)) for i, entry in enumerate(dict.fromkeys(entries))]
    coder = library.Tokenizer(library.models.Unigram(scores, unk_id=2))
    coder.add_special_tokens(["<s>", END])
    coder.pre_tokenizer = library.pre_tokenizers.Metaspace()
    coder.decoder = library.decoders.Metaspace()
    coder.post_processor = library.processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 1)])
    return coder


BEGINNINGS = {gpt2_like: [], qwen_like: [], llama3_like: [0], llama2_like: [0], t5_like: []}


def opened(coder: Any, **files: Any) -> ImportedTokenizer:
    """Our own of the library's `coder`; `files` are others beside its tokenizer.json."""
    others = {f"{name}.json": json.dumps(values).encode() for name, values in files.items()}
    return ImportedTokenizer("theirs", {"tokenizer.json": coder.to_str().encode()} | others, 1)


@pytest.mark.parametrize("make", BEGINNINGS)
def test_a_text_begins_with_what_the_library_puts_before_it(make: Callable[[], Any]):
    theirs, coder = make(), opened(make())
    before = [coder.begin_of_text] if coder.begins else []
    assert before == BEGINNINGS[make]
    ids = theirs.encode("The cat").ids
    assert ids[: len(before)] + coder.encode("The cat").tolist() == ids[: len(ids) - (make is t5_like)]


def test_processors_of_every_kind_say_what_begins_a_text():
    kinds = {
        "bert": (lambda p: p.BertProcessing((END, 1), ("<s>", 0)), (True, 0)),
        "roberta": (lambda p: p.RobertaProcessing((END, 1), ("<s>", 0)), (True, 0)),
        "both": (
            lambda p: p.TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, 1)]),
            (True, 1),
        ),
        "none": (lambda p: None, (False, 1)),
    }
    for post, expected in kinds.values():
        coder = opened(byte_level(post))
        assert (coder.begins, coder.begin_of_text) == expected


def test_if_nothing_begins_a_text_a_document_begins_with_the_named_token():
    """In training each document begins with some token, so that its first one is a target too."""
    assert opened(gpt2_like()).begin_of_text == 1
    assert opened(gpt2_like(), tokenizer_config={"bos_token": "<s>"}).begin_of_text == 0
    assert opened(gpt2_like(), tokenizer_config={"bos_token": None}).begin_of_text == 1
    assert opened(gpt2_like(), special_tokens_map={"bos_token": {"content": "<s>"}}).begin_of_text == 0
    ignored = {"bos_token": "<s>", "add_bos_token": True}  # by transformers too, beside a tokenizer.json
    assert not opened(gpt2_like(), tokenizer_config=ignored).begins


@pytest.mark.parametrize("file", ["tokenizer_config", "special_tokens_map"])
@pytest.mark.parametrize("token", [3, [], {}, {"content": [3]}, False])
def test_a_beginning_that_is_no_text_is_refused(file: str, token: Any):
    with pytest.raises(ValueError, match=rf"^the {file}.json of theirs has bos_token=.*, expected a string; "):
        opened(gpt2_like(), **{file: {"bos_token": token}})


POSTS = {
    "bert": lambda p: p.BertProcessing((END, 1), ("<s>", 0)),
    "roberta": lambda p: p.RobertaProcessing((END, 1), ("<s>", 0)),
    "both": lambda p: p.TemplateProcessing(
        single=f"{END} $A {END}", pair=f"{END} $A {END} $B {END}", special_tokens=[(END, 1)]
    ),
}


@pytest.mark.parametrize("make", [*BEGINNINGS, *POSTS])
def test_a_tokenizer_goes_out_with_the_beginning_of_its_training(make: Any):
    """Nothing else about it changes: what follows a text, offsets, and all other entries of its files."""
    library = pytest.importorskip("tokenizers")
    theirs = byte_level(POSTS[make]) if make in POSTS else make()
    coder = opened(theirs, tokenizer_config={"x": 3})
    assert files_of(coder, 9, begins=coder.begins) == coder.files
    files = files_of(coder, 9, begins=not coder.begins)
    again = ImportedTokenizer("again", files, 1, begin_of_text=coder.begin_of_text)
    assert (again.begins, again.begin_of_text) == (not coder.begins, coder.begin_of_text)
    back = files_of(again, 9, begins=coder.begins)
    found = [library.Tokenizer.from_str(each["tokenizer.json"].decode()) for each in (files, back)]
    was, changed, restored = (
        [*zip(encoding.ids, encoding.offsets, strict=True)]
        for encoding in (each.encode("The cat") for each in (theirs, *found))
    )
    shorter, longer = sorted((was, changed), key=len)
    assert longer == [(coder.begin_of_text, (0, 0)), *shorter]
    assert restored == was
    kept = [json.loads(each["tokenizer.json"]) | {"post_processor": None} for each in (coder.files, files)]
    assert kept[0] == kept[1]
    assert json.loads(files["tokenizer_config.json"]) == {"x": 3, "add_bos_token": not coder.begins}


def test_two_tokens_before_a_text_are_refused():
    template = {"single": "<s> <s> $A", "special_tokens": [("<s>", 0)]}
    with pytest.raises(ValueError, match=r"puts 2 tokens before a text, and at most one can begin it here; change"):
        opened(byte_level(lambda p: p.TemplateProcessing(**template)))


def test_a_tokenizer_saved_before_it_said_what_ends_a_text_is_the_same(tmp_path: Path):
    """Its folder names one end, and the end after a text for a beginning; the digest was computed then."""
    coder = opened(t5_like())
    old = {"begin_of_text": 1, "end_of_text": 1, "ids": coder.vocab_size}
    coder.save(tmp_path)
    saved = json.loads((tmp_path / "encoding.json").read_text())
    assert saved["encoding"] == {"kind": "imported", **old, "sha256": saved["encoding"]["sha256"]}
    assert "end_ids" not in saved
    again = tokenizer.load_tokenizer(tmp_path)
    assert (again.fingerprint, again.begins, again.end_ids) == (coder.fingerprint, False, (1,))


def test_several_ends_are_kept_and_decide_no_fingerprint(tmp_path: Path):
    files = opened(gpt2_like()).files
    one, many = ImportedTokenizer("x", files, 1), ImportedTokenizer("x", files, 1, end_ids=[1, 7, 0, 7])
    many.save(tmp_path)
    assert tokenizer.load_tokenizer(tmp_path).end_ids == many.end_ids == (1, 7, 0)
    assert one.fingerprint == many.fingerprint
    for ends in (["a"], 7, [True], [10**30], [-1]):
        meta = json.loads((tmp_path / "encoding.json").read_text()) | {"end_ids": ends}
        (tmp_path / "encoding.json").write_text(json.dumps(meta))
        with pytest.raises(ValueError, match=r"no list of ids|is to end a text"):
            tokenizer.load_tokenizer(tmp_path)


def test_entries_in_reserve_stand_for_themselves():
    """A byte-level vocabulary may have some that are not spelled in the letters of bytes; so decodes the library."""
    described = json.loads(gpt2_like().to_str())
    described["model"]["vocab"] |= {"<reserved 0>": 270, "▁x": 271}
    library = pytest.importorskip("tokenizers")
    coder = opened(library.Tokenizer.from_str(json.dumps(described)))
    assert coder.token_bytes(270) == b"<reserved 0>"
    assert coder.decode_bytes([271, 270]).decode() == coder.decode([271, 270]) == "▁x<reserved 0>"


@pytest.mark.parametrize("token", [-1, 270, 2**31, 10**30])
def test_decoding_an_id_that_is_none_raises_whoever_decodes(token: Any):
    coder = opened(gpt2_like())
    for decode in (coder.decode, coder.decode_bytes):
        with pytest.raises(ValueError, match=rf"token {token} is not an id of theirs, which has 0 to 269"):
            decode([5, token])


# ---- runs


SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SIZES | {"num_key_value_heads": 2, "intermediate_size": 20, "max_position_embeddings": 64}
MODELS: dict[Callable[[], Any], dict[str, Any]] = {
    gpt2_like: {"model_type": "gpt2", "n_positions": 64, "n_embd": 24, "n_layer": 1, "n_head": 4},
    llama3_like: {"model_type": "llama", **LLAMA},
    llama2_like: {"model_type": "llama", **LLAMA},
    qwen_like: {"model_type": "qwen2", **LLAMA},
}


def model_folder(make: Callable[[], Any], folder: Path, **changes: Any) -> Path:
    """A model with random weights and the tokenizer that `make` makes, as it comes from the hub."""
    from test_huggingface import save_model

    theirs = MODELS[make] | {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    theirs |= {"vocab_size": make().get_vocab_size()} | changes  # ids that no tokenizer has, we never draw
    save_model(folder, theirs)
    (folder / "tokenizer.json").write_text(make().to_str(), encoding="utf-8")
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@functools.cache
def imported_gpt2(folder: Path) -> Path:
    import_run(str(model_folder(gpt2_like, folder / "theirs")), folder / "run", report=quiet)
    return folder / "run"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return imported_gpt2(tmp_path_factory.mktemp("gpt2"))


def test_an_imported_run_begins_as_its_tokenizer_and_others_as_in_training(gpt2: Path, tmp_path: Path):
    config, coder = run_folder.load_config(gpt2), run_folder.tokenizer_of_run(gpt2)
    assert not run_folder.begins(gpt2, config, coder)
    (tmp_path / "data.json").touch()  # what a run has that was trained
    assert run_folder.begins(tmp_path, config, coder)


def test_each_way_to_begin_a_text_can_be_asked_for(gpt2: Path, capsys: Any):
    def written(*words: str) -> Any:
        words = ("generate", str(gpt2), "--prompt", "The", "--temperature", "0", "--max-tokens", "4", "--json", *words)
        assert main(words) == 0
        return json.loads(capsys.readouterr().out)["texts"]

    assert written() == written("--no-begin") != written("--begin")
    assert main(["generate", str(gpt2), "--prompt", "", "--max-tokens", "4"]) == 2
    assert "if only a line break, or --begin" in capsys.readouterr().err
    assert main(["generate", str(gpt2), "--prompt", "", "--max-tokens", "4", "--begin"]) == 0


def test_documents_are_measured_as_texts_begin(gpt2: Path, tmp_path: Path, capsys: Any):
    """With nothing before it a document's first token has nothing to be predicted from, nor is there an end."""
    corpus, coder = write_corpus(tmp_path / "corpus", documents=3), run_folder.tokenizer_of_run(gpt2)
    lengths = [len(coder.encode(path.read_text())) for path in sorted(corpus.iterdir())]
    found = {begin: evaluated(gpt2, str(corpus), begin=begin)[0] for begin in (None, False, True)}
    assert found[None] == found[False]
    assert (found[None].tokens, found[True].tokens) == (sum(lengths) - 3, sum(lengths) + 3)
    assert main(["evaluate", str(gpt2), "--begin"]) == 2
    assert "add --data URI" in capsys.readouterr().err


def test_a_prompt_that_spells_a_special_token_is_said_to_unless_it_is_read(gpt2: Path, capsys: Any):
    words = ["generate", str(gpt2), "--prompt", f"The{END}", "--max-tokens", "2"]
    assert main(words) == 0
    assert f"the text spells {END}, which is read as text; for the token add --special" in capsys.readouterr().err
    assert main([*words, "--special"]) == 0
    assert "spells" not in capsys.readouterr().err
    coder, config = run_folder.tokenizer_of_run(gpt2), run_folder.load_config(gpt2).model
    [ids] = prompt_ids(config, coder, [f"The{END}"], begin=False, special=True)
    assert ids[-1] == 1
    assert 1 not in prompt_ids(config, coder, [f"The{END}"], begin=False)[0]


def test_a_run_trained_from_an_import_exports_how_its_training_began(gpt2: Path, tmp_path: Path):
    library = pytest.importorskip("tokenizers")
    shutil.copytree(gpt2, tmp_path / "run")
    params, _ = restore.weights(gpt2, restore.on_one_device(run_folder.load_config(gpt2)), report=quiet)
    for name, ids in (("imported", []), ("trained", [0])):
        export_run(tmp_path / "run", params, out := tmp_path / name, report=quiet)
        theirs = library.Tokenizer.from_file(str(out / "tokenizer.json"))
        assert theirs.encode("The").ids == [*ids, *theirs.encode("The", add_special_tokens=False).ids]
        (tmp_path / "run" / "data.json").touch()  # what a run has that was trained
    original = (gpt2 / "tokenizer" / "tokenizer.json").read_bytes()
    assert (tmp_path / "imported" / "tokenizer.json").read_bytes() == original


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer"])
@pytest.mark.parametrize("make", [gpt2_like, llama3_like, llama2_like, qwen_like])
def test_transformers_begins_a_text_as_an_export_says(make: Callable[[], Any], kind: str, tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    names = {"tokenizer_class": kind, "bos_token": "<s>", "eos_token": END}
    coder = opened(make(), tokenizer_config=names | {"add_bos_token": True})
    for begins in (True, False):
        (folder := tmp_path / str(begins)).mkdir()
        for name, content in files_of(coder, 9, begins=begins).items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text('{"model_type": "llama"}')
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        alone = theirs("The", add_special_tokens=False)["input_ids"]
        assert theirs("The")["input_ids"] == [*([coder.begin_of_text] if begins else []), *alone]


PROMPTS = ["The cat", "mat", "  return", "naïve ß", "T"]


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS)
def test_a_greedy_text_is_that_of_transformers(make: Callable[[], Any], tmp_path: Path, capsys: Any):
    """With two ends, of which the second is a token that the model generates."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    there = model_folder(make, tmp_path / "theirs")
    model = transformers.AutoModelForCausalLM.from_pretrained(there, attn_implementation="eager").eval()
    read = transformers.AutoTokenizer.from_pretrained(there)

    def continued(prompt: str, ends: list[int]) -> list[int]:
        ids = torch.tensor([read(prompt)["input_ids"]])
        with torch.no_grad():
            out = model.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=ends, pad_token_id=ends[0])
        return list(itertools.takewhile(lambda token: token not in ends, out[0, ids.shape[1] :].tolist()))

    free = [continued(prompt, [1]) for prompt in PROMPTS]
    longest = max(free, key=len)
    ends = [1, longest[len(longest) // 2]]
    (there / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    import_run(str(there), tmp_path / "run", report=quiet)
    coder = run_folder.tokenizer_of_run(tmp_path / "run")
    words = ["generate", str(tmp_path / "run"), "--temperature", "0", "--max-tokens", "10", "--json"]
    assert main([*words, *(word for prompt in PROMPTS for word in ("--prompt", prompt))]) == 0
    texts = [text["text"] for text in json.loads(capsys.readouterr().out)["texts"]]
    theirs = [continued(prompt, ends) for prompt in PROMPTS]
    assert texts == [coder.decode_bytes(ids).decode("utf-8", "replace") for ids in theirs]
    assert sum(map(len, theirs)) < sum(map(len, free))
    assert len(set(texts)) > 1
    for prompt in PROMPTS:
        before = [coder.begin_of_text] if coder.begins else []
        np.testing.assert_array_equal([*before, *coder.encode(prompt)], read(prompt)["input_ids"])
