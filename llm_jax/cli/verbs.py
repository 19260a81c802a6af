"""What each verb of `llm-jax` does, in a few lines of wiring; its docstring is what `--help` says.

What a verb needs is imported inside it: `configs`, `tokenize` and `--help` answer before JAX could start.
"""

import dataclasses
import json
import math
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_jax.config import nearest, override
from llm_jax.files import strict, whole_folder
from llm_jax.recipes import recipe_docstring, recipes

if TYPE_CHECKING:
    from rich.console import Console

    from llm_jax.data.tokenizer import Tokenizer
    from llm_jax.runs.run import Run
    from llm_jax.train.config import RunConfig


def train(args: Namespace) -> int:
    """Start a run of CONFIG, a recipe or a Python file.

    Each key=value changes a field of the config. The run folder comes to hold all there is to know of the run:
    config, tokenizer, checkpoints, metrics, report. Ctrl-C or SIGTERM saves a checkpoint and stops, with exit status
    130 or 143. With --resume the same line serves to begin and, however often it is stopped, to resume. With --from the
    model, its tokenizer and its weights are those of another run, imported or trained; data and training are CONFIG's.

      llm-jax train quickstart
      llm-jax train quickstart model.n_layers=8 optimizer.learning_rate=3e-4 --run runs/deeper
      llm-jax train quickstart --from runs/deeper --run runs/again        its model, tokenizer and weights
    """
    from llm_jax import processes, runtime
    from llm_jax.runs import fit
    from llm_jax.runs import folder as run_folder

    config = None if args.resume else _config(args)
    folder = Path(args.run or f"runs/{Path(args.config).stem}")
    runtime.start()
    with processes.joined(args.coordinator, args.processes, args.process):
        if args.resume and processes.from_first(lambda: run_folder.is_run(folder)):
            return _go_on(args, folder)
        config = config or _config(args)
        run = fit.fit(config, folder, console=_console(args), command=args.command)
        return _say_what_next(args, folder, _came_to(run), config.steps)


def _go_on(args: Namespace, folder: Path) -> int:
    """Resume the run in `folder`, which may be finished, and say where it is not what the command line says.

    A run that it came from by --from is not needed any more.
    """
    from llm_jax.runs import fit
    from llm_jax.runs import folder as run_folder

    old = run_folder.load_config(folder)
    whole = args.source_run is None or run_folder.is_run(Path(args.source_run))
    if changed := run_folder.changes(folder, _config(args)) if whole else []:
        _say(f"{folder} goes on with its own config: {'; '.join(changed[:3])}")
    if (folder / "checkpoints" / str(old.steps)).is_dir():
        _say(
            f"{folder} is trained already, to step {old.steps:,}; further: llm-jax resume {folder} --steps N; again: "
            "choose another --run"
        )
        return _say_what_next(args, folder, old.steps, old.steps)
    return _say_what_next(args, folder, _came_to(fit.resume(folder, console=_console(args))), old.steps)


def resume(args: Namespace) -> int:
    """Go on exactly where RUN stopped.

    Weights, optimizer, data and metrics continue as if nothing had happened, bit for bit. With --steps the run
    gets a new total, and the learning-rate schedule stretches to it. The mesh may change: sums are then in another
    order, and the last digits with them.

      llm-jax resume runs/quickstart
      llm-jax resume runs/quickstart --steps 4000
      llm-jax resume runs/quickstart mesh.fsdp=4              on other devices, in another layout
    """
    from llm_jax import processes, runtime
    from llm_jax.runs import fit

    runtime.start()
    with processes.joined(args.coordinator, args.processes, args.process):
        run = fit.resume(args.run, steps=args.steps, layout=args.assignments, console=_console(args))
        return _say_what_next(args, args.run, _came_to(run), run.config.steps)


def _came_to(run: "Run") -> int:
    """How many steps a run has behind it that has just ended."""
    assert run.progress is not None
    return run.progress.step


