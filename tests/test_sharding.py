"""Two tables shard everything: every leaf has a row, and what the tables say is what the compiler is told."""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grid import GRID, TINY, shapes, tiny
from jax.sharding import Mesh, PartitionSpec

from llm_jax.model.config import ModelConfig
from llm_jax.model.pattern import layers_at
from llm_jax.model.stack import unstack
from llm_jax.model.transformer import Transformer
from llm_jax.ops.experts import Experts
from llm_jax.sharding import (
    ACTIVATION_AXES,
    ROWS,
    MeshConfig,
    batch_sharding,
    constrain,
    letters_of,
    make_mesh,
    row_shards,
    shardings,
    spec,
)
from llm_jax.train.optimizer import OptimizerConfig, make_optimizer
from llm_jax.train.step import init_state
from llm_jax.tree import leaves

# Sizes that split over two of everything.
EVEN = tiny(vocab_size=16, n_kv_heads=2)
OPTIMIZERS = ("adamw", "lion", "adafactor", "muon")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def sizes(c: ModelConfig, path: str) -> dict[str, int]:
    """How long the axes of the parameter at `path` are, by letter."""
    size = {"D": c.d_model, "V": c.vocab_size, "C": c.n_classes or 0, "S": c.max_seq_len, "N": len(layers_at(c, path))}
    size |= {letter: getattr(c, letter) for letter in "KGHF"}
    if c.experts is not None and "/experts/" in path:
        width = c.experts.d_ff or c.F
        size |= {"E": c.experts.number, "F": c.experts.shared * width if "/shared/" in path else width}
    if path.endswith("w_convolution"):
        size |= {"W": c.attention.convolution, "G": c.G + 2}  # of queries, keys and values side by side
    if c.attention.qk_norm == "whole":
        size |= {"H": {"q_norm": c.n_heads * c.H, "k_norm": c.K * c.H}.get(path.split("/")[-2], c.H)}
    return size


@pytest.mark.parametrize("config", GRID, ids=range(len(GRID)))
def test_every_parameter_has_a_row_whose_letters_are_its_axes(config: ModelConfig):
    for path, leaf in leaves(shapes(config)).items():
        size = sizes(config, path)
        if leaf.size == 1:  # has no letters
            continue
        assert leaf.shape == tuple(size[letter] for letter in letters_of(path, leaf.shape)), path


def test_unstacked_layers_have_the_letters_without_the_first():
    flat = jax.eval_shape(lambda tree: unstack(TINY, tree), shapes(TINY))
    found = {path: letters_of(path, leaf.shape) for path, leaf in leaves(flat).items()}
    assert found["layers_0/attention/w_q"] == "DKGH"
    assert all(len(found[path]) == leaf.ndim for path, leaf in leaves(flat).items())


def state(config: ModelConfig, optimizer: str) -> Any:
    """The shapes of a train state."""
    rule = make_optimizer(OptimizerConfig(name=optimizer, warmup_steps=1))
    return jax.eval_shape(lambda key: init_state(Transformer(config), rule, key), jax.random.key(0))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_moment_lies_where_its_parameter_lies(optimizer: str, mesh: Mesh):
    tree = state(EVEN, optimizer)
    shape = {path: leaf.shape for path, leaf in leaves(tree).items()}
    found = leaves(shardings(tree, mesh))
    parameters = [path.removeprefix("params/") for path in found if path.startswith("params/")]
    for parameter in parameters:
        of_parameter = found[f"params/{parameter}"].spec
        moments = [path for path in found if path.startswith("opt_state/") and path.endswith(parameter)]
        alike = [path for path in moments if shape[path] == shape[f"params/{parameter}"]]
        assert alike, parameter
        assert all(found[path].spec == of_parameter for path in alike)
        assert all(found[path].spec == PartitionSpec() for path in set(moments) - set(alike))


