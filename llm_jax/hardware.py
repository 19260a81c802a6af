"""How fast a device could be at best: published peak rates, and for a CPU what a matrix product reaches here."""

import functools
import time

import jax
import jax.numpy as jnp

from llm_jax.topologies import CHIPS

# bfloat16 FLOP/s of one JAX device, dense, from the makers' data sheets; matched by the start of `device_kind`.
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
    """Peak FLOP/s of all devices together; None for an accelerator that the table does not know."""
    device, devices = jax.devices()[0], jax.devices()
    if device.platform == "cpu":
        return measured_matmul_flops()  # all simulated CPU devices share the same cores
    for kind, flops in PEAK_FLOPS.items():
        if device.device_kind.startswith(kind):
            return flops * len(devices)
    return None


@functools.cache
def measured_matmul_flops(size: int = 1024, rounds: int = 5) -> float:
    """FLOP/s of the best of some float32 `size`-cubed products on one device."""
    product = jax.jit(jnp.matmul)
    x = jnp.ones((size, size), jnp.float32)
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
