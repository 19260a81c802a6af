"""What the pages say is true: their Python runs, their commands parse, their links lead somewhere."""

import re
import shlex
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

import pytest
from tiny_run import write_corpus

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("findings/*.md")])
RECIPES = sorted(ROOT.glob("configs/[!_]*.py"))
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^ *(?:\$ )?|[|&] )(?:\w+=\S+ )*llm-jax (.+)$", re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page, each moved to the line where it stands, so that errors name that line."""
    text = page.read_text()
    for fence in FENCE.finditer(text):
        if fence[1] in languages:
            yield "\n" * text.count("\n", 0, fence.start(2)) + fence[2]


def commands(page: Path) -> Iterator[list[str]]:
    """What follows each `llm-jax` in a page's shell blocks, or in a recipe, up to a pipe or the like."""
    shell = [page.read_text()] if page.suffix == ".py" else blocks(page, "sh", "bash", "console")
    for command in COMMAND.finditer("".join(shell).replace("\\\n", " ")):
        lexer = shlex.shlex(command[1], posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        yield list(takewhile(lambda word: not re.fullmatch(r"[();<>|&]+", word), lexer))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {"__name__": page.stem}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), session)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_runs_of_a_page_train_and_generate(page: str, tmp_path: Path, monkeypatch):
    """They are as on the page, but small."""
    import llm_jax as lj

    small = {"model.d_model": 32, "model.n_layers": 1, "model.vocab_size": 264, "model.max_seq_len": 64}
    small |= {"data.uri": str(write_corpus(tmp_path / "corpus")), "data.tokenizer": "byte", "data.seq_len": 64}
    small |= {"data.batch_size": 8, "data.heldout": 0.2, "steps": 3, "optimizer.warmup_steps": 1, "evaluate_batches": 1}
    recipe = lj.recipe
    monkeypatch.setattr(lj, "recipe", lambda *words, **changes: lj.replace(recipe(*words, **changes), small))
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {"__name__": "page"}
    for block in blocks(ROOT / page, "py"):
        exec(compile(block, page, "exec"), session)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == sorted(
        {"README.md": ["a", "b"]}.get(page, ["numbers", "b"])
    )


@pytest.mark.smoke
@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=name)
def test_the_commands_of_a_page_are_commands(page: Path):
    from llm_jax.cli.main import parser

    for words in commands(page):
        try:
            parser().parse_args(words)
        except SystemExit as stop:
            if stop.code != 0:
                pytest.fail(f"no such command: llm-jax {shlex.join(words)}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_rows_of_a_table_begin_and_end_with_a_bar(page: Path):
    """What does not is a row to some readers of Markdown, and text to others."""
    for block in re.split(r"\n\s*\n", FENCE.sub("", page.read_text())):
        rows = [line for line in block.splitlines() if not line.startswith("<!--")]
        if any(re.fullmatch(r"[\s|:-]*-\|-[\s|:-]*", row) for row in rows):
            for row in rows:
                assert row.startswith("|"), row
                assert row.endswith("|"), row


@pytest.mark.smoke
@pytest.mark.parametrize("page", PAGES, ids=name)
def test_the_links_of_a_page_lead_to_a_file(page: Path):
    for target in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.smoke
@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ("log.md", "CHANGELOG.md")], ids=name)
def test_the_files_and_functions_that_a_page_names_are_there(page: Path):
    """`train/step.py` is a file of the library or of the repository, and `ops/loss.cross_entropy` a name in one."""
    text = FENCE.sub("", page.read_text())
    for path in re.findall(r"`((?:\w+/)+\w+\.py)(?:::\w+)?`", text):
        if not re.search("[A-Z]{4}", path):  # NAME stands for one
            assert (ROOT / "llm_jax" / path).exists() or (ROOT / path).exists(), f"{page.name} names {path}"
    for module, function in re.findall(r"`(?:llm_jax/)?((?:\w+/)+\w+)\.(\w+)`", text):
        path = ROOT / "llm_jax" / f"{module}.py"
        if function not in ("py", "md") and path.exists():
            assert re.search(rf"\b{function}\b", path.read_text()), f"{page.name} names {function} of {module}"