def _console(args: Namespace) -> "Console":
    """Where a run shows itself: beside standard output where that is for one JSON object. One of several speaks."""
    from rich.console import Console

    from llm_jax import processes

    return Console(stderr=args.json, quiet=not processes.is_first())


def _say_what_next(args: Namespace, folder: Path | str, step: int, steps: int) -> int:
    """The exit status, after a word on where the run stands: not 0 where it was stopped, or a script would go on."""
    from llm_jax import log, processes
    from llm_jax.runs import signals

    status = 128 + signals.last_signal if step < steps else 0
    if not processes.is_first():
        return status
    if args.json:
        last = [{"step": step}, *log.read(folder)][-1]  # a user may have deleted the rows
        _print_json({"run": str(folder), "steps": steps, **last})
    elif step < steps:
        print(f"stopped at step {step:,} of {steps:,}; resume with: llm-jax resume {folder}")
    else:
        print(f"done; read {folder}/report.html, or generate text: llm-jax generate {folder}")
    return status


def prepare(args: Namespace) -> None:
    """Turn the text at URI into token shards, once.

    URI is builtin:python (or numbers, or brackets), a file, a folder, a pattern, hf://datasets/..., or any address that
    fsspec reads: text, or rows of .jsonl, .json, .csv, .tsv or .parquet. Training does all this by itself, into a
    cache; do it by hand for text that several machines share.

      llm-jax prepare builtin:python --out data/python --tokenizer train:8192
      llm-jax train quickstart data.uri=data/python data.tokenizer=train:8192 model.vocab_size=8192
    """
    from llm_jax.data import prepare as preparing

    options = {name: vars(args)[name] for name in preparing.SETTINGS}
    manifest = preparing.prepare(args.uri, args.out, **options, report=_say)
    if args.json:
        _print_json(dataclasses.asdict(manifest))
    else:
        tokenizer = f"data.tokenizer={args.tokenizer} model.vocab_size={-(-manifest.vocab_size // 64) * 64}"
        print(f"done; train on it with: llm-jax train CONFIG data.uri={args.out} {tokenizer}")


def generate(args: Namespace) -> None:
    r"""Let the model of RUN write.

    Without --prompt every line of standard input is a prompt; on a terminal it asks for one after the other, and
    from an empty pipe it takes those that the run sampled from. Several texts come one after the other. A run that
    translates writes the answer of each, and a classifier names the likeliest, with its probability.

    A prompt begins as the documents did that the run was trained on; of an imported run, as its tokenizer begins a
    text, so that the greedy text is that of transformers. --begin and --no-begin say otherwise.

      llm-jax generate runs/quickstart --prompt 'def read_lines(path):' --samples 3
      llm-jax generate runs/quickstart --temperature 0 --stop $'\n\n' < prompts.txt
    """
    from llm_jax import runtime
    from llm_jax.cli import terminal
    from llm_jax.infer.generate import row_by_row
    from llm_jax.ops.sampling import Sampling
    from llm_jax.runs.run import Run

    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed} must lie between 0 and {2**32 - 1}")
    if args.samples < 1:
        raise ValueError(f"--samples {args.samples} generates nothing; use 1 or more")
    if args.samples > 10_000:
        raise ValueError(
            f"--samples {args.samples} do not fit in memory together; use 10000 or less, and another --seed"
        )
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    run = Run.open(args.run, args.checkpoint, report=_say)
    reading = {"begin": args.begin, "special": args.special}
    spelled = not (run.config.data.special if args.special is None else args.special)
    runtime.start()
    classifies, texts = run.config.model.n_classes is not None, []
    sampler = None if classifies else run.new_sampler(**reading)
    for number, given in enumerate([args.prompt] if args.prompt else terminal.read_prompts(run.config.prompts)):
        if spelled:
            _say_what_is_spelled(run.tokenizer, given)
        if sampler is None:
            answers = run.classify(given, **reading)
            texts += map(dataclasses.asdict, answers)
            if not args.json:
                terminal.write("".join(f"{a.prompt}  {a.answer}  {a.probability:.2%}\n" for a in answers))
            continue
        prompts = [run.config.data.ask(prompt) for prompt in given for _ in range(args.samples)]
        options = {"max_tokens": args.max_tokens, "stop": args.stop, "seed": args.seed + number}
        if args.json:
            texts += map(dataclasses.asdict, sampler.texts(prompts, sampling, **options))
        else:
            terminal.write_rows(prompts, row_by_row(sampler.stream(prompts, sampling, **options)))
    if args.json:
        _print_json({"run": args.run, "step": run.step, "texts": texts})


