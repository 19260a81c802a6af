"""`llm-jax generate` and `llm-jax evaluate`: use a trained model."""

import dataclasses
from argparse import Namespace

from llm_jax.cli.shared import error_console, print_json, say, warn_of_special


def generate(args: Namespace) -> None:
    r"""Generate text with the model of RUN.

    Without --prompt every line of standard input is a prompt; a terminal is asked for one at a time, and with an empty
    pipe the prompts are those of the run's samples. Texts are printed one after the other. A translation run prints
    the answer to each prompt, and a classifier the likeliest class with its probability.

    A prompt begins like the documents that the run was trained on; for an imported run, as its tokenizer begins a text,
    so that greedy text equals that of transformers. --begin and --no-begin override this. With --draft another run, or
    what followed in the text before (lookup), proposes tokens, and a line says how many were kept. Raise an error (exit
    status 2) for a number of samples or a seed out of its range, and for a draft that does not fit.

      llm-jax generate runs/quickstart --prompt 'def read_lines(path):' --samples 3
      llm-jax generate runs/quickstart --weights int8 --draft lookup --prompt 'def read_lines(path):'
      llm-jax generate runs/quickstart --temperature 0 --stop $'\n\n' < prompts.txt
    """
    from llm_jax.runs import folder as run_folder

    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed {args.seed} must lie between 0 and {2**32 - 1}")
    if args.samples < 1:
        raise ValueError(f"--samples {args.samples} generates nothing; use 1 or more")
    if args.samples > 10_000:
        raise ValueError(
            f"--samples {args.samples} do not fit in memory together; use 10000 or less, and another --seed"
        )
    run_folder.check_run(args.run)
    _generate(args)


def _generate(args: Namespace) -> None:
    """Generate, once there is a run to do it: what is imported here takes seconds, which no refusal waits for."""
    from llm_jax import runtime
    from llm_jax.cli import terminal
    from llm_jax.infer.generate import row_by_row
    from llm_jax.ops.sampling import Sampling
    from llm_jax.runs.compiling import told
    from llm_jax.runs.run import Run

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty)
    run = Run.open(args.run, args.checkpoint, report=say)
    reading = {"begin": args.begin, "special": args.special}
    spelled = not (run.config.data.special if args.special is None else args.special)
    runtime.start()
    classifies, texts = run.config.model.n_classes is not None, []
    sampler = None if classifies else run.new_sampler(**reading, weights=args.weights)
    draft = args.draft if args.draft in (None, "lookup") else Run.open(args.draft, report=say).new_sampler()
    with told(error_console()):
        for number, given in enumerate([args.prompt] if args.prompt else terminal.read_prompts(run.config.prompts)):
            if spelled:
                warn_of_special(run.tokenizer, given)
            if sampler is None:
                answers = run.classify(given, **reading)
                texts += map(dataclasses.asdict, answers)
                if not args.json:
                    terminal.write("".join(f"{a.prompt}  {a.answer}  {a.probability:.2%}\n" for a in answers))
                continue
            prompts = [run.config.data.ask(prompt) for prompt in given for _ in range(args.samples)]
            options = {"max_tokens": args.max_tokens, "stop": args.stop, "seed": args.seed + number, "draft": draft}
            if args.json:
                texts += map(dataclasses.asdict, sampler.texts(prompts, sampling, **options))
            else:
                drafted, kept = terminal.write_rows(prompts, row_by_row(sampler.stream(prompts, sampling, **options)))
                if drafted:
                    say(f"draft: {kept} of {drafted} tokens kept, {kept / drafted:.0%}")
    if args.json:
        print_json({"run": args.run, "step": run.step, "texts": texts})


def evaluate(args: Namespace) -> None:
    """Measure how well RUN predicts text that it has not seen.

    Loss in nats a token, perplexity, bits per byte, and for a task the share of right answers, each with the 95 %
    interval of a bootstrap over documents. The text is what the run held out, or all of --data. Each source of a
    mixture counts by its weight, and is shown by itself too. Raise an error (exit status 2) for --column, --begin or
    --no-begin without --data.

      llm-jax evaluate runs/quickstart
      llm-jax evaluate runs/quickstart --data essays/ --json
    """
    from llm_jax.runs import folder as run_folder

    if args.column is not None and args.data is None:
        raise ValueError(f"--column {args.column} is for text of your own; add --data URI, or leave it out")
    if args.begin is not None and args.data is None:
        raise ValueError("--begin and --no-begin are for text of your own; add --data URI, or leave them out")
    run_folder.check_run(args.run)
    _evaluate(args)


def _evaluate(args: Namespace) -> None:
    from llm_jax import runtime
    from llm_jax.runs.compiling import told
    from llm_jax.runs.run import Run

    runtime.start()
    run = Run.open(args.run, args.checkpoint, report=say)
    with told(error_console()):
        result = run.evaluate(args.data, column=args.column, begin=args.begin)
    if not args.json:
        print(result)
        return
    found = dataclasses.asdict(result) | {"perplexity_interval": result.perplexity_interval}
    print_json({"run": args.run, "step": run.step, **found})
