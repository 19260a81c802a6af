"""`llm-jax configs`, `llm-jax show` and `llm-jax plan`: what is known of a config before it runs."""

import dataclasses
import math
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from llm_jax.cli.shared import config_of, config_or_run_of, print_json, say, wide_console
from llm_jax.recipes import recipe_docstring, recipes

if TYPE_CHECKING:
    from llm_jax.plan.memory import Memory
    from llm_jax.train.config import RunConfig


def configs(args: Namespace) -> None:
    """List the recipes, a line each, or show one with all its keys.

    quickstart is trained by its name alone; the others by the command at the top of their file, with its result. NAME
    shows every key as key=value, with its meaning, and its default where that differs. A recipe is Python, and is run
    whenever it is loaded: read that of a stranger first.

      llm-jax configs
      llm-jax configs quickstart
    """
    if args.name is not None:
        _print_recipe(args)
        return
    found = {name: recipe_docstring(path).partition("\n")[0] for name, path in recipes().items()}
    if args.json:
        print_json(found)
        return
    for name, line in found.items():
        print(f"{name:18} {line}")


def _print_recipe(args: Namespace) -> None:
    config = config_of(Namespace(config=args.name, assignments=[]))
    if not args.json:
        print(recipe_docstring(recipes().get(args.name, Path(args.name))).rstrip() + "\n")
    _print_keys(config, json=args.json)


def _print_keys(config: "RunConfig", *, json: bool) -> None:
    from llm_jax.plan import describe as pages

    if json:
        print_json(pages.keys_as_json(config))
    else:
        wide_console().print(pages.keys_table(config))


def show(args: Namespace) -> None:
    """Show the shape of every activation of a config, its parameters, FLOPs and memory.

    Nothing is computed or allocated: it takes a moment for a model of any size. Memory comes last, as it needs JAX.
    A recipe is Python, and is run: read that of a stranger first (docs/cli.md).

      llm-jax show shapes                                    look at this one first
      llm-jax show llama_1b data.batch_size=64 accumulate=8
      llm-jax show quickstart --config                       every key: value, default, meaning
    """
    from llm_jax.plan import describe as pages

    config = config_or_run_of(args)
    if args.keys:
        _print_keys(config, json=args.json)
        return
    description, console = pages.describe(config), wide_console()
    if args.json:
        print_json(dataclasses.asdict(description) | {"memory": dataclasses.asdict(_memory(config))})
    else:
        console.print(description)
        console.print(_memory(config))  # after all that needs no JAX


def _memory(config: "RunConfig") -> "Memory":
    from llm_jax import runtime
    from llm_jax.plan.memory import memory

    runtime.start()
    return memory(config)


def plan(args: Namespace) -> None:
    """Compile a train step for accelerators that are not here, and predict memory, communication and time.

    It says whether the step fits, where the memory goes, what is sent along which axis of the mesh, FLOPs, the time of
    a step at published peak rates, and with --price the cost. --search tries changes, a compile each. Raise an error
    (exit status 2) for a negative price, and for --compiles without --search. A recipe is Python, and is run: read that
    of a stranger first (docs/cli.md).

      llm-jax plan llama2_7b --topology v5e:4x4
      llm-jax plan llama2_7b --topology v5p:2x2x1 data.batch_size=8 --price 4.2
      llm-jax plan llama2_7b --topology v5e:4x4 data.batch_size=256 --search --compiles 6
    """
    if args.compiles is not None and (not args.search or args.compiles < 1):
        raise ValueError(f"--compiles {args.compiles} limits those of --search; add --search, and at least 1")
    if args.price is not None and not 0 <= args.price < math.inf:
        raise ValueError(f"--price {args.price} must be 0 or more, for one chip and hour; try --price 1.2")
    _plan(args, config_or_run_of(args))


def _plan(args: Namespace, config: "RunConfig") -> None:
    from llm_jax import runtime
    from llm_jax.plan import plan as plans
    from llm_jax.plan import search
    from llm_jax.plan.topology import parse_topology

    topology, console = parse_topology(args.topology, args.slices), wide_console()
    runtime.start(topology=topology)
    searched = search.search(config, topology, args.compiles or 6, args.price, report=say) if args.search else None
    found = plans.plan(config, topology, args.price) if searched is None else searched.tried[0].plan
    if args.json:
        planned = {} if found is None else found.to_json()
        print_json(planned | ({} if searched is None else searched.to_json()))
        return
    if found is not None:
        console.print(found)
    if searched is not None:
        console.print(searched)