def evaluate(args: Namespace) -> None:
    """Measure how well RUN predicts text that it has not seen.

    Loss in nats a token, perplexity, bits per byte, and of a task the share of right answers, each with the 95 %
    interval of a bootstrap over documents. The text is what the run held out, or all that --data names. Of a mixture
    each source counts by its weight, and is shown by itself.

      llm-jax evaluate runs/quickstart
      llm-jax evaluate runs/quickstart --data essays/ --json
    """
    from llm_jax import runtime
    from llm_jax.runs.run import Run

    if args.column is not None and args.data is None:
        raise ValueError(f"--column {args.column} is one of other text; add --data URI, or leave it out")
    if args.begin is not None and args.data is None:
        raise ValueError("--begin and --no-begin are for text of yours; add --data URI, or leave them out")
    runtime.start()
    run = Run.open(args.run, args.checkpoint, report=_say)
    result = run.evaluate(args.data, column=args.column, begin=args.begin)
    found = {"run": args.run, "step": run.step, **dataclasses.asdict(result)}
    interval = result.loss_interval
    found["perplexity_interval"] = None if interval is None else [math.exp(min(loss, 700)) for loss in interval]
    if args.json:
        _print_json(found)
        return
    for name, digits in (("loss", 4), ("perplexity", 2), ("bits_per_byte", 4), ("accuracy", 4)):
        if found[name] is not None:
            value, *ends = (f"{x:.{digits}f}" for x in (found[name], *(found[f"{name}_interval"] or ())))
            print(f"{name.replace('_', ' '):14} {value:>9}   {' to '.join(ends) or '-'}")
    for name, source in result.sources.items():
        bits = "" if source.bits_per_byte is None else f", {source.bits_per_byte:.4f} bits per byte"
        print(f"  {name}: loss {source.loss:.4f}{bits}")
    counts = {"tokens": result.tokens, "bytes": result.bytes, "documents": result.documents}
    print("on " + ", ".join(f"{count:,} {name}" for name, count in counts.items() if count))


def show(args: Namespace) -> None:
    """Show what a config amounts to: the shape of every activation, parameters, FLOPs, memory.

    Nothing is computed and nothing allocated: it takes a moment for a model of any size. A recipe is Python, and is
    run: read that of a stranger first (docs/cli.md).

      llm-jax show shapes                                    the walk to do first
      llm-jax show llama_1b data.batch_size=64 accumulate=8
      llm-jax show quickstart --config                       every key: value, default, meaning
    """
    from rich.console import Console

    from llm_jax import runtime
    from llm_jax.plan import describe as pages

    config = _config_or_run(args)
    if args.keys:
        _print_keys(config, json=args.json)
        return
    runtime.start()
    description = pages.describe(config)
    if args.json:
        _print_json(dataclasses.asdict(description))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(description)


