"""The axes of the mesh: their names, in order, and how many devices lie along each."""

import dataclasses
import math

from llm_jax.config import check_types


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis, the axis with the least communication first; one may be -1: all that are left.

    Attributes:
      pipeline: devices that hold consecutive layers, and send activations to the next.
      data: devices that hold all weights, and rows of their own.
      fsdp: devices that each hold a shard of the weights, and rows of their own.
      expert: devices that each hold some of the experts, and rows of their own.
      context: devices that each hold some tokens of every row.
      tensor: devices that each compute a shard of every matrix product.

    Raise `ValueError` for a size below 1 other than -1, and for more than one -1.
    """

    pipeline: int = 1
    data: int = -1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        check_types(self, "mesh.")
        sizes = dataclasses.astuple(self)
        if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
            raise ValueError(f"mesh sizes are positive, and at most one is -1 (what is left); got {self}")


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Return the devices along each mesh axis, in order. Raise `ValueError` if their product is not `devices`."""
    sizes = dataclasses.asdict(config)
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (-1 not in sizes.values() and devices != fixed):
        raise ValueError(
            f"mesh {sizes} takes {'a multiple of ' * (-1 in sizes.values())}{fixed} devices, but there are "
            f"{devices}; choose sizes whose product divides {devices}, and -1 for what is left"
        )
    return {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}
