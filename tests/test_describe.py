"""What is shown of a config is what the config becomes."""

import dataclasses
import functools
import io
import json
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import pytest
from grid import GRID, shapes
from rich.console import Console

from llm_jax.config import override
from llm_jax.data.loader import DataConfig
from llm_jax.model.config import TAPS, ModelConfig
from llm_jax.model.taps import capture
from llm_jax.model.transformer import Transformer
from llm_jax.plan import describe
from llm_jax.runs.start import load_recipe
from llm_jax.train.config import RunConfig
from llm_jax.train.step import cast

SMALL = RunConfig(
    model=ModelConfig(vocab_size=40, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=6, max_seq_len=64),
    data=DataConfig(seq_len=64, batch_size=4),
)
LLAMA_70B = RunConfig(
    model=ModelConfig(
        vocab_size=128256,
        d_model=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        d_ff=28672,
        max_seq_len=8192,
        dtype="bfloat16",
        tied=False,
        remat="full",
    ),
    data=DataConfig(seq_len=8192, batch_size=64),
    accumulate=8,
)


def printed(description: describe.Description, width: int = 120) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(description)
    return out.getvalue()


def numbers(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    "changes",
    [
        [],
        ["model.gated=false", "model.positions=learned", "model.residual=post", "model.tied=false"],
        ["model.n_kv_heads=none", "model.dtype=bfloat16", "data.batch_size=6", "accumulate=3"],
    ],
    ids=["as is", "other options", "microbatches"],
)
def test_the_letters_of_every_activation_are_the_numbers_beside_them(changes: list[str]):
    d = describe.describe(override(SMALL, changes))
    assert [a.name for a in d.activations] == ["tokens", *(name for name in TAPS if name != "router")]
    for a in d.activations:
        assert a.shape == tuple(d.sizes[letter] for letter in a.letters.split()), a.name


def test_the_shapes_shown_are_those_of_the_arrays():
    model = Transformer(SMALL.model)
    tokens = jnp.zeros((4, 64), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    arrays = jax.jit(lambda params, tokens: capture(model, params, tokens))(params, tokens)
    shown = {a.name: a for a in describe.describe(SMALL).activations}
    for name, x in arrays.items():
        layers = (len(shown[name].layers),) if shown[name].kind else ()
        assert (*layers, *shown[name].shape) == x.shape
        assert shown[name].dtype == x.dtype.name


MIXED = override(
    SMALL,
    [
        "model.n_layers=5",
        "model.layers=delta+moe,local",
        "model.attention.window=8",
        "model.experts.number=4",
        "model.experts.d_ff=48",
        "model.experts.shared=1",
    ],
)


def test_layers_of_each_kind_are_walked_through_once_with_what_they_have():
    d = describe.describe(MIXED)
    for a in d.activations:
        assert a.shape == tuple(d.sizes[letter] for letter in a.letters.split()), a.name
        assert a.layers == {"": (), "delta+moe": (0, 2, 4), "local": (1, 3)}[a.kind]
    kinds = {kind: {a.name for a in d.activations if a.kind == kind} for kind in ("delta+moe", "local")}
    assert kinds["delta+moe"] - kinds["local"] == {"router"}
    assert kinds["local"] - kinds["delta+moe"] == {"attn_scores", "pattern", "mlp_pre", "mlp_post"}
    text = printed(d)
    assert "layers 0, 2, 4, each: delta+moe" in text
    assert "layers 1, 3, each: local" in text
    assert "softmax over the last 8 keys" in text


def test_a_token_meets_the_experts_it_is_sent_to_and_no_other():
    d = describe.describe(MIXED)
    idle = 3 * 2 * 3 * 32 * 48  # layers, experts left out, matrices
    assert sum(d.parameters.values()) - d.active_parameters == idle
    assert f"a token uses {d.active_parameters:,}" in printed(d)
    assert "a token uses" not in printed(describe.describe(SMALL))


@pytest.mark.parametrize(
    ("numbers", "said"),
    [((0, 1, 2), "0..2"), ((0, 2, 3), "0, 2..3"), ((5,), "5"), (range(0, 20, 2), "0, 2, 4, ... 18")],
)
def test_runs_of_numbers_are_put_short(numbers: Sequence[int], said: str):
    assert describe.spans(numbers) == said


def test_a_model_of_70_billion_parameters_is_described_without_making_it():
    d = describe.describe(LLAMA_70B)
    assert sum(d.parameters.values()) == 70_553_706_496
    assert {a.name: a.shape for a in d.activations}["q"] == (8, 8192, 8, 8, 128)
    text = printed(d)
    assert "layers 0..79, each" in text
    assert text.count("resid_mid") == 1


def test_the_walk_through_the_smallest_recipe_meets_every_layer():
    text = printed(describe.describe(load_recipe("shapes")))
    assert text.count("resid_pre") == text.count("\nlayer ") == 2
    lines = [line.split() for line in text.splitlines()]
    for name, letters, sizes in (("embed", "B L D", "1 16 32"), ("logits", "B L V", "1 16 24")):
        assert [*name.split(), *letters.split(), *sizes.split()] in [line[:7] for line in lines]


@pytest.mark.parametrize("config", [GRID[1], GRID[2], MIXED.model], ids=range(3))
def test_activations_by_arithmetic_are_those_that_are_traced(config: ModelConfig):
    tokens = jax.ShapeDtypeStruct((3, 8), jnp.int32)
    params = jax.eval_shape(functools.partial(cast, dtype=config.dtype), shapes(config))
    traced = jax.eval_shape(functools.partial(capture, Transformer(config)), params, tokens) | {"tokens": tokens}
    for a in describe.activations(config, {"B": 3, "L": 8, "S": 8} | describe.sizes_of(config)):
        inside = int(bool(a.kind))
        assert (a.shape, a.dtype) == (traced[a.name].shape[inside:], traced[a.name].dtype.name), a


def test_a_description_is_plain_data():
    d = dataclasses.asdict(describe.describe(SMALL))
    assert json.loads(json.dumps(d))["parameters"] == d["parameters"]


@pytest.mark.parametrize(
    ("n", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_999, "1 MB"), (70_553_706_496, "70.6 GB"), (2.36e17, "236 PB")],
)
def test_amounts_have_three_digits_and_a_prefix(n: float, said: str):
    assert describe.metric(n, "B") == said
