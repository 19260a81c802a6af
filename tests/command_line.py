"""A folder as a user has it who has trained one small run: a text, a recipe of one layer, and the run."""

import random
from pathlib import Path

from llm_jax.cli.main import main

WORDS = ["a", "little", "model", "reads", "the", "words", "of", "a", "short", "text", "and", "writes", "some"]
RECIPE = '''"""A model of one layer.

    llm-jax train {path}
"""

from llm_jax.data.loader import DataConfig
from llm_jax.model.config import ModelConfig
from llm_jax.train.optimizer import OptimizerConfig
from llm_jax.train.config import RunConfig

config = RunConfig(
    model=ModelConfig(vocab_size=264, d_model=16, n_layers=1, n_heads=2, max_seq_len=32, d_ff=16),
    data=DataConfig(uri="{text}", tokenizer="byte", separator="\\n", heldout=0.2, seq_len=32, batch_size=8),
    optimizer=OptimizerConfig(warmup_steps=1),
    steps=4,
    evaluate_every=2,
    checkpoint_every=2,
    prompts=("a little",),
)
'''


def fill(folder: Path) -> None:
    """Write the text and the recipe, and train the run `runs/tiny`; the working directory is `folder`."""
    draw = random.Random(0)
    lines = (" ".join(draw.choices(WORDS, k=draw.randrange(3, 20))) for _ in range(200))
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    (folder / "tiny.py").write_text(RECIPE.format(path="tiny.py", text=folder / "text.txt"))
    assert main(["train", "tiny.py"]) == 0