def plan(args: Namespace) -> None:
    """Compile a train step for accelerators that are not here, and say what it would be.

    Whether it fits and where the memory goes, what is sent along which axis of the mesh, FLOPs, the time of a step at
    published peak rates, and at a --price what it costs. --search tries what may be changed, each a compile. A recipe
    is Python, and is run: read that of a stranger first (docs/cli.md).

      llm-jax plan llama2_7b --topology v5e:4x4
      llm-jax plan llama2_7b --topology v5p:2x2x1 data.batch_size=8 --price 4.2
      llm-jax plan llama2_7b --topology v5e:4x4 data.batch_size=256 --search --compiles 6
    """
    from rich.console import Console

    from llm_jax import runtime
    from llm_jax.plan import plan as plans
    from llm_jax.plan import search
    from llm_jax.plan.topology import parse_topology

    if args.compiles is not None and (not args.search or args.compiles < 1):
        raise ValueError(f"--compiles {args.compiles} says how many --search may take; add --search, and at least 1")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise ValueError(f"--price {args.price} is that of a chip an hour, at least 0")
    topology = parse_topology(args.topology, args.slices)
    runtime.start(topology=topology)
    config, console = _config_or_run(args), Console(width=None if sys.stdout.isatty() else 120)
    searched = search.search(config, topology, args.compiles or 6, args.price, report=_say) if args.search else None
    found = plans.plan(config, topology, args.price) if searched is None else searched.tried[0].plan
    if args.json:
        planned = {} if found is None else found.to_json()
        _print_json(planned | ({} if searched is None else searched.to_json()))
        return
    if found is not None:
        console.print(found)
    if searched is not None:
        console.print(searched)


def _config(args: Namespace) -> "RunConfig":
    """The config of a recipe or a Python file, with the changes of the command line."""
    from llm_jax.runs import start

    try:
        config = start.load_recipe(args.config)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:
        where = f"{args.config} fails: {type(error).__name__}: {error}"
        raise ValueError(f"{where}; fix it (--debug shows the line)") from error
    if source := vars(args).get("source_run"):
        return start.config_from(source, config, args.assignments, _say)
    return override(config, args.assignments)


def _config_or_run(args: Namespace) -> "RunConfig":
    """The same, or that of a run folder."""
    from llm_jax.runs import folder as run_folder

    is_run = run_folder.is_run(Path(args.config))
    return override(run_folder.load_config(args.config), args.assignments) if is_run else _config(args)


def compare(args: Namespace) -> None:
    """Train CONFIG in JAX and in PyTorch, from the same weights on the same batches.

    Both take the first steps of the run, in turn, and PyTorch once more compiled, where there is a C++ compiler. DIR
    comes to hold compare.html and compare.json: the two curves and how far they part, speed, memory. Needs torch.

      llm-jax compare shakespeare_char data.uri=tinyshakespeare.txt
      llm-jax compare quickstart optimizer.name=adamw optimizer.learning_rate=1e-3 --steps 100
    """
    from llm_jax import runtime
    from llm_jax.compat import compare

    config, name = _config(args), Path(args.config).stem
    folder = Path(args.out or f"compare/{name}")
    runtime.start()
    result = compare.compare(config, args.steps, _say, compiled=args.compiled, command=args.command)
    if not args.json:
        print(compare.table(result))  # before the page: a disk may have no room for that
    compare.write(result, folder, name)
    if args.json:
        _print_json(result.to_json())
    else:
        print(f"read {folder}/compare.html")


