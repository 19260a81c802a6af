"""`python -m llm_jax VERB` is `llm-jax VERB`."""

import sys

from llm_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
