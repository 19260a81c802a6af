"""`llm-jax VERB`: wiring and error printing, no logic of its own.

What a verb needs is imported inside it, so that `--help`, `configs` and `tokenize` answer before JAX could start.
"""

import argparse
import dataclasses
import json
import logging
import os
import shlex
import sys
import traceback
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax.config import override

if TYPE_CHECKING:
    from jaxtyping import PyTree

    from llm_jax.train.program import Program
    from llm_jax.train.run import RunConfig

ABOUT = "A language-model library in JAX that you can read in an evening and train on a pod."
BEGIN = "begin with: llm-jax train quickstart, or look around: llm-jax show shapes"


class Parser(argparse.ArgumentParser):
    """argparse with errors on one line, and `key=value` words wherever they stand among the options."""

    def error(self, message: str) -> Any:
        self.exit(2, f"llm-jax: error: {message}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Namespace, list[str]]:
        known, left = super().parse_known_args(args, namespace)
        if "assignments" in known:
            late = [word for word in left if "=" in word and not word.startswith("-")]
            known.assignments = [*known.assignments, *late]
            left = [word for word in left if word not in late]
        return known, left


def arg(*names: str, **options: Any) -> Callable[[argparse.ArgumentParser], Any]:
    return lambda parser: parser.add_argument(*names, **options)


def parser() -> argparse.ArgumentParser:
    """Every verb with its arguments. The first line of a verb's docstring is its summary, the rest ends its help."""
    run, uri = arg("run", metavar="RUN", help="a run folder"), arg("uri", metavar="URI", help="where the text is")
    config = arg("config", metavar="CONFIG", help="a recipe (llm-jax configs) or a Python file")
    assignments = arg("assignments", metavar="key=value", nargs="*", help="fields to change, as model.n_layers=8")
    as_json = arg("--json", action="store_true", help="print one JSON object")
    checkpoint = arg("--checkpoint", default="best", metavar="WHICH", help="best (default), last, or a step")
    top = Parser(prog="llm-jax", description=ABOUT, epilog=BEGIN)
    verbs = top.add_subparsers(metavar="VERB", dest="verb", required=True)

    def verb(function: Callable[[Namespace], None], *arguments: Callable[[argparse.ArgumentParser], Any]) -> None:
        summary, _, rest = (function.__doc__ or "").partition("\n")
        p = verbs.add_parser(
            function.__name__,
            help=summary,
            description=summary,
            epilog="\n".join(line.removeprefix("    ") for line in rest.rstrip().splitlines()),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for add in (*arguments, arg("--debug", action="store_true", help="show the traceback of an error")):
            add(p)
        p.set_defaults(function=function)

    verb(train, config, assignments, arg("--run", metavar="DIR", help="default: runs/CONFIG"))
    verb(resume, run, arg("--steps", type=int, metavar="N", help="a new total of steps"))
    verb(
        prepare,
        uri,
        arg("--out", required=True, metavar="DIR", help="a folder that does not exist yet"),
        arg("--tokenizer", default="train:4096", metavar="NAME", help="default: train:4096"),
        arg("--separator", metavar="TEXT", help="cut documents behind this text"),
        arg("--heldout", type=float, default=0.05, metavar="SHARE", help="of the documents, default 0.05"),
        arg("--heldout-by", choices=("hash", "tail"), default="hash", help="which documents: by content, or the last"),
        as_json,
    )
    verb(
        generate,
        run,
        arg("--prompt", action="append", metavar="TEXT", help="repeat for more; default: standard input, a line each"),
        arg("--max-tokens", type=int, default=200, metavar="N", help="default 200"),
        arg("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy, default 0.8"),
        arg("--top-k", type=int, metavar="K", help="only the K likeliest tokens"),
        arg("--top-p", type=float, metavar="P", help="only the fewest tokens of probability P together"),
        arg("--min-p", type=float, metavar="P", help="only tokens P times as likely as the likeliest"),
        arg("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1, repeats become rarer"),
        arg("--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeat for more"),
        arg("--seed", type=int, default=0, metavar="N", help="another number, another text"),
        arg("--samples", type=int, default=1, metavar="N", help="texts from each prompt"),
        checkpoint,
        as_json,
    )
    verb(evaluate, run, arg("--data", metavar="URI", help="score all of this instead"), checkpoint, as_json)
    verb(show, arg("config", metavar="CONFIG|RUN", help="a recipe, a Python file or a run folder"), assignments, as_json)
    verb(configs, as_json)
    verb(
        tokenize,
        arg("text", metavar="TEXT", nargs="?", help="default: standard input"),
        arg("--tokenizer", default="gpt2", metavar="NAME", help="gpt2 (default), byte, ..., a run or a folder"),
        arg("--special", action="store_true", help="read <|endoftext|> as the special token"),
        arg("--decode", type=int, nargs="+", metavar="ID", help="ids to text"),
        arg("--train", metavar="URI", help="train a tokenizer on this text"),
        arg("--vocab", type=int, default=4096, metavar="N", help="its size, default 4096"),
        arg("--out", metavar="DIR", help="where it is saved"),
        as_json,
    )
    return top


def train(args: Namespace) -> None:
    """Start a run of CONFIG, a recipe or a Python file.

    Each key=value changes a field of the config. The run folder holds all there is to know of the run: config,
    tokenizer, checkpoints, metrics, report. Ctrl-C saves a checkpoint and stops; llm-jax resume goes on.

      llm-jax train quickstart
      llm-jax train quickstart model.n_layers=8 optimizer.learning_rate=3e-4 --run runs/deeper
      llm-jax train quickstart init_from=runs/deeper --run runs/again      its weights, and nothing else
    """
    from llm_jax.train import loop, run

    config = override(run.load_recipe(args.config), args.assignments)
    loop.keep_compiled_programs()
    folder = Path(args.run or f"runs/{Path(args.config).stem}")
    progress = loop.train(config, folder, command=shlex.join(["llm-jax", *sys.argv[1:]]))
    _next(folder, progress.step, config.steps)


def resume(args: Namespace) -> None:
    """Go on exactly where RUN stopped.

    Weights, optimizer, data and metrics continue as if nothing had happened, bit for bit.

      llm-jax resume runs/quickstart
      llm-jax resume runs/quickstart --steps 4000
    """
    from llm_jax.train import loop, run

    loop.keep_compiled_programs()
    progress = loop.resume(args.run, steps=args.steps)
    _next(args.run, progress.step, run.load_config(args.run).steps)


def _next(folder: Path | str, step: int, steps: int) -> None:
    if step < steps:
        print(f"stopped at step {step:,} of {steps:,}; go on with: llm-jax resume {folder}")
    else:
        print(f"done; read {folder}/report.html, and let it write: llm-jax generate {folder}")


def prepare(args: Namespace) -> None:
    """Turn the text at URI into token shards, once.

    URI is builtin:python, a file, a folder, a glob, .jsonl or .parquet, hf://datasets/..., or any fsspec address.
    Training does this by itself, into a cache; do it by hand for a corpus that many runs or machines share.

      llm-jax prepare builtin:python --out data/python --tokenizer train:8192
      llm-jax train quickstart data.uri=data/python
    """
    from llm_jax.data import shards

    manifest = shards.prepare(
        args.uri,
        args.out,
        tokenizer=args.tokenizer,
        separator=args.separator,
        heldout=args.heldout,
        heldout_by=args.heldout_by,
        report=_say,
    )
    if args.json:
        _print_json(dataclasses.asdict(manifest))


def generate(args: Namespace) -> None:
    """Let the model of RUN write.

      llm-jax generate runs/quickstart --prompt 'def read_lines(path):' --samples 3
      printf 'import os\\nclass Queue:\\n' | llm-jax generate runs/quickstart --temperature 0
    """
    from llm_jax.infer.generate import generate as write
    from llm_jax.ops.sampling import Sampling
    from llm_jax.train import run
    from llm_jax.train.step import cast

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    config = run.load_config(args.run)
    prompts = args.prompt or ([] if sys.stdin.isatty() else sys.stdin.read().splitlines()) or list(config.prompts)
    prompts = [prompt for prompt in prompts for _ in range(args.samples)]
    _, params, step = _restore(args.run, config, args.checkpoint)
    texts = write(
        config.model,
        cast(params, config.model.dtype),
        run.load_tokenizer(args.run),
        prompts,
        sampling=sampling,
        max_tokens=args.max_tokens,
        stop=args.stop,
        seed=args.seed,
        begin=config.data.end_of_text,
    )
    rows = [{"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)]
    if args.json:
        _print_json({"step": step, "texts": rows})
    else:
        print("\n\n".join(prompt + text for prompt, text in zip(prompts, texts, strict=True)))


def evaluate(args: Namespace) -> None:
    """Measure how well RUN predicts text it has not seen.

    Loss in nats a token, perplexity, and bits per byte, each with a 95 % interval from a bootstrap over documents.

      llm-jax evaluate runs/quickstart
      llm-jax evaluate runs/quickstart --data essays/ --json
    """
    from llm_jax.data.loader import heldout_rows
    from llm_jax.train import loop, run
    from llm_jax.train.evaluate import evaluate as measure
    from llm_jax.train.evaluate import token_lengths

    config, split = run.load_config(args.run), "heldout"
    if args.data:
        data = dataclasses.replace(config.data, uri=args.data, tokenizer=f"{args.run}/tokenizer", heldout=0.0)
        config, split = dataclasses.replace(config, data=data), "train"
    shards = loop.open_data(config, _say)
    program, params, step = _restore(args.run, config, args.checkpoint)
    batches = heldout_rows(shards.split(split), config.data)
    result = measure(lambda batch: program.score(params, batch), batches, token_lengths(shards.tokenizer))
    if args.json:
        _print_json({"step": step, **dataclasses.asdict(result)})
        return
    print(f"loss           {result.loss:.4f} {result.loss_interval}")
    print(f"perplexity     {result.perplexity:.2f}")
    print(f"bits per byte  {result.bits_per_byte:.4f} {result.bits_per_byte_interval}")


def _restore(folder: str, config: "RunConfig", which: str) -> "tuple[Program, PyTree, int]":
    """The weights of the checkpoint `which` of the run in `folder`, their program and their step."""
    from llm_jax.train import loop
    from llm_jax.train.checkpoint import Checkpoints
    from llm_jax.train.program import Program

    loop.keep_compiled_programs()
    program = Program.on(config)
    with Checkpoints(Path(folder), read_only=True) as checkpoints:
        steps = {"best": checkpoints.best(), "last": max(checkpoints.steps(), default=None)}
        if which not in steps and not which.isdecimal():
            raise ValueError(f"--checkpoint {which!r} is none; use best, last, or one of {sorted(checkpoints.steps())}")
        step = steps[which] if which in steps else int(which)
        params, step = checkpoints.restore_params(program.abstract_state.params, _say, step)
    _say(f"{folder}, checkpoint of step {step:,}")
    return program, params, step


def show(args: Namespace) -> None:
    """Show what a config is: parameters, FLOPs, memory, and the shape at every named activation.

      llm-jax show shapes                     the walk to do first
      llm-jax show llama_1b data.batch_size=8
    """
    from llm_jax.model.config import parameter_counts
    from llm_jax.train import run

    _print_json(parameter_counts(override(run.load_recipe(args.config), args.assignments).model))


def configs(args: Namespace) -> None:
    """List the recipes, a line each.

      llm-jax configs
      llm-jax train NAME                      trains one
    """
    from llm_jax.train import run

    found = {name: run.recipe_docstring(path).partition("\n")[0] for name, path in run.recipes().items()}
    if args.json:
        _print_json(found)
        return
    for name, line in found.items():
        print(f"{name:18} {line}")


def tokenize(args: Namespace) -> None:
    """Show how text falls into tokens, and train a tokenizer.

      llm-jax tokenize 'Hello, world'
      llm-jax tokenize --decode 15496 11 995
      llm-jax tokenize --train essays/ --vocab 8192 --out tokenizers/essays
    """
    from llm_jax.data import tokenizer

    print(tokenizer.build(args.tokenizer, lambda: []).encode(args.text))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit status: 0, 2 for an error that the user can mend, 130 for Ctrl-C."""
    args = parser().parse_args(argv)
    _quiet()
    try:
        args.function(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed("interrupted", args.debug, status=130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, MemoryError) as error:
        return _failed(str(error), args.debug)
    return 0


def _failed(message: str, debug: bool, status: int = 2) -> int:
    if debug:
        traceback.print_exc()
    print(f"llm-jax: error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _quiet() -> None:
    """Silences what libraries log and warn about: none of it is the user's to mend."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("absl").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))

