"""A leaf's path is its name: as a dict's key, in a table of rows, and in a fingerprint."""

import jax
import jax.numpy as jnp
from flax import struct

from llm_jax.tree import count, fingerprint, leaves, map_with_path


@struct.dataclass
class State:
    step: jax.Array
    params: dict


def state(scale: float = 1.0) -> State:
    w = scale * jnp.arange(6.0).reshape(2, 3)
    return State(step=jnp.array(3, jnp.int32), params={"layers": {"w_q": w}, "head": (w[0], None, w[1])})


def test_a_path_runs_through_structs_dicts_and_tuples():
    assert list(leaves(state())) == ["step", "params/head/0", "params/head/2", "params/layers/w_q"]


def test_leaves_come_in_the_order_of_jax():
    paired = zip(leaves(state()).values(), jax.tree.leaves(state()), strict=True)
    assert all((mine == jax_leaf).all() for mine, jax_leaf in paired)


def test_mapping_with_paths_keeps_the_structure():
    paths = map_with_path(lambda path, leaf: f"{path}:{leaf.ndim}", state())
    assert jax.tree.structure(paths) == jax.tree.structure(state())
    assert paths.params["layers"]["w_q"] == "params/layers/w_q:2"


def test_counting_needs_shapes_only():
    shapes = jax.eval_shape(state)
    assert count(shapes) == count(state()) == 1 + 6 + 3 + 3


def test_equal_trees_have_equal_fingerprints_and_any_difference_shows():
    base = {"w": jnp.zeros((2, 3)), "step": jnp.array(1)}
    others = [
        base | {"w": jnp.zeros((2, 3)).at[1, 2].set(1e-38)},
        base | {"w": -jnp.zeros((2, 3))},
        base | {"w": jnp.zeros((3, 2))},
        base | {"w": jnp.zeros((2, 3), jnp.int32)},
        base | {"step": jnp.array(2)},
        {"v": base["w"], "step": base["step"]},
        base | {"more": jnp.zeros(0)},
    ]
    assert fingerprint(base) == fingerprint(jax.tree.map(jnp.copy, base))
    assert len({fingerprint(tree) for tree in [base, *others]}) == len(others) + 1


def test_a_fingerprint_reads_bfloat16():
    assert fingerprint(jnp.ones(3, jnp.bfloat16)) != fingerprint(jnp.zeros(3, jnp.bfloat16))
