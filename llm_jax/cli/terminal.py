"""Print text on a terminal: as it is generated, tokens in colours, prompts one by one.

A pipe or a file gets the plain text and nothing else.
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.columns import Columns
from rich.console import Console
from rich.text import Text

from llm_jax.log import visible

if TYPE_CHECKING:
    from llm_jax.data.tokenizer import Tokenizer
    from llm_jax.infer.generate import Piece

BLANKS = {ord(" "): "·", ord("\n"): "⏎", ord("\t"): "→"}
COLOURS = ("black on cyan", "black on yellow", "black on green", "black on magenta")


def write(text: str, style: str = "") -> None:
    """Print `text` at once; on a terminal in `style`, and without control characters."""
    if sys.stdout.isatty():
        Console(soft_wrap=True).print(Text(visible(text), style), end="")
    else:
        print(text, end="", flush=True)


def write_rows(prompts: Sequence[str], pieces: Iterable[Piece]) -> tuple[int, int]:
    """Print each prompt and the text after it, with an empty line between two. `pieces` come row by row.

    Return how many tokens a draft proposed, and how many of them were kept.
    """
    row, drafted, kept = -1, 0, 0
    for piece in pieces:
        drafted, kept = drafted + piece.drafted, kept + piece.kept
        if piece.row != row:
            row = piece.row
            write("\n" if row else "")
            write(prompts[row], style="bold")
        write(piece.text + ("\n" if piece.finish else ""))
    return drafted, kept


def read_prompts(default: Sequence[str]) -> Iterator[Sequence[str]]:
    """Yield one prompt at a time from a terminal; from a pipe all its lines at once, or `default` if it has none."""
    if not sys.stdin.isatty():
        lines = [line.rstrip("\r\n") for line in sys.stdin]
        yield [line for line in lines if line] or default
        return
    print("a prompt a line; Ctrl-D ends", file=sys.stderr)
    with contextlib.suppress(EOFError):
        while True:
            yield [input("> ")]


def write_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> None:
    """Print every token in a colour, with its id below it."""
    boxes = [
        Text.assemble((spelled(tokenizer.token_bytes(token)), colour), "\n", (str(token), "dim"))
        for token, colour in zip(tokens, itertools.cycle(COLOURS), strict=False)
    ]
    Console().print(Columns(boxes, padding=(1, 1, 0, 0)))


def spelled(data: bytes) -> str:
    """Return the text of a token with visible blanks; hexadecimal where it is only part of a character."""
    try:
        return visible(data.decode().translate(BLANKS))
    except UnicodeDecodeError:
        return data.hex(" ")
