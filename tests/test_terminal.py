"""A person at a terminal sees text as it comes; a pipe gets the bare text."""

import contextlib
import io

import pytest

from llm_jax.cli import terminal
from llm_jax.data.tokenizer import ByteTokenizer
from llm_jax.infer.generate import Piece


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_the_text_as_it_is(capsys: pytest.CaptureFixture[str]):
    terminal.write("[bold]:smile:\x1b[2J" + "long " * 50, style="bold")
    assert capsys.readouterr().out == "[bold]:smile:\x1b[2J" + "long " * 50


def test_a_terminal_gets_nothing_that_steers_it():
    with contextlib.redirect_stdout(Terminal()) as screen:
        terminal.write("[bold]\x1b[2J\a\n" + "long " * 50)
    assert screen.getvalue() == "[bold]␛[2J␇\n" + "long " * 50  # lines are the terminal's to wrap


def test_rows_stand_one_after_the_other_each_after_its_prompt(capsys: pytest.CaptureFixture[str]):
    pieces = [Piece(0, " b", None), Piece(0, "", "stop"), Piece(1, " d\n", "length")]
    terminal.write_rows(["a", "c"], pieces)
    assert capsys.readouterr().out == "a b\n\nc d\n\n"


def test_text_is_written_when_it_comes(capsys: pytest.CaptureFixture[str]):
    def pieces():
        yield Piece(0, " b", None)
        assert capsys.readouterr().out == "a b"
        yield Piece(0, " c", "stop")

    terminal.write_rows(["a"], pieces())
    assert capsys.readouterr().out == " c\n"


@pytest.mark.parametrize(("text", "prompts"), [("a\n\n b\r\n", ["a", " b"]), ("", ["default"]), ("\n", ["default"])])
def test_the_lines_of_a_pipe_are_prompts(monkeypatch: pytest.MonkeyPatch, text: str, prompts: list[str]):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert list(terminal.read_prompts(["default"])) == [prompts]


def test_a_terminal_is_asked_until_it_has_no_more(monkeypatch: pytest.MonkeyPatch):
    answers = iter(["one", ""])

    def answer(question: str) -> str:
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setattr("builtins.input", answer)
    assert list(terminal.read_prompts(["default"])) == [["one"], [""]]


def test_every_token_stands_above_its_id(capsys: pytest.CaptureFixture[str]):
    tokenizer = ByteTokenizer()
    terminal.write_tokens(tokenizer, tokenizer.encode("a\té").tolist())
    above, below = (line.split() for line in capsys.readouterr().out.splitlines()[:2])
    assert above == ["a", "→", "c3", "a9"]
    assert below == ["97", "9", "195", "169"]