@pytest.mark.smoke
def test_weights_are_split_over_fsdp_and_tensor(mesh: Mesh):
    found = {path: sharding.spec for path, sharding in leaves(shardings(shapes(EVEN), mesh)).items()}
    assert found["layers/attention/w_q"] == PartitionSpec("pipeline", "fsdp", "tensor", None, None)
    assert found["layers/feedforward/w_down"] == PartitionSpec("pipeline", "tensor", "fsdp")
    assert found["embedding/table"] == PartitionSpec("tensor", "fsdp")
    assert found["layers/attention_norm/scale"] == PartitionSpec("pipeline", "fsdp")


def test_a_leaf_without_a_row_raises(mesh: Mesh):
    with pytest.raises(ValueError, match="no row matches 'layers/attention/w_new'"):
        shardings({"layers": {"attention": {"w_new": jnp.zeros((2, 3))}}}, mesh)


def test_a_leaf_of_another_rank_than_its_row_raises(mesh: Mesh):
    with pytest.raises(ValueError, match=r"embedding/table has shape \(2, 3, 4\), but its letters are 'VD'"):
        shardings({"embedding": {"table": jnp.zeros((2, 3, 4))}}, mesh)


def test_an_axis_that_does_not_divide_is_named_with_the_next_that_does(mesh: Mesh):
    message = "V=15 does not divide over mesh axis tensor=2; change mesh.tensor or pad V to 16"
    with pytest.raises(ValueError, match=f"embedding/table: axis {message}"):
        shardings(shapes(tiny(vocab_size=15)), mesh)


def test_a_mesh_takes_what_is_left():
    shape = dict(make_mesh(MeshConfig(fsdp=2, tensor=2)).shape)
    assert shape == dataclasses.asdict(MeshConfig(data=2, fsdp=2, tensor=2))
    shape = dict(make_mesh(MeshConfig(), jax.devices()[:3]).shape)
    assert shape == dataclasses.asdict(MeshConfig(data=3))


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip of a TPU, as far as its position in a mesh needs it."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"


def chips(x: int, y: int, slices: int = 1) -> list[Chip]:
    """Slices of x by y chips, in the order of their hosts, each of which has two by two; the last slice first."""
    hosts = itertools.product(reversed(range(slices)), range(0, x, 2), range(0, y, 2))
    coords = [(slice, i + di, j + dj) for slice, i, j in hosts for dj in range(2) for di in range(2)]
    return [Chip(number, slice, (i, j, 0)) for number, (slice, i, j) in enumerate(coords)]


def steps(mesh: Mesh, axis: str) -> set[int]:
    """How many links it is from a chip to the next along an axis of the mesh."""
    coords = np.array([chip.coords for chip in mesh.devices.flat]).reshape(*mesh.devices.shape, 3)
    return set(np.abs(np.diff(coords, axis=mesh.axis_names.index(axis))).sum(-1).flat)


def test_the_first_axes_cross_slices_and_within_them_neighbours_stay_so():
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=2), chips(4, 2, slices=2))
    assert [{chip.slice_index for chip in row.flat} for row in mesh.devices[0]] == [{0}, {1}]
    assert steps(mesh, "fsdp") == steps(mesh, "tensor") == {1}
    mesh = make_mesh(MeshConfig(pipeline=2, data=4, tensor=4), chips(4, 2, slices=4))
    assert [[{chip.slice_index for chip in row.flat} for row in part] for part in mesh.devices] == [
        [{0}, {0}, {1}, {1}],
        [{2}, {2}, {3}, {3}],
    ]


def test_slices_that_do_not_divide_over_the_first_axes_are_refused():
    message = r"2 slices do not divide .* 2 of them would lie along data=3; use mesh.data=2, and change those after it"
    with pytest.raises(ValueError, match=message):
        make_mesh(MeshConfig(data=3, fsdp=8), chips(6, 2, slices=2))
    with pytest.raises(ValueError, match=r"4 slices .*: 2 of them would lie along data=3; use mesh.data=2, and"):
        make_mesh(MeshConfig(pipeline=2, data=3, fsdp=8), chips(6, 2, slices=4))


def test_a_mesh_axis_may_be_a_part_of_an_axis_of_the_topology():
    assert make_mesh(MeshConfig(data=2, fsdp=8), chips(4, 4)).shape["fsdp"] == 8


