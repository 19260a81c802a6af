"""Two small tables shard everything: path -> letters, letter -> mesh axis.

The letters are the alphabet of `docs/shapes.md`. A parameter and its Adam moments end in the same path, so a
whole train state shards by the same rows. Activations are constrained by letters too: `constrain(x, "BLD")`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from llm_jax import tree as trees

Axes = str | tuple[str, ...] | None

# Where a parameter stands in the tree, and the letters of its axes. First match wins; no match raises.
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

# The letters of a matrix's input and of its output, for what treats it as one; what is left, N and E, counts matrices.
# First match wins; None: no matrix inside a block.
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

# Letter -> mesh axis. A letter that stands in neither table is never split.
PARAMETER_AXES: Mapping[str, Axes] = {
    "N": "pipeline",
    "D": "fsdp",
    "E": "expert",
    "V": "tensor",
    "K": "tensor",
    "F": "tensor",
}
# Between sublayers nothing of the residual stream is split over `tensor` but its tokens: norms and sums are done once,
# and not on every device (sequence parallelism, Korthikanti et al. 2022, arXiv:2205.05198).
ACTIVATION_AXES: Mapping[str, Axes] = {
    "B": ROWS,
    "L": ("context", "tensor"),
    "S": "context",
    "E": "expert",
    "V": "tensor",
    "K": "tensor",
    "F": "tensor",
}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, from the axis that sends least; one may be -1, which takes what is left.

    Attributes:
      pipeline: devices that hold consecutive layers, and pass activations on.
      data: that have all weights, and rows of their own.
      fsdp: that share the weights, and have rows of their own.
      expert: that share the experts, and have rows of their own.
      context: that share each row.
      tensor: that share each matrix product.
    """

    pipeline: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f"mesh sizes are positive, and at most one is -1 (what is left); got {self}")


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The axes of the mesh in their order, and the devices along each. Raises `ValueError` where they don't fit."""
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (-1 not in sizes.values() and devices != fixed):
        raise ValueError(
            f"mesh {sizes} takes {'a multiple of ' * (-1 in sizes.values())}{fixed} devices, but there are "
            f"{devices}; choose sizes whose product divides {devices}, and -1 for what is left"
        )
    return {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of so many devices along each axis, none of which is there."""
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all `devices` (default: every device of every process), axes as `MeshConfig` names them.

    Neighbours on the mesh are neighbours on the wire, as far as the topology allows. Of several slices of a TPU the
    first axes, which send least, lead from one to the other. Raises `ValueError` where they can't.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    # GPUs have slices too, but no coordinates in them: their order is that of their hosts.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"}) or 1
    # A mesh axis may be a part of an axis of the topology: else the eight of 4 x 4 x 4 devices could not be had.
    if slices == 1:
        laid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    else:
        across = _across_slices(sizes, slices)
        within = [size // outer for size, outer in zip(sizes.values(), across, strict=True)]
        laid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    return Mesh(laid, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _across_slices(sizes: Mapping[str, int], slices: int) -> list[int]:
    """How many slices lie along each axis: all of the first ones, and what is left along the next."""
    across, left, rest = [], slices, math.prod(sizes.values())
    for axis, size in sizes.items():
        if left % size and size % left:
            fit = [n for n in range(1, rest + 1) if rest % n == 0 and (left % n == 0 or n % left == 0)]
            raise ValueError(
                f"{slices} slices do not divide over the first axes of mesh {dict(sizes)}: {left} of them would lie "
                f"along {axis}={size}; use mesh.{axis}={min(fit, key=lambda n: abs(n - size))}, and change those behind"
            )
        across.append(min(left, size))
        left, rest = left // across[-1], rest // size
    return across


def spec(letters: str, axes: Mapping[str, Axes]) -> PartitionSpec:
    """`spec("NDF", PARAMETER_AXES)` is `PartitionSpec("pipeline", "fsdp", "tensor")`.

    A mesh axis splits one letter, the last that asks for it: `tensor` the tokens of BLD, but the width of BLF.
    """
    parts, taken = [], set()
    for letter in reversed(letters):
        free = tuple(axis for axis in _names(axes.get(letter)) if axis not in taken)
        taken.update(free)
        parts.append(free[0] if len(free) == 1 else free or None)
    return PartitionSpec(*reversed(parts))


def _names(axes: Axes) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else axes or ()


@functools.cache
def letters_of(path: str, shape: tuple[int, ...]) -> str:
    """The letters of the leaf at `path`, without the leading `N` where the layers are not stacked.

    A single number has none: step counts, and what an optimizer keeps in place of a moment that it does not need. A
    factored moment has those of its parameter without the ones it is a mean over.
    """
    letters = "" if math.prod(shape) == 1 else trees.first_match(LETTERS, path)
    pair = trees.first_match((*TABLES, *MATRICES), path) if letters else None
    for folder, gone in (("v_row", 1), ("v_col", 0)) if pair is not None else ():
        if re.search(rf"(^|/){folder}/", path):
            mean = pair[gone] if pair is not None else ""
            letters = "".join(letter for letter in letters if letter not in mean)
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
    """Rows of a batch are split over the axes `ROWS`, their tokens over `context`."""
    return NamedSharding(mesh, spec("BS", ACTIVATION_AXES))


def row_parts(mesh: Mesh | AbstractMesh) -> int:
    """Over how many devices the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def rows_here(mesh: Mesh, rows: int) -> list[int]:
    """Which of the `rows` of a batch lie on the devices of this process, ascending."""
    layout = NamedSharding(mesh, spec("B", ACTIVATION_AXES))
    slices = [index[0] for index in layout.addressable_devices_indices_map((rows,)).values() if index is not None]
    return sorted({row for part in slices for row in range(rows)[part]})


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """`x` with its axes, named by `letters`, laid out on the mesh of `jax.set_mesh`; without a mesh, `x`.

    An axis whose parts would be of different sizes, such as the one token that a decoder reads, stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    hand = by_hand()
    wanted = [tuple(axis for axis in _names(axes) if axis not in hand) for axes in spec(letters, ACTIVATION_AXES)]
    sizes = zip(x.shape, wanted, strict=True)
    even = [axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None for size, axes in sizes]
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*even)))


def all_tokens(x: jax.Array) -> jax.Array:
    """What a sublayer reads of the stream, B L D: gathered over `tensor` once, whatever number of products read it.

    Backward their gradients are added before they are sent. Left to itself, the compiler gathers and sends for some
    products apart. Its gradient is an `own_tokens`.
    """
    return constrain(constrain(x, "BLD"), "BSD")


def own_tokens(x: jax.Array) -> jax.Array:
    """What a sublayer adds to the stream, B L D: summed over `tensor`, and of the sum each device keeps its tokens.

    For the product itself, before a bias: else the whole sum is sent. Its gradient is an `all_tokens`.
    """
    return constrain(constrain(x, "BSD"), "BLD")


def on_each_device(
    function: Callable[..., Any],
    letters: str,
    *arrays: Any,
    axes: Mapping[str, Axes] = ACTIVATION_AXES,
    over: Sequence[str] | None = None,
) -> Any:
    """`function` of each device's own part of the arrays: of its rows, its heads, its share of a width.

    For what the compiler can't split by itself, or sends too much for. `letters` are those of the arrays, then those of
    the result; what no letter splits is whole on every device. `*VD` is a parameter, split as such: see `gathered`.
    Sums over parts are the function's own affair: see `summed`. With `over` these mesh axes are split so, and what the
    others split is left to the compiler.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = set(mesh.axis_names) - by_hand()
    if over is not None:
        free = {axis for axis in free & set(over) if mesh.shape[axis] > 1}
    if mesh.size == 1 or not free:
        return function(*arrays)

    def part(word: str) -> PartitionSpec:
        table = PARAMETER_AXES if word.startswith("*") else axes
        names = (_names(along) for along in spec(word.removeprefix("*"), table))
        return PartitionSpec(*(tuple(axis for axis in some if axis in free) or None for some in names))

    *specs, out = map(part, letters.split())
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=out, axis_names=free, check_vma=False)(*arrays)