def verify(args: Namespace) -> None:
    """Show that CONFIG, shrunk to test size, trains on every mesh as on one device.

    On eight simulated devices, in float32: each mesh axis alone, and every two together. Loss and the gradient of every
    parameter are compared, and twenty steps of training. All takes a quarter of an hour and more on two cores; --axes
    keeps to the layouts of these. A recipe is Python, and is run: read that of a stranger first (docs/cli.md).

      llm-jax verify                                                     of quickstart
      llm-jax verify quickstart model.layers=global+moe model.experts.number=8
      llm-jax verify llama_1b --axes fsdp,tensor
    """
    from llm_jax import runtime
    from llm_jax.plan import verify as checks

    config, chosen = _config(args), args.axes.split(",") if args.axes else checks.AXES
    for axis in chosen:
        if axis not in checks.AXES:
            raise ValueError(f"--axes {args.axes}: {axis!r} is no mesh axis; {nearest(axis, checks.AXES)}")
    wanted = [layout for layout in checks.layouts() if set(layout.axes) <= set(chosen)]
    runtime.start(checks.DEVICES)
    found = []
    print(checks.HEAD, file=sys.stderr if args.json else sys.stdout)
    for verdict in checks.verify(config, wanted):
        found.append(verdict)
        print(checks.line(verdict), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        _print_json(checks.verdicts_to_json(found))
    if all(verdict.refused for verdict in found):
        raise ValueError(f"none of {len(found)} layouts can be, for the reasons above; name other --axes")
    if different := [verdict.layout for verdict in found if verdict.equal is False]:
        raise ValueError(
            f"{', '.join(different)}: not what one device gives; find where it parts with fewer layers or a plainer "
            "model, and please report it"
        )


def check(args: Namespace) -> None:
    """Show that this machine computes a train step of CONFIG as it should.

    On a device of every kind that is here: what a step is made of, jitted and eager, against NumPy in double precision;
    and the step itself, shrunk to test size, jitted against eager. Versions with known faults are named. It takes a
    minute; where something is wrong the exit status is 2.

      llm-jax check                                                      of quickstart
      llm-jax check llama_1b model.norm=layernorm
    """
    from llm_jax import runtime
    from llm_jax.plan import check as checks

    config = _config(args)
    runtime.start()
    say = _say if args.json else print
    for about in (*checks.about(), "", checks.HEAD):
        say(about)
    found = []
    for finding in checks.check(config):
        found.append(finding)
        say(checks.line(finding))
    if args.json:
        _print_json(checks.findings_to_json(found))
    if wrong := [f"{finding.what} on {finding.device}" for finding in found if not finding.right]:
        raise ValueError(
            f"wrong here: {', '.join(wrong)}; train nothing on it before another version of jaxlib, or its way around, "
            "computes these right (docs/check.md)"
        )


def import_(args: Namespace) -> None:
    """Make a run of a model from Hugging Face.

    PATH is a folder with config.json, safetensors and tokenizer files; a NAME is downloaded from the hub. The run has
    weights and a tokenizer: generate, evaluate on text of yours, or train on from it. docs/architectures.md lists
    the families of models that are known.

      llm-jax import HuggingFaceTB/SmolLM2-135M --run runs/smollm2
      llm-jax generate runs/smollm2 --prompt 'The sky is'
      llm-jax train essays.py --from runs/smollm2
    """
    from llm_jax import runtime
    from llm_jax.compat import huggingface
    from llm_jax.model.count import parameter_counts

    runtime.start()
    config = huggingface.import_run(args.source, args.run, tokenizer=args.tokenizer, command=args.command, report=_say)
    if args.json:
        _print_json({"run": args.run, "parameters": sum(parameter_counts(config.model).values())})
    else:
        print(f"done; generate text: llm-jax generate {args.run}")


def export(args: Namespace) -> None:
    """Write the model of RUN as Hugging Face has it: config, safetensors, tokenizer files.

    transformers loads the folder and computes the same. A model that no family can say is refused, with what is in
    the way.

      llm-jax export runs/quickstart --out exported/quickstart
      llm-jax export runs/llama --out exported/llama --dtype bfloat16 --checkpoint last
    """
    from llm_jax import runtime
    from llm_jax.compat import huggingface
    from llm_jax.runs import folder as run_folder
    from llm_jax.runs import restore

    runtime.start()
    program = restore.on_the_host(run_folder.load_config(args.run))
    params, step = restore.weights(args.run, program, args.checkpoint, report=_say)
    family = huggingface.export_run(args.run, params, args.out, family=args.family, dtype=args.dtype, report=_say)
    if args.json:
        _print_json({"out": args.out, "family": family.name, "step": step})
    else:
        print(f"a {family.name} of step {step:,} in {args.out}; transformers loads it as {family.architecture}")


def configs(args: Namespace) -> None:
    """List the recipes, a line each, or show one with all its keys.

    quickstart is trained by its name alone; the others by the command that heads their file, with its result. Of NAME
    every key is shown as key=value, with its default where that differs and its meaning. A recipe is Python, and is run
    wherever it is read: read that of a stranger first.

      llm-jax configs
      llm-jax configs quickstart
    """
    if args.name is not None:
        _print_recipe(args)
        return
    found = {name: recipe_docstring(path).partition("\n")[0] for name, path in recipes().items()}
    if args.json:
        _print_json(found)
        return
    for name, line in found.items():
        print(f"{name:18} {line}")


def _print_recipe(args: Namespace) -> None:
    config = _config(Namespace(config=args.name, assignments=[]))
    if not args.json:
        print(recipe_docstring(recipes().get(args.name, Path(args.name))).rstrip() + "\n")
    _print_keys(config, json=args.json)


def _print_keys(config: "RunConfig", *, json: bool) -> None:
    from rich.console import Console

    from llm_jax.plan import describe as pages

    if json:
        _print_json(pages.keys_as_json(config))
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(pages.keys_table(config))


def tokenize(args: Namespace) -> None:
    """Show how text falls into tokens, turn ids into text, or train a tokenizer.

    Each token stands above its id; a blank is a dot, and a byte of a larger character is in hexadecimal.

      llm-jax tokenize 'def f(x): return x' --tokenizer runs/quickstart
      llm-jax tokenize --tokenizer gpt2 --decode 15496 11 995
      llm-jax tokenize --train essays/ --vocab 8192 --out tokenizers/essays
    """
    from llm_jax.cli import terminal
    from llm_jax.data import tokenizer

    if args.train:
        _train_tokenizer(args)
        return
    if args.column is not None:
        raise ValueError(f"--column {args.column} is one of what a tokenizer learns from; add --train URI")
    given = sys.stdin.read() if args.text is None and args.decode is None else args.text or ""
    inside = Path(args.tokenizer) / "tokenizer"  # of a run, or of prepared data
    coder = tokenizer.load_tokenizer(inside) if inside.is_dir() else tokenizer.build(args.tokenizer, lambda: [given])
    if not args.special:
        _say_what_is_spelled(coder, [given])
    tokens = coder.encode(given, special=args.special).tolist() if args.decode is None else args.decode
    if args.json:
        pieces = [coder.decode([token]) for token in tokens]
        _print_json({"tokenizer": coder.name, "ids": tokens, "text": coder.decode(tokens), "pieces": pieces})
    elif args.decode is not None:
        terminal.write(coder.decode(tokens) + "\n")
    else:
        terminal.write_tokens(coder, tokens)
        size = len(given.encode())
        print(f"\n{len(tokens):,} tokens of {coder.name}, {size / max(1, len(tokens)):.2f} bytes each")


def _train_tokenizer(args: Namespace) -> None:
    from llm_jax.data import sources, tokenizer

    if not args.out or Path(args.out).exists():
        raise ValueError(f"--train saves the tokenizer in a new folder; add --out DIR (got {args.out})")
    documents = sources.documents(args.train, column=args.column, report=_say)
    text = tokenizer.train(args.vocab, (document.text for document in documents))
    with whole_folder(Path(args.out), "tokenizer") as folder:
        text.save(folder)
    if args.json:
        _print_json({"tokenizer": args.out, "vocab_size": text.vocab_size})
        return
    print(f"{text.vocab_size:,} ids; look at them with: llm-jax tokenize TEXT --tokenizer {args.out}")


def _say_what_is_spelled(coder: "Tokenizer", texts: Sequence[str]) -> None:
    if found := next(filter(None, map(coder.spelled, texts)), None):
        _say(f"the text spells {found}, which is read as text; for the token add --special")


def _say(line: str) -> None:
    """Tells what happens on the way; standard output is for what was asked for."""
    print(line, file=sys.stderr)


def _print_json(value: dict[str, Any]) -> None:
    value = strict(value)
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal of ASCII, or the name of a file that is not UTF-8
        text = json.dumps(value, indent=2)
    print(text)
