"""`llm-jax VERB`: wiring and error printing, no logic of its own."""

import argparse
from pathlib import Path
def main(argv=None):
    from llm_jax.config import override
    from llm_jax.train import loop, run
    p=argparse.ArgumentParser(); p.add_argument("verb"); p.add_argument("what"); p.add_argument("rest",nargs="*"); p.add_argument("--run",default="runs/x"); a=p.parse_args(argv)
    loop.keep_compiled_programs()
    if a.verb=="train": print(loop.train(override(run.load_recipe(a.what),a.rest),a.run))
    if a.verb=="resume": print(loop.resume(a.what))
if __name__ == "__main__":
    main()
