"""`llm-jax VERB`: parse the command line, run the verb, print its errors on one line."""

import argparse
import difflib
import errno
import functools
import gc
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import sys
import traceback
import warnings
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from llm_jax import __version__, runtime
from llm_jax.cli import checking, models, planning, tokenizing, training, using
from llm_jax.config import nearest, read_number
from llm_jax.keys import options_meant, suggestions

ABOUT = "A language-model library in JAX that you can read in an evening and train on a pod."
BEGIN = """begin with:      llm-jax train quickstart
look around:     llm-jax show shapes
read of a verb:  llm-jax help VERB

The exit status is 0, 2 for what you can fix, 130 or 143 where a run was stopped and saved by Ctrl-C or SIGTERM.
docs/cli.md has the rest."""

AS_OPTIONS = re.compile(r"\bdata\.(column|separator|heldout)\b(=?)")  # keys that some verbs take as options


class Parser(ArgumentParser):
    """argparse with errors on one line, `key=value` words anywhere among the options, and no option twice."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("action", None, Once)
        self.given: dict[str, Any] = {}

    def error(self, message: str) -> Any:
        """Exit with status 2, after a line that says what is wrong and what to type."""
        if choice := re.match(r".*invalid choice: '(.*)' \(choose from (.*)\)", message):
            names = re.findall(r"[\w-]+", choice[2])
            message = f"{choice[1]!r} is not known; {nearest(choice[1], names)}"
        self.exit(2, f"llm-jax: error: {_line(message.removeprefix('argument '))}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore  (has overloads there)
        """Parse `args`, with `key=value` words among the options; exit with an error for unknown words."""
        self.given.clear()
        if any(action.dest == "assignments" for action in self._actions):
            self._check_blanks(list(args or ()))
        known, left = super().parse_known_args(args, namespace)
        if "assignments" in known:
            late = [word for word in left if "=" in word and not word.startswith("-")]
            known.assignments = [*known.assignments, *late]
            left = [word for word in left if word not in late]
        if left:
            self.error(self._unknown(left[0], list(args or ())))
        return known, left

    def _check_blanks(self, words: list[str]) -> None:
        """Refuse `steps = 20`, three words, and `steps =20`, two."""
        for i, word in enumerate(words[1:], 1):
            if word.startswith("="):
                meant = shlex.quote("".join(words[i - 1 : i + 1 + (word == "=")]))
                self.error(f"a key and its value are one word, without blanks around the =; write {meant}")

    def _unknown(self, word: str, words: list[str]) -> str:
        """Say what is wrong with `word`, which this verb does not take, and what it may mean."""
        verb = self.prog.rpartition(" ")[2]
        option, equals, value = word.partition("=")
        if not word.startswith("-"):
            return f"{verb} takes no {word!r}" + " (its config is that of the run)" * bool(equals)
        known = [name for name in self._option_string_actions if name.startswith("--")]
        words_of = [str(action.metavar) for action in self._actions if not action.option_strings]
        positional = [name for metavar in words_of for name in metavar.split("|")]
        if meant := options_meant(option, [*known, *positional]):
            found = [name if name.startswith("-") else f"{name}, a word without dashes" for name in meant]
            return f"{verb} has no option {option}; did you mean {', or '.join(found)}?"
        if close := difflib.get_close_matches(option, known, n=1, cutoff=0.8):
            return f"{verb} has no option {option}; did you mean {close[0]}?"
        if not any(action.dest == "config" for action in self._actions):
            return f"{verb} has no option {option}"
        if not equals and (after := words[words.index(word) + 1 :]) and not after[0].startswith("--"):
            value = after[0]
        from llm_jax.train.config import RunConfig

        keys = suggestions(option.strip("-").replace("-", "_"), RunConfig)
        meant = ", or ".join(f"{key}={value}" for key in keys) or "such as model.n_layers=8"
        return f"{verb} has no option {option}; a config is changed by key=value, without dashes: {meant}"


class Once(argparse.Action):
    """Store the value of an option, or of a word. An option given twice is an error: one value would be lost."""

    def __call__(self, parser: Any, namespace: Namespace, values: Any, option_string: str | None = None) -> None:
        if option_string and self.dest in parser.given:
            both = f"{parser.given[self.dest]!r} and {values!r}"
            parser.error(f"{option_string} is given twice, {both}; keep one of them")
        parser.given[self.dest] = values
        setattr(namespace, self.dest, values)


def _number(text: str, *, kind: type) -> int | float:
    """Read a number by `read_number`: no `1_000`, no infinity or nan, and no count of 2**32 or more."""
    try:
        number = read_number(text, kind)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if kind is int and abs(number) >= 2**32:
        raise argparse.ArgumentTypeError(f"takes a whole number below {2**32}, got {text}")
    return number


Argument = Callable[[ArgumentParser], object]


def arg(*names: str, **options: Any) -> Argument:
    """Return what adds an argument to a parser; the arguments are those of `add_argument`."""
    if options.get("type") in (int, float):
        options["type"] = functools.partial(_number, kind=options["type"])
    return lambda parser: parser.add_argument(*names, **options)


RUN = arg("run", metavar="RUN", help="a run folder")
ASSIGNMENTS = arg("assignments", metavar="key=value", nargs="*", default=[], help="keys to change, as model.n_layers=8")
CHECKPOINT = arg("--checkpoint", default="best", metavar="WHICH", help="best (default), last, or a step")
COLUMN = arg("--column", metavar="NAME", help="of rows, which column is text; default: text, else content")
BEGIN_OF_TEXT = arg(
    "--begin",
    action=BooleanOptionalAction,
    help="begin-of-text before each text; default: as in training, or as an imported tokenizer does",
)
JSON = arg("--json", action="store_true", help="print one JSON object instead")
PEERS: tuple[Argument, ...] = (
    arg("--coordinator", metavar="HOST:PORT", help="where process 0 of several can be reached"),
    arg("--processes", type=int, metavar="N", help="how many there are; those of a scheduler are found automatically"),
    arg("--process", type=int, metavar="I", help="which one this is, from 0"),
)
DEBUG = arg("--debug", action="store_true", help="show the traceback of an error")


def help_(args: Namespace) -> None:
    """Explain a verb, with examples.

    Without VERB, list them all. `llm-jax VERB --help` is the same.

    llm-jax help
    llm-jax help train
    """
    parser().parse_args([*([args.verb] if args.verb else []), "--help"])


# The verbs and what they take. A verb is a function, and its docstring is its help.
SYNTAX: dict[Callable[[Namespace], int | None], tuple[Argument, ...]] = {
    training.train: (
        arg("config", metavar="CONFIG", help="a recipe (llm-jax configs) or a Python file"),
        ASSIGNMENTS,
        arg("--run", metavar="DIR", help="the run folder; default: runs/CONFIG"),
        arg("--resume", action="store_true", help="resume the run that is already there, if there is one"),
        arg("--from", dest="source_run", metavar="RUN", help="start from its weights, with its model and tokenizer"),
        *PEERS,
        JSON,
    ),
    training.resume: (
        RUN,
        arg(
            "assignments",
            metavar="key=value",
            nargs="*",
            default=[],
            help="another layout, for other devices, as mesh.fsdp=4",
        ),
        arg("--steps", type=int, metavar="N", help="a new total of steps"),
        *PEERS,
        JSON,
    ),
    tokenizing.prepare: (
        arg("uri", metavar="URI", help="where the text is"),
        arg("--out", required=True, metavar="DIR", help="a folder that does not exist yet"),
        arg("--tokenizer", default="train:4096", metavar="NAME", help="default: train:4096"),
        arg("--separator", metavar="TEXT", help=r"cut documents after this text, such as $'\n\n'"),
        COLUMN,
        arg("--no-end-of-text", dest="end_of_text", action="store_false", help="put no such token after documents"),
        arg("--heldout", type=float, default=0.05, metavar="SHARE", help="of the documents; default: 0.05"),
        arg("--heldout-by", choices=("hash", "tail"), default="hash", help="chosen by content, or the last"),
        arg("--special", action="store_true", help="read <|endoftext|> and the like as special tokens"),
        arg("--workers", metavar="N", help="processes, ray, or ray://HOST:PORT; default: one a core"),
        JSON,
    ),
    using.generate: (
        RUN,
        arg("--prompt", action="append", metavar="TEXT", help="again for more; default: standard input"),
        arg("--max-tokens", type=int, default=200, metavar="N", help="default: 200"),
        arg("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy; default: 0.8"),
        arg("--top-k", type=int, metavar="K", help="only the K likeliest tokens"),
        arg("--top-p", type=float, metavar="P", help="only the fewest tokens of probability P together"),
        arg("--min-p", type=float, metavar="P", help="only tokens P times as likely as the likeliest"),
        arg("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: fewer repeats"),
        arg("--stop", action="append", default=[], metavar="TEXT", help="end before it; again for more"),
        arg("--seed", type=int, default=0, metavar="N", help="another number, another text"),
        arg("--samples", type=int, default=1, metavar="N", help="texts from each prompt"),
        arg("--weights", choices=["int8"], help="hold matrices in a quarter of the memory; default: as model.dtype"),
        arg(
            "--draft", metavar="RUN", help="a smaller run, or the word lookup, proposes tokens: the same texts, sooner"
        ),
        BEGIN_OF_TEXT,
        arg("--special", action=BooleanOptionalAction, help="read special tokens in prompts; default: as in training"),
        CHECKPOINT,
        JSON,
    ),
    using.evaluate: (
        RUN,
        arg("--data", metavar="URI", help="score all of this text"),
        COLUMN,
        BEGIN_OF_TEXT,
        CHECKPOINT,
        JSON,
    ),
    planning.show: (
        arg("config", metavar="CONFIG|RUN", help="recipe, Python file, or run"),
        ASSIGNMENTS,
        arg("--config", action="store_true", dest="keys", help="every key instead: value, default, meaning"),
        JSON,
    ),
    planning.plan: (
        arg("config", metavar="CONFIG|RUN", help="recipe, Python file, or run"),
        ASSIGNMENTS,
        arg("--topology", required=True, metavar="NAME", help="v5e:4x4, v5p:2x2x4, h100:1x8, cpu:8, ..."),
        arg("--slices", type=int, default=1, metavar="N", help="of TPUs, or groups of nodes; default: 1"),
        arg("--price", type=float, metavar="P", help="of a chip an hour, for what tokens cost"),
        arg("--search", action="store_true", help="try other meshes, remat, microbatches, batches"),
        arg("--compiles", type=int, metavar="N", help="that --search may take; default: 6"),
        JSON,
    ),
    checking.compare: (
        arg("config", metavar="CONFIG", help="a recipe (llm-jax configs) or a Python file"),
        ASSIGNMENTS,
        arg("--steps", type=int, default=200, metavar="N", help="of the run, its first; default: 200"),
        arg("--out", metavar="DIR", help="where the page goes; default: compare/CONFIG"),
        arg("--no-compile", dest="compiled", action="store_false", help="leave torch.compile out"),
        JSON,
    ),
    checking.verify: (
        arg(
            "config",
            metavar="CONFIG",
            nargs="?",
            default="quickstart",
            help="recipe or Python file; default: quickstart",
        ),
        ASSIGNMENTS,
        arg("--axes", metavar="A,B", help="only layouts of these mesh axes"),
        JSON,
    ),
    checking.check: (
        arg(
            "config",
            metavar="CONFIG",
            nargs="?",
            default="quickstart",
            help="recipe or Python file; default: quickstart",
        ),
        ASSIGNMENTS,
        JSON,
    ),
    models.import_: (
        arg("source", metavar="PATH|NAME", help="a folder, or a name on the Hugging Face hub"),
        arg("--run", required=True, metavar="DIR", help="the run folder"),
        arg("--tokenizer", metavar="NAME", help="in place of the model's own: gpt2, ..., or a folder"),
        JSON,
    ),
    models.export: (
        RUN,
        arg("--out", required=True, metavar="DIR", help="a folder that does not exist yet"),
        arg("--family", metavar="NAME", help="default: as imported, or the first that fits"),
        arg("--dtype", choices=("float32", "bfloat16", "float16"), help="default: model.dtype"),
        CHECKPOINT,
        JSON,
    ),
    planning.configs: (
        arg("name", metavar="NAME", nargs="?", help="a recipe, or a Python file, to show every key of"),
        JSON,
    ),
    tokenizing.tokenize: (
        arg("text", metavar="TEXT", nargs="?", help="default: standard input"),
        arg("--tokenizer", default="byte", metavar="NAME", help="default: byte; gpt2, ..., a run, a folder"),
        arg("--special", action="store_true", help="read <|endoftext|> and the like as special tokens"),
        arg("--decode", type=int, nargs="+", metavar="ID", help="ids to text"),
        arg("--train", metavar="URI", help="train a tokenizer on this text"),
        COLUMN,
        arg("--vocab", type=int, default=4096, metavar="N", help="its size; default: 4096"),
        arg("--out", metavar="DIR", help="the folder where it is saved"),
        JSON,
    ),
    help_: (arg("verb", metavar="VERB", nargs="?", help="one of those that llm-jax --help lists"),),
}


def parser() -> ArgumentParser:
    """Return the parser of every verb with its arguments."""
    top = Parser(prog="llm-jax", description=ABOUT, epilog=BEGIN, allow_abbrev=False)
    top.formatter_class = argparse.RawDescriptionHelpFormatter
    jax = importlib.metadata.version("jax")  # without importing it
    version = f"llm-jax {__version__} (JAX {jax}, Python {platform.python_version()})"
    top.add_argument("--version", action="version", version=version, help="show the versions of llm-jax and JAX")
    choices = top.add_subparsers(metavar="VERB", required=True)
    for function, arguments in SYNTAX.items():
        summary, _, rest = (function.__doc__ or "").partition("\n")
        p = choices.add_parser(function.__name__.rstrip("_"), help=summary, description=summary, allow_abbrev=False)
        p.epilog = "\n".join(line.removeprefix("    ") for line in rest.rstrip().splitlines())
        p.formatter_class = argparse.RawDescriptionHelpFormatter
        for add in (*arguments, DEBUG):
            add(p)
        p.set_defaults(function=function)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Return 0, 2 for an error that the user can fix, or 128 + the signal that stopped a run.

    Raise what the user can't fix.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words or ["--help"], Namespace(command=shlex.join(["llm-jax", *words])))
    gc.set_threshold(100_000)  # imports and tracing make many objects and little garbage: a tenth less time to begin
    if not args.debug:
        _quiet()
    if "" not in sys.path:
        sys.path.append("")  # this folder, after all that is installed: a layer or loss of the user's own lies there
    try:
        status = args.function(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed("interrupted", args.debug, status=130)
    except BrokenPipeError:  # the reader of our output has closed it; nothing more may be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = _message(error)
        if message is None:
            raise
        as_typed = AS_OPTIONS.sub(lambda key: f"--{key[1]}{' ' * bool(key[2])}" if key[1] in args else key[0], message)
        return _failed(as_typed, args.debug)
    else:
        return status or 0
    return 0


def _message(error: Exception) -> str | None:
    """Say what went wrong and what to do about it; None for what the user can't fix."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            "out of memory; use a smaller data.batch_size, a larger accumulate, or model.remat=full "
            "(llm-jax show CONFIG says what takes how much)"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk for {error.filename or 'the output'}; make room there, or use another disk"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the output'}: {error.strerror}; fix that, or name another path"
    return runtime.unavailable(error) if isinstance(error, RuntimeError) else str(error)


def _failed(message: str, debug: bool, status: int = 2) -> int:
    if debug:
        traceback.print_exc()
    print(f"llm-jax: error: {_line(message)}", file=sys.stderr)
    return status


def _line(message: str) -> str:
    """Return `message` on one line, of limited length, without control characters."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    return line if len(line) <= 2000 else f"{line[:1000]} ... {line[-900:]}"


def _quiet() -> None:
    """Silence what libraries log and warn about, which users can't fix. Call it before JAX is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # an error of Orbax is raised, and printed on one line
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
