"""`llm-jax import` and `llm-jax export`: models from Hugging Face, and back."""

from argparse import Namespace

from llm_jax.cli.shared import print_json, say


def import_(args: Namespace) -> None:
    """Make a run of a model from Hugging Face.

    PATH is a folder with config.json, safetensors and tokenizer files; a NAME is downloaded from the hub. The run has
    weights and a tokenizer: generate, evaluate on your own text, or train further. docs/architectures.md lists the
    supported model families.

      llm-jax import HuggingFaceTB/SmolLM2-135M --run runs/smollm2
      llm-jax generate runs/smollm2 --prompt 'The sky is'
      llm-jax train essays.py --from runs/smollm2
    """
    from llm_jax import runtime
    from llm_jax.compat import huggingface
    from llm_jax.model.count import parameter_counts

    runtime.start()
    config = huggingface.import_run(args.source, args.run, tokenizer=args.tokenizer, command=args.command, report=say)
    if args.json:
        print_json({"run": args.run, "parameters": sum(parameter_counts(config.model).values())})
    else:
        print(f"done; generate text: llm-jax generate {args.run}")


def export(args: Namespace) -> None:
    """Write the model of RUN in the format of Hugging Face: config, safetensors, tokenizer files.

    transformers loads the folder and computes the same. A model that fits no family is refused, with the reason.

      llm-jax export runs/quickstart --out exported/quickstart
      llm-jax export runs/llama --out exported/llama --dtype bfloat16 --checkpoint last
    """
    from llm_jax import runtime
    from llm_jax.compat import huggingface
    from llm_jax.runs import folder as run_folder
    from llm_jax.runs import restore

    runtime.start()
    program = restore.on_the_host(run_folder.load_config(args.run))
    params, step = restore.weights(args.run, program, args.checkpoint, report=say)
    family = huggingface.export_run(args.run, params, args.out, family=args.family, dtype=args.dtype, report=say)
    if args.json:
        print_json({"out": args.out, "family": family.name, "step": step})
    else:
        print(f"a {family.name} of step {step:,} in {args.out}; transformers loads it as {family.architecture}")
