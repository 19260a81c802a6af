"""The block is the program it was before it was written as `x + attention(norm(x))`: parameters, taps and gradient.

`golden/block.json` holds a hash of the jaxpr of the gradient, for each version of JAX it was recorded with, and one of
the paths of all parameters and taps. After a change that was meant, run `python tests/test_block.py` with each of these
versions.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as the tests run
    import conftest  # noqa: F401

import jax
import pytest
from grid import shapes, tiny, tokens

from llm_jax.model.config import AttentionConfig, ModelConfig
from llm_jax.model.taps import capture
from llm_jax.model.transformer import Transformer
from llm_jax.ops.experts import Experts
from llm_jax.ops.loss import cross_entropy
from llm_jax.tree import leaves

GOLDEN = Path(__file__).parent / "golden" / "block.json"
TREES = "parameters and taps"
TOKENS = tokens(2, 8)
RESIDUALS = ("pre", "post", "sandwich", "output", "parallel")
PATTERNS: dict[str, dict[str, Any]] = {
    "global": {},
    "local+moe,delta": {
        "n_layers": 3,
        "layers": ("local+moe", "delta"),
        "attention": AttentionConfig(window=3, dropout=0.1),
        "experts": Experts(number=4, d_ff=8, shared=1),
    },
}
CASES = {f"{residual} {pattern}": (residual, pattern) for residual in RESIDUALS for pattern in PATTERNS}
MARKED = [case if case.endswith("global") else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


def config_of(case: str) -> ModelConfig:
    residual, pattern = CASES[case]
    return tiny(residual=residual, residual_scale=0.5, dropout=0.1, **PATTERNS[pattern])


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def program(config: ModelConfig) -> str:
    """The jaxpr of the gradient in training, without addresses."""

    def loss(params: Any) -> jax.Array:
        rngs = {"dropout": jax.random.key(0)}
        out = Transformer(config).apply({"params": params}, TOKENS, segments=TOKENS, train=True, rngs=rngs)
        return cross_entropy(out.logits, TOKENS)[0].mean()

    return re.sub("0x[0-9a-f]+", "", str(jax.make_jaxpr(jax.grad(loss))(shapes(config))))


def trees(config: ModelConfig) -> str:
    """Path and shape of every parameter and every tap."""
    taps = jax.eval_shape(lambda params: capture(Transformer(config), params, TOKENS), shapes(config))
    return "\n".join(f"{path} {leaf.shape}" for tree in (shapes(config), taps) for path, leaf in leaves(tree).items())


@pytest.mark.parametrize("case", MARKED)
def test_the_gradient_is_textually_the_jaxpr_that_it_was(case: str):
    golden = json.loads(GOLDEN.read_text())
    if jax.__version__ not in golden:
        pytest.skip(f"the text of a jaxpr changes between versions of JAX, and none is recorded for {jax.__version__}")
    assert digest(program(config_of(case))) == golden[jax.__version__][case]


@pytest.mark.parametrize("case", MARKED)
def test_parameters_and_taps_have_the_paths_and_shapes_that_they_had(case: str):
    assert digest(trees(config_of(case))) == json.loads(GOLDEN.read_text())[TREES][case]


if __name__ == "__main__":
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    golden[TREES] = {case: digest(trees(config_of(case))) for case in CASES}
    golden[jax.__version__] = {case: digest(program(config_of(case))) for case in CASES}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
