"""Collectives, and code that runs on every device by itself, spoken by the letters of `sharding.py`.

Most of the program needs none of this: `jax.jit` splits it by the shardings of its inputs and by `constrain`. A mesh
axis of that kind is called auto. Inside `shard_map` an axis is manual: the code sees its own shard of every array, and
says itself what is sent. Each function below does nothing where there is no mesh, so one code path serves one device.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from llm_jax.sharding import ACTIVATION_AXES, PARAMETER_AXES, Axes, constrain, names_of, spec


def manual_axes() -> set[str]:
    """Return the mesh axes that are manual here: over which this code runs on each device by itself."""
    return set(jax.sharding.get_abstract_mesh().manual_axes)


def manual_axis_size(axis: str) -> int:
    """Return the devices along a mesh axis if it is manual here; else 1: there is one shard, the whole."""
    return jax.lax.axis_size(axis) if axis in manual_axes() else 1


def auto_axis_size(axis: str) -> int:
    """Return the devices along a mesh axis over which the compiler splits arrays; 1 if it is manual, or absent."""
    return 1 if axis in manual_axes() else jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def shard_map_by_letters(
    function: Callable[..., Any],
    letters: str,
    *arrays: Any,
    axes: Mapping[str, Axes] = ACTIVATION_AXES,
    over: Sequence[str] | None = None,
) -> Any:
    """Run `function` on each device with its shards of `arrays`, by `jax.shard_map` with specs made from letters.

    For what the compiler can't split, or splits with too much communication. `letters` names the axes of each array,
    then of the result: `"BLD DF BLF"`; a letter without a mesh axis in `axes` is whole on every device. A word with a
    star, `*VD`, is a parameter and split as such: see `all_gather`. `over` makes only these mesh axes manual and leaves
    the others to the compiler. Sums over shards are up to `function`: see `psum`. Without a mesh it is a plain call.
    """
    mesh = jax.sharding.get_abstract_mesh()
    names = set(mesh.axis_names) - manual_axes()
    if over is not None:
        names = {axis for axis in names & set(over) if mesh.shape[axis] > 1}
    if mesh.size == 1 or not names:
        return function(*arrays)

    def spec_of(word: str) -> PartitionSpec:
        entries = spec(word.removeprefix("*"), PARAMETER_AXES if word.startswith("*") else axes)
        split = (tuple(axis for axis in names_of(entry) if axis in names) for entry in entries)
        return PartitionSpec(*(some or None for some in split))

    *specs, out = map(spec_of, letters.split())
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=out, axis_names=names, check_vma=False)(*arrays)


def psum(x: Array, axis: str) -> Array:
    """Sum `x` over a manual mesh axis; elsewhere return `x`. Its gradient sends nothing."""
    return _psum(x, axis) if axis in manual_axes() else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _psum(x: Array, axis: str) -> Array:
    return jax.lax.psum(x, axis)


# Each device holds the same gradient of the sum, divided by their number: autodiff would send them around to add them.
_psum.defvjp(lambda x, axis: (_psum(x, axis), None), lambda axis, _, g: (g * manual_axis_size(axis),))


def all_gather(x: Array, letters: str) -> Array:
    """Gather a parameter of which each device inside `shard_map_by_letters` holds a shard.

    Over axes that are auto here, such as `tensor`, it stays split: each device gathers its own shard. The compiler
    would make it whole over these axes first. Its gradient is reduce-scattered: each device gets its shard of the sum.
    """
    manual = manual_axes()

    def own(x: Array) -> Array:
        for index, letter in enumerate(letters):
            axis = PARAMETER_AXES.get(letter)
            if axis in manual:
                x = jax.lax.all_gather(x, axis, axis=index, tiled=True)
        return x

    return constrain(shard_map_by_letters(own, f"*{letters} *{letters}", x), letters)


def all_gather_tokens(x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Gather the tokens of the residual stream over `tensor`, as a sublayer reads them: once for all its products.

    Backward, the gradients of those products are added before they are sent. The compiler alone would gather and send
    for some products separately. Its gradient is a `reduce_scatter_tokens`.
    """
    return constrain(constrain(x, "BLD"), "BSD")


def reduce_scatter_tokens(x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    """Sum what a sublayer adds to the stream over `tensor`, and leave each device the sum of its own tokens.

    Apply it to the product itself, before a bias: after one, the whole sum would be sent. Its gradient is an
    `all_gather_tokens`.
    """
    return constrain(constrain(x, "BSD"), "BLD")
