"""`llm-jax compare`, `llm-jax verify` and `llm-jax check`: whether the numbers are right."""

import sys
from argparse import Namespace
from pathlib import Path

from llm_jax.cli.shared import config_of, print_json, say
from llm_jax.config import nearest


def compare(args: Namespace) -> None:
    """Train CONFIG in JAX and in PyTorch, from the same weights on the same batches.

    Both take the first steps of the run, in turn, and PyTorch once more compiled, where there is a C++ compiler. DIR
    gets compare.html and compare.json: the two curves and how far they diverge, speed, memory. Needs torch.

      llm-jax compare shakespeare_char data.uri=tinyshakespeare.txt
      llm-jax compare quickstart optimizer.name=adamw optimizer.learning_rate=1e-3 --steps 100
    """
    from llm_jax import runtime
    from llm_jax.compat import compare

    config, name = config_of(args), Path(args.config).stem
    folder = Path(args.out or f"compare/{name}")
    runtime.start()
    result = compare.compare(config, args.steps, say, compiled=args.compiled, command=args.command)
    if not args.json:
        print(compare.facts_as_text(result))  # before the page: a disk may have no room for that
    compare.write(result, folder, name)
    if args.json:
        print_json(result.to_json())
    else:
        print(f"read {folder}/compare.html")


def verify(args: Namespace) -> None:
    """Show that CONFIG, shrunk to test size, trains on every mesh as on one device.

    On eight simulated devices, in float32: each mesh axis alone, and every two together. Loss and the gradient of every
    parameter are compared, and twenty steps of training. This takes a quarter of an hour or more on two cores; --axes
    limits it to layouts of these axes. Raise an error (exit status 2) where a layout differs, for an unknown axis, and
    where no layout is possible. A recipe is Python, and is run: read that of a stranger first (docs/cli.md).

      llm-jax verify                                                     of quickstart
      llm-jax verify quickstart model.layers=global+moe model.experts.number=8
      llm-jax verify llama_1b --axes fsdp,tensor
    """
    from llm_jax import runtime
    from llm_jax.plan import verify as checks

    config, chosen = config_of(args), args.axes.split(",") if args.axes else checks.AXES
    for axis in chosen:
        if axis not in checks.AXES:
            raise ValueError(f"--axes {args.axes}: {axis!r} is no mesh axis; {nearest(axis, checks.AXES)}")
    wanted = [layout for layout in checks.layouts() if set(layout.axes) <= set(chosen)]
    runtime.start(checks.DEVICES)
    found = []
    print(checks.HEAD, file=sys.stderr if args.json else sys.stdout)
    for verdict in checks.verify(config, wanted):
        found.append(verdict)
        print(checks.verdict_line(verdict), file=sys.stderr if args.json else sys.stdout, flush=True)
    if args.json:
        print_json(checks.verdicts_to_json(found))
    if all(verdict.refused for verdict in found):
        raise ValueError(f"none of {len(found)} layouts is possible, for the reasons above; name other --axes")
    if different := [verdict.layout for verdict in found if verdict.equal is False]:
        raise ValueError(
            f"{', '.join(different)}: not what one device gives; find where they diverge with fewer layers or a "
            "simpler model, and please report it"
        )


def check(args: Namespace) -> None:
    """Show that this machine computes a train step of CONFIG as it should.

    On a device of every kind on this machine: the operations of a step, jitted and eager, against NumPy in double
    precision; and the step itself, shrunk to test size, jitted against eager. Versions with known faults are named. It
    takes a minute. Raise an error (exit status 2) where something is wrong.

      llm-jax check                                                      of quickstart
      llm-jax check llama_1b model.norm=layernorm
    """
    from llm_jax import runtime
    from llm_jax.plan import check as checks

    config = config_of(args)
    runtime.start()
    tell = say if args.json else print
    for about in (*checks.about(), "", checks.HEAD):
        tell(about)
    found = []
    for finding in checks.check(config):
        found.append(finding)
        tell(checks.finding_line(finding))
    if args.json:
        print_json(checks.findings_to_json(found))
    if wrong := [f"{finding.what} on {finding.device}" for finding in found if not finding.right]:
        raise ValueError(
            f"wrong here: {', '.join(wrong)}; train nothing on it until another version of jaxlib, or a workaround, "
            "computes these correctly (docs/check.md)"
        )