def by_hand() -> set[str]:
    """The mesh axes over which the code at hand runs on each device by itself, and not the compiler for all."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual}


def parts(axis: str) -> int:
    """Over how many devices a mesh axis splits what `on_each_device` runs on each; elsewhere there is one part."""
    return jax.lax.axis_size(axis) if axis in by_hand() else 1


def summed(x: jax.Array, axis: str) -> jax.Array:
    """The sum over a mesh axis of what `on_each_device` gives as a whole; elsewhere there is one part, `x`."""
    return _summed(x, axis) if axis in by_hand() else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _summed(x: jax.Array, axis: str) -> jax.Array:
    return jax.lax.psum(x, axis)


# Each device has the same gradient of the sum, over their number: autodiff would send them around to add them up.
_summed.defvjp(lambda x, axis: (_summed(x, axis), None), lambda axis, _, g: (g * parts(axis),))


def size_of(axis: str) -> int:
    """Devices along a mesh axis over which the compiler splits arrays; 1 where there are none, or code does it."""
    return 1 if axis in by_hand() else jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def gathered(x: jax.Array, letters: str) -> jax.Array:
    """The whole of a parameter of which each device inside `on_each_device` has a part, and its gradient parted."""
    for place, letter in enumerate(letters):
        axis = PARAMETER_AXES.get(letter)
        if axis in by_hand():
            x = jax.lax.all_gather(constrain(x, letters), axis, axis=place, tiled=True)
    return constrain(x, letters)
