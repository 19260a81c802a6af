"""What several verbs share: the config of their arguments, messages on standard error, JSON on standard output."""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax.config import override
from llm_jax.files import strict

if TYPE_CHECKING:
    from rich.console import Console

    from llm_jax.data.tokenizer import Tokenizer
    from llm_jax.train.config import RunConfig


def config_of(args: Namespace) -> "RunConfig":
    """Return the config of a recipe or a Python file, with the changes of the command line.

    Raise `ValueError` for whatever the file raises, and for changes that make no config.
    """
    from llm_jax.runs import start

    try:
        config = start.load_recipe(args.config)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        where = f"{args.config} fails: {type(error).__name__}: {error}"
        raise ValueError(f"{where}; fix it (--debug shows the line)") from error
    if source := vars(args).get("source_run"):
        return start.config_from(source, config, *args.assignments, report=say)
    return override(config, args.assignments)


def config_or_run_of(args: Namespace) -> "RunConfig":
    """Return the config of a recipe, a Python file or a run folder, with the changes of the command line."""
    from llm_jax.runs import folder as run_folder

    is_run = run_folder.is_run(Path(args.config))
    return override(run_folder.load_config(args.config), args.assignments) if is_run else config_of(args)


def warn_of_special(coder: "Tokenizer", texts: Sequence[str]) -> None:
    """Say where a text spells a special token that is read as plain text."""
    if found := next(filter(None, map(coder.spelled, texts)), None):
        say(f"the text spells {found}, which is read as text; for the token add --special")


def wide_console() -> "Console":
    """Return a console for tables: as wide as the terminal, or 120 columns."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)


def error_console() -> "Console":
    """Return a console on standard error, for lines of progress."""
    from rich.console import Console

    return Console(stderr=True)


def say(line: str) -> None:
    """Print a line of progress on standard error; standard output is for the result."""
    print(line, file=sys.stderr)


def print_json(value: dict[str, Any]) -> None:
    """Print strict JSON: NaN and infinities are null, and what the output can't encode is escaped."""
    value = strict(value)
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal of ASCII, or the name of a file that is not UTF-8
        text = json.dumps(value, indent=2)
    print(text)