def test_rows_are_split_over_data_fsdp_and_expert_and_tokens_over_context(mesh: Mesh):
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp", "expert"), "context")
    assert row_shards(mesh) == 4
    assert row_shards(make_mesh(MeshConfig(data=1, fsdp=2, expert=4))) == 8


def test_experts_are_split_over_expert_and_all_else_is_whole_on_it():
    config = tiny(vocab_size=16, layers=("global+moe",), experts=Experts(number=4, d_ff=8, balance="bias"))
    found = leaves(shardings(shapes(config), make_mesh(MeshConfig(data=2, expert=4))))
    split = {path.split("/")[-1]: sharding.spec for path, sharding in found.items() if "expert" in sharding.spec}
    assert split == {
        "w_gate": PartitionSpec("pipeline", "expert", "fsdp", "tensor"),
        "w_up": PartitionSpec("pipeline", "expert", "fsdp", "tensor"),
        "w_down": PartitionSpec("pipeline", "expert", "tensor", "fsdp"),
        "w_router": PartitionSpec("pipeline", "fsdp", "expert"),
        "router_bias": PartitionSpec("pipeline", "expert"),
    }


def test_a_mesh_axis_splits_the_last_letter_that_asks_for_it():
    assert spec("BLD", ACTIVATION_AXES) == PartitionSpec(ROWS, ("context", "tensor"), None)
    assert spec("BLF", ACTIVATION_AXES) == PartitionSpec(ROWS, "context", "tensor")
    assert spec("BSD", ACTIVATION_AXES) == PartitionSpec(ROWS, "context", None)


def test_an_axis_that_does_not_split_evenly_stays_whole(mesh: Mesh):
    with jax.set_mesh(mesh):
        text = jax.jit(lambda x: constrain(x, "BLKH")).lower(jnp.zeros((4, 1, 3, 2))).as_text()
    assert re.findall(r"sharding_constraint .*@mesh, (\[.*?\])>", text) == [
        '[{"data", "fsdp", "expert"}, {"context"}, {}, {}]'
    ]


def test_without_a_mesh_a_constraint_is_nothing():
    x = jnp.zeros((4, 2, 2))
    assert constrain(x, "BLD") is x
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert constrain(x, "BLD") is x


def constraints(config: ModelConfig, mesh: Mesh) -> set[str]:
    """The shardings that the lowered forward pass demands of its activations."""
    tokens = jax.ShapeDtypeStruct((4, 6), jnp.int32)
    forward = jax.jit(lambda params, tokens: Transformer(config).apply({"params": params}, tokens))
    with jax.set_mesh(mesh):
        text = forward.lower(shapes(config), tokens).as_text()
    return set(re.findall(r"sdy\.sharding_constraint %\S+ <@mesh, (\[.*?\])> : tensor<", text))


def test_the_constraints_of_the_model_stand_in_the_lowered_program(mesh: Mesh):
    rows, tokens = '{"data", "fsdp", "expert"}', '{"context"}'
    assert constraints(dataclasses.replace(EVEN, n_layers=1), mesh) == {
        f'[{rows}, {{"context", "tensor"}}, {{}}]',  # BLD, the residual stream: by tokens, where nothing else is split
        f"[{rows}, {tokens}, {{}}]",  # BSD, what a sublayer reads and what it adds, before it is split
        f'[{rows}, {tokens}, {{"tensor"}}, {{}}, {{}}]',  # BLKGH, the queries
        f'[{rows}, {tokens}, {{"tensor"}}, {{}}]',  # BLKH, keys and values
        f'[{rows}, {tokens}, {{"tensor"}}]',  # BLF inside the feed-forward, BLV the logits
        '[{}, {"tensor"}, {}, {}]',  # DKGH, DKH, KGHD, DF and FD, the weights that are multiplied: gathered over fsdp
        '[{}, {"tensor"}, {}]',
        '[{"tensor"}, {}, {}, {}]',
        '[{}, {"tensor"}]',
        '[{"tensor"}, {}]',
    }
