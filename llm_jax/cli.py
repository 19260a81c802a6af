"""`llm-jax VERB`: the command line and its errors. What a verb does stands in `verbs.py`."""

import argparse
import errno
import logging
import os
import re
import shlex
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from llm_jax import verbs
from llm_jax.config import nearest

ABOUT = "A language-model library in JAX that you can read in an evening and train on a pod."
BEGIN = "Begin with: llm-jax train quickstart. Or look around: llm-jax show shapes."


class Parser(ArgumentParser):
    """argparse with its errors on one line, and with `key=value` words anywhere among the options."""

    def error(self, message: str) -> Any:
        if choice := re.match(r".*invalid choice: '(.*)' \(choose from (.*)\)", message):
            names = re.findall(r"[\w-]+", choice[2])
            message = f"{choice[1]!r} is none of {', '.join(names)}; {nearest(choice[1], names)}"
        if setting := re.match(r"unrecognized arguments: --([\w.]+=\S+)", message):
            message += f"; a field of the config is set as {setting[1]}"
        self.exit(2, f"llm-jax: error: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore  (has overloads there)
        known, left = super().parse_known_args(args, namespace)
        if "assignments" in known:
            late = [word for word in left if "=" in word and not word.startswith("-")]
            known.assignments = [*known.assignments, *late]
            left = [word for word in left if word not in late]
        return known, left


Argument = Callable[[ArgumentParser], object]


def arg(*names: str, **options: Any) -> Argument:
    return lambda parser: parser.add_argument(*names, **options)


RUN = arg("run", metavar="RUN", help="a run folder")
ASSIGNMENTS = arg("assignments", metavar="key=value", nargs="*", help="fields to change, as model.n_layers=8")
CHECKPOINT = arg("--checkpoint", default="best", metavar="WHICH", help="best (default), last, or a step")
JSON = arg("--json", action="store_true", help="print one JSON object instead")
PEERS: tuple[Argument, ...] = (
    arg("--coordinator", metavar="HOST:PORT", help="where process 0 of several can be reached"),
    arg("--processes", type=int, metavar="N", help="how many there are; a scheduler's are found by themselves"),
    arg("--process", type=int, metavar="I", help="which one this is, from 0"),
)
DEBUG = arg("--debug", action="store_true", help="show the traceback of an error")


# What each function of `verbs` takes.
SYNTAX: dict[str, tuple[Argument, ...]] = {
    "train": (
        arg("config", metavar="CONFIG", help="a recipe (llm-jax configs) or a Python file"),
        ASSIGNMENTS,
        arg("--run", metavar="DIR", help="the run folder; default: runs/CONFIG"),
        arg("--from", dest="source_run", metavar="RUN", help="train on from its weights, with its model and tokenizer"),
        *PEERS,
        JSON,
    ),
    "resume": (
        RUN,
        arg("assignments", metavar="key=value", nargs="*", help="another layout, for other devices, as mesh.fsdp=4"),
        arg("--steps", type=int, metavar="N", help="a new total of steps"),
        *PEERS,
        JSON,
    ),
    "prepare": (
        arg("uri", metavar="URI", help="where the text is"),
        arg("--out", required=True, metavar="DIR", help="a folder that does not exist yet"),
        arg("--tokenizer", default="train:4096", metavar="NAME", help="default: train:4096"),
        arg("--separator", metavar="TEXT", help=r"cut documents behind this text, such as $'\n\n'"),
        arg("--no-end-of-text", dest="end_of_text", action="store_false", help="put no such token behind documents"),
        arg("--heldout", type=float, default=0.05, metavar="SHARE", help="of the documents; default: 0.05"),
        arg("--heldout-by", choices=("hash", "tail"), default="hash", help="chosen by content, or the last"),
        JSON,
    ),
    "generate": (
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
        CHECKPOINT,
        JSON,
    ),
    "evaluate": (
        RUN,
        arg("--data", metavar="URI", help="score all of this text"),
        CHECKPOINT,
        JSON,
    ),
    "show": (
        arg("config", metavar="CONFIG|RUN", help="recipe, Python file, or run"),
        ASSIGNMENTS,
        JSON,
    ),
    "plan": (
        arg("config", metavar="CONFIG|RUN", help="recipe, Python file, or run"),
        ASSIGNMENTS,
        arg("--topology", required=True, metavar="NAME", help="v5e:4x4, v5p:2x2x4, h100:1x8, cpu:8, ..."),
        arg("--slices", type=int, default=1, metavar="N", help="of TPUs, or groups of nodes; default: 1"),
        arg("--price", type=float, metavar="P", help="of a chip an hour, for what tokens cost"),
        arg("--search", action="store_true", help="try other meshes, remat, microbatches, batches"),
        arg("--compiles", type=int, metavar="N", help="that --search may take; default: 6"),
        JSON,
    ),
    "compare": (
        arg("config", metavar="CONFIG", help="a recipe (llm-jax configs) or a Python file"),
        ASSIGNMENTS,
        arg("--steps", type=int, default=200, metavar="N", help="of the run, its first; default: 200"),
        arg("--out", metavar="DIR", help="where the page goes; default: compare/CONFIG"),
        arg("--no-compile", dest="compiled", action="store_false", help="leave torch.compile out"),
        JSON,
    ),
    "verify": (
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
    "import_": (
        arg("source", metavar="PATH|NAME", help="a folder, or a name on the Hugging Face hub"),
        arg("--run", required=True, metavar="DIR", help="the run folder"),
        arg("--tokenizer", metavar="NAME", help="in place of the model's own: gpt2, ..., or a folder"),
        JSON,
    ),
    "export": (
        RUN,
        arg("--out", required=True, metavar="DIR", help="a folder that does not exist yet"),
        arg("--family", metavar="NAME", help="default: as imported, or the first that fits"),
        arg("--dtype", choices=("float32", "bfloat16", "float16"), help="default: model.dtype"),
        CHECKPOINT,
        JSON,
    ),
    "configs": (JSON,),
    "tokenize": (
        arg("text", metavar="TEXT", nargs="?", help="default: standard input"),
        arg("--tokenizer", default="byte", metavar="NAME", help="default: byte; gpt2, ..., a run, a folder"),
        arg("--special", action="store_true", help="read <|endoftext|> as the special token"),
        arg("--decode", type=int, nargs="+", metavar="ID", help="ids to text"),
        arg("--train", metavar="URI", help="train a tokenizer on this text"),
        arg("--vocab", type=int, default=4096, metavar="N", help="its size; default: 4096"),
        arg("--out", metavar="DIR", help="the folder where it is saved"),
        JSON,
    ),
}


def parser() -> ArgumentParser:
    """Every verb with its arguments; its docstring is its help."""
    top = Parser(prog="llm-jax", description=ABOUT, epilog=BEGIN)
    choices = top.add_subparsers(metavar="VERB", required=True)
    for name, arguments in SYNTAX.items():
        function = getattr(verbs, name)
        summary, _, rest = (function.__doc__ or "").partition("\n")
        p = choices.add_parser(name.rstrip("_"), help=summary, description=summary)
        p.epilog = "\n".join(line.removeprefix("    ") for line in rest.rstrip().splitlines())
        p.formatter_class = argparse.RawDescriptionHelpFormatter
        for add in (*arguments, DEBUG):
            add(p)
        p.set_defaults(function=function)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb. The exit status: 0, 2 for an error that the user can mend, 130 for Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words or ["--help"], Namespace(command=shlex.join(["llm-jax", *words])))
    if not args.debug:
        _quiet()
    try:
        args.function(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed("interrupted", args.debug, status=130)
    except BrokenPipeError:  # who reads our output has seen enough; nothing more may be written at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        message = _message(error)
        if message is None:
            raise
        return _failed(message, args.debug)
    return 0


def _message(error: Exception) -> str | None:
    """What went wrong and what to do about it; None for what the user can't mend."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return (
            "out of memory; use a smaller data.batch_size, a larger accumulate, or model.remat=full "
            "(llm-jax show CONFIG says what takes how much)"
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"no space left on the disk for {error.filename or 'output'}; make room, or name another folder"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'output'}: {error.strerror}; mend that, or name another path"
    return None if isinstance(error, RuntimeError) else str(error)


def _failed(message: str, debug: bool, status: int = 2) -> int:
    if debug:
        traceback.print_exc()
    print(f"llm-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _quiet() -> None:
    """Silences what libraries log and warn about, which is not the user's to mend. Before JAX is imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # what fails in Orbax is raised, and said in a line
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
