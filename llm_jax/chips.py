"""How fast a device can be at best: published peak rates, and for a CPU what a matrix product reaches here.

The functions import JAX themselves: reading the table of chips starts nothing.
"""

import dataclasses
import functools
import time

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX counts them; some chips are two devices. Rates are published peaks, per second.

    Attributes:
      flops: FLOPs of dense bfloat16 products.
      memory: bytes that the compiler lets a program use.
      memory_rate: bytes to and from memory.
      link_rate: bytes that it sends to its neighbours, over all its links at once.
      network_rate: bytes that it sends to another slice or node, over the network of the data centre.
      devices_per_chip: of a chip, which is what is rented.
      example: a topology of such devices.
    """

    flops: float
    memory: float
    memory_rate: float
    link_rate: float
    network_rate: float
    devices_per_chip: int = 1
    example: str = ""


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read in November 2026. Links are stated for both
# directions together, half of which is sending. The memory is what the compiler says when a program exceeds it (libtpu
# 0.0.42). The links of v4 and its network between slices are not published. Links: a pod of 4,096 chips sums at
# 1.1 PB/s, 269 GB/s a chip. Network: as for v5e.
# H100: NVIDIA's data sheet of the SXM5 80 GB, NVLink 900 GB/s both ways, one 400 Gb/s adapter a GPU.
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1228e9, 270e9, 25e9 / 8, example="v4:2x2x4"),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9, 25e9 / 8, example="v5e:4x4"),
    "v5p": Chip(459e12, 95.73 * GIB, 2765e9, 600e9, 50e9 / 8, example="v5p:2x2x4"),
    "v6e": Chip(918e12, 31.24 * GIB, 1638e9, 400e9, 100e9 / 8, example="v6e:4x4"),
    "tpu7x": Chip(2307e12 / 2, 94.74 * GIB, 7380e9 / 2, 600e9 / 2, 100e9 / 8 / 2, 2, example="tpu7x:2x2x4"),
    "h100": Chip(989e12, 84942979072, 3352e9, 450e9, 50e9, example="h100:1x8"),
    # For trials: as slow as a small machine. None of its numbers are published.
    "cpu": Chip(1e11, 4 * GIB, 2e10, 1e9, 1e9, example="cpu:8"),
}

# Dense bfloat16 FLOP/s of one JAX device, from the data sheets; matched by the start of `device_kind`.
PEAK_FLOPS = {
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5e": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": CHIPS["h100"].flops,
    "NVIDIA H200": CHIPS["h100"].flops,
}


def peak_flops() -> float | None:
    """Return the peak FLOP/s of all devices together; None for an accelerator that is not in the table."""
    import jax

    device, devices = jax.devices()[0], jax.devices()
    if device.platform == "cpu":
        return measured_matmul_flops()  # all simulated CPU devices share the same cores
    for kind, flops in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return flops * len(devices)
    return None


@functools.cache
def measured_matmul_flops(size: int = 1024, rounds: int = 5) -> float:
    """Return the FLOP/s of the best of `rounds` float32 products of `size`-square matrices on one device."""
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)
    x = jnp.ones((size, size), jnp.float32)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
