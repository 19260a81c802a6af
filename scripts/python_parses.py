"""Measure how much of the Python that a run generates parses: complete held-out functions, and count.

    .venv/bin/python scripts/python_parses.py runs/quickstart [--count 50] [--tokens 160] [--temperature 0.7]

A prompt is the first line of a function from a held-out file. The completion ends before the first line that is not
indented, as the function does; one that reaches the token limit loses its last, unfinished line. It counts if it has a
body and `ast.parse` accepts prompt and completion together.
"""

import argparse
import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

from llm_jax.data.mixture import Mixture
from llm_jax.data.shards import Shards
from llm_jax.runs.data import open_run_data
from llm_jax.runs.run import Run

SIGNATURE = re.compile(r"^def \w+\([^()\n]*\):\n", re.MULTILINE)


def prompts(shards: Shards | Mixture) -> Iterator[str]:
    """Yield every one-line signature at the left margin of the held-out documents."""
    store = shards.split("heldout")
    for start, stop in zip(store.offsets[:-1].tolist(), store.offsets[1:].tolist(), strict=True):
        yield from SIGNATURE.findall(shards.tokenizer.decode(store.read(start, stop)))


def function(prompt: str, text: str) -> str:
    """Return `prompt` and the indented lines after it."""
    whole = text.split("\n")[:-1]
    body = itertools.takewhile(lambda line: not line or line[0].isspace(), whole)
    return prompt + "\n".join(body) + "\n"


def parses(source: str) -> bool:
    try:
        return bool(ast.parse(source).body)
    except (SyntaxError, ValueError):  # a null byte is a ValueError
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--temperature", type=float, default=0.7)
    arguments = parser.parse_args()

    run = Run.open(arguments.run)
    shards = open_run_data(arguments.run, run.config, print)
    starts = list(itertools.islice(prompts(shards), arguments.count))
    texts = run.generate(starts, temperature=arguments.temperature, max_tokens=arguments.tokens)
    sources = [function(prompt, text) for prompt, text in zip(starts, texts, strict=True)]
    good = [source for source in sources if parses(source)]
    print("\n\n".join(good[:3]))
    print(f"{len(good)} of {len(sources)} completions parse")


if __name__ == "__main__":
    main()
