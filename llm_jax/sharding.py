"""Two small tables shard everything: path -> letters, letter -> mesh axis.

The letters are the alphabet of `docs/shapes.md`. A parameter and its Adam moments end in the same path, so the
same rows shard a whole train state. Activations are sharded by letters too: `constrain(x, "BLD")`. What needs a
collective of its own is in `ops/collectives.py`.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax import tree as trees
from llm_jax.axes import MeshConfig, mesh_sizes
from llm_jax.paths import first_match

Axes = str | tuple[str, ...] | None

WHOLE = "_"  # the letter of an axis that no table knows, and no mesh axis splits

# The path of a parameter -> the letters of its axes. First match wins; no match raises.
LETTERS: tuple[tuple[str, str], ...] = (
    (r"/ns_coeffs$", ""),  # Muon's three numbers
    (r"layers\S*/(attention|feedforward)(_out)?_norm/(scale|bias)$", "ND"),
    (r"layers\S*/attention/\w_norm/(scale|bias)$", "NH"),  # of a head, or of all heads in one row
    (r"layers\S*/attention/w_q$", "NDKGH"),
    (r"layers\S*/attention/w_[kv]$", "NDKH"),
    (r"layers\S*/attention/w_o$", "NKGHD"),
    (r"layers\S*/attention/b_q$", "NKGH"),
    (r"layers\S*/attention/b_[kv]$", "NKH"),
    (r"layers\S*/attention/w_gate$", "NDKGH"),
    (r"layers\S*/attention/b_gate$", "NKGH"),
    (r"layers\S*/attention/w_(beta|decay)$", "NDK"),
    (r"layers\S*/attention/(log_rate|b_decay)$", "NK"),
    (r"layers\S*/attention/w_convolution$", "NWKGH"),
    (r"layers\S*/attention/z_scale$", "NH"),
    (r"layers\S*/experts/w_(up|gate)$", "NEDF"),
    (r"layers\S*/experts/w_down$", "NEFD"),
    (r"layers\S*/experts/w_router$", "NDE"),
    (r"layers\S*/experts/router_bias$", "NE"),
    (r"layers\S*/(feedforward|shared)/w_(up|gate)$", "NDF"),
    (r"layers\S*/(feedforward|shared)/w_down$", "NFD"),
    (r"layers\S*/(feedforward|shared)/b_(up|gate)$", "NF"),
    (r"layers\S*/\w+/b_(o|down)$", "ND"),
    (r"embedding/table$", "VD"),
    (r"positions/table$", "SD"),
    (r"final_norm/(scale|bias)$", "D"),
    (r"unembedding/table$", "VD"),
    (r"classes/table$", "CD"),
)

# The path of a parameter -> the letters of its input and of its output, for code that treats it as one matrix; the
# letters left over, N and E, count matrices. First match wins; None: not a matrix inside a block.
MATRICES: tuple[tuple[str, tuple[str, str] | None], ...] = (
    (r"layers\S*/attention/w_(q|gate)$", ("D", "KGH")),
    (r"layers\S*/attention/w_[kv]$", ("D", "KH")),
    (r"layers\S*/attention/w_o$", ("KGH", "D")),
    (r"layers\S*/(feedforward|shared|experts)/w_(up|gate)$", ("D", "F")),
    (r"layers\S*/(feedforward|shared|experts)/w_down$", ("F", "D")),
    (r".", None),
)
TABLES: tuple[tuple[str, tuple[str, str]], ...] = (
    (r"embedding/table$", ("V", "D")),
    (r"positions/table$", ("S", "D")),
)

# The mesh axes that split the rows of a batch, and its tokens.
ROWS = ("data", "fsdp", "expert")
TOKENS = (*ROWS, "context")

# Letter -> mesh axis. A letter in neither table is never split.
PARAMETER_AXES: Mapping[str, Axes] = {
    "N": "pipeline",
    "D": "fsdp",
    "E": "expert",
    "V": "tensor",
    "K": "tensor",
    "F": "tensor",
}
# Between sublayers `tensor` splits the tokens of the residual stream, so that norms and sums are computed once, and not
# on every device (sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198).
ACTIVATION_AXES: Mapping[str, Axes] = {
    "B": ROWS,
    "L": ("context", "tensor"),
    "S": "context",
    "E": "expert",
    "V": "tensor",
    "K": "tensor",
    "F": "tensor",
}


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """Return a mesh of these sizes without devices, for programs that are only compiled."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return a mesh over `devices` (default: every device of every process), with the axes of `MeshConfig`.

    Neighbours on the mesh are neighbours in the network, as far as the topology allows. With several TPU slices the
    first axes, which communicate least, cross from slice to slice. Raise `ValueError` for sizes that don't fit the
    devices or the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    # GPUs have slices too, but no coordinates in them: they are ordered by host.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    # A mesh axis may cover part of a physical axis: without that, no mesh axis of 4 x 4 x 4 devices could have size 8.
    if slices == 1:
        array = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    else:
        across = _across_slices(sizes, slices)
        within = [size // outer for size, outer in zip(sizes.values(), across, strict=True)]
        array = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(array, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _across_slices(sizes: Mapping[str, int], slices: int) -> list[int]:
    """Return how many slices each axis crosses: all slices by the first axes, what is left by the next.

    Raise `ValueError` if an axis would cross a fraction of the slices.
    """
    across, left, rest = [], slices, math.prod(sizes.values())
    for axis, size in sizes.items():
        if left % size and size % left:
            fit = [n for n in range(1, rest + 1) if rest % n == 0 and (left % n == 0 or n % left == 0)]
            nearest = min(fit, key=lambda n: abs(n - size))
            raise ValueError(
                f"{slices} slices do not divide over the first axes of mesh {dict(sizes)}: {left} of them would lie "
                f"along {axis}={size}; use mesh.{axis}={nearest}, and change those after it"
            )
        across.append(min(left, size))
        left, rest = left // across[-1], rest // size
    return across


def spec(letters: str, axes: Mapping[str, Axes]) -> PartitionSpec:
    """Return the spec of `letters`: `spec("NDF", PARAMETER_AXES)` is `PartitionSpec("pipeline", "fsdp", "tensor")`.

    A mesh axis splits one letter, the last that asks for it: `tensor` splits the tokens of BLD, but the width of BLF.
    """
    entries, taken = [], set[str]()
    for letter in reversed(letters):
        free = tuple(axis for axis in names_of(axes.get(letter)) if axis not in taken)
        taken.update(free)
        entries.append(free[0] if len(free) == 1 else free or None)
    return PartitionSpec(*reversed(entries))


def names_of(axes: Axes) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a table or a spec, as a tuple."""
    return (axes,) if isinstance(axes, str) else axes or ()


def own_letters(path: str, shape: tuple[int, ...]) -> str | None:
    """Return the letters of a parameter in a layer of the user's own, whole on every device; None for any other."""
    inside = re.search(r"layers(\S*)/mixer/", path)
    if inside is None:
        return None
    stacked = not inside[1].startswith("_") and len(shape) > 0  # layers_4 is one layer, and a step count is of none
    return "N" * stacked + WHOLE * (len(shape) - stacked)


@functools.cache
def letters_of(path: str, shape: tuple[int, ...]) -> str:
    """Return the letters of the leaf at `path`, without the leading `N` if its layers are not stacked.

    A single number has no letters: step counts, and what an optimizer keeps where it needs no moment. A factored moment
    has the letters of its parameter without those it is averaged over. Raise `ValueError` if no row of `LETTERS`
    matches.
    """
    if (own := own_letters(path, shape)) is not None:
        return own
    letters = "" if math.prod(shape) == 1 else first_match(LETTERS, path)
    matrix = first_match((*TABLES, *MATRICES), path) if letters else None
    if matrix is not None:
        inputs, outputs = matrix
        for folder, averaged in (("v_row", outputs), ("v_col", inputs)):
            if re.search(rf"(^|/){folder}/", path):
                letters = "".join(letter for letter in letters if letter not in averaged)
    return letters[1:] if letters.startswith("N") and len(letters) == len(shape) + 1 else letters


def shardings(tree: Any, mesh: Mesh | AbstractMesh, unknown: Literal["raise", "whole"] = "raise") -> Any:
    """Return a `NamedSharding` for every leaf of `tree` (arrays or shapes): parameters, or a train state of them.

    Raise `ValueError` for a leaf that no row of `LETTERS` matches, or whose axis does not divide evenly. With `unknown`
    of `whole`, for the state of an optimizer that these tables don't know, such a leaf is whole on every device.
    """

    def one(path: str, leaf: Any) -> NamedSharding:
        try:
            return _leaf_sharding(path, leaf.shape, mesh)
        except ValueError:
            if unknown == "raise":
                raise
            return NamedSharding(mesh, PartitionSpec())

    return trees.map_with_path(one, tree)


def _leaf_sharding(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> NamedSharding:
    letters = letters_of(path, shape)
    if letters and len(letters) != len(shape):
        raise ValueError(f"{path} has shape {shape}, but its letters are {letters!r}")
    partition = spec(letters, PARAMETER_AXES)
    for letter, axis, size in zip(letters, partition, shape, strict=False):
        if axis is not None and size % mesh.shape[axis]:
            raise ValueError(
                f"{path}: axis {letter}={size} does not divide over mesh axis {axis}={mesh.shape[axis]}; "
                f"change mesh.{axis} or pad {letter} to {-(-size // mesh.shape[axis]) * mesh.shape[axis]}"
            )
    return NamedSharding(mesh, partition)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch [B L]: rows over the axes `ROWS`, their tokens over `context`."""
    return NamedSharding(mesh, spec("BS", ACTIVATION_AXES))


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Return over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def rows_here(mesh: Mesh, rows: int) -> list[int]:
    """Return which of the `rows` of a batch are on the devices of this process, ascending."""
    sharding = NamedSharding(mesh, spec("B", ACTIVATION_AXES))
    slices = [index[0] for index in sharding.addressable_devices_indices_map((rows,)).values() if index is not None]
    return sorted({row for shard in slices for row in range(rows)[shard]})


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Shard `x`, whose axes are named by `letters`, over the mesh of `jax.set_mesh`; without a mesh, return `x`.

    An axis that does not split evenly, such as the one token that a decoder reads, stays whole. Manual axes, those of a
    `shard_map` around this code, are left alone: there `x` is a shard already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    wanted = [
        tuple(axis for axis in names_of(axes) if axis not in mesh.manual_axes)
        for axes in spec(letters, ACTIVATION_AXES)
    ]
    sizes = zip(x.shape, wanted, strict=True)
    even = [axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None for size, axes in sizes]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*even)))
