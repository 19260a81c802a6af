"""Accelerators that programs can be compiled for, here or not: how fast they are, and how JAX is told of them.

    topology = parse("v5e:4x4")
    topology.prepare()            # before anything imports JAX
    devices = topology.devices()

Nothing here imports JAX before `devices`: the plugin of an accelerator reads the environment when JAX starts.
"""

import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llm_jax import runtime

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX counts them, of which some chips are two. Rates are published peaks, a second.

    Attributes:
      flops: dense products of bfloat16.
      memory: bytes that the compiler lets a program have.
      memory_rate: bytes to and from memory.
      wire: bytes that it sends to its neighbours, over all its links at once.
      between: bytes that it sends to another slice or node, by the network of the data centre.
      a_chip: how many make a chip, which is what is rented.
      example: a topology of such devices.
    """

    flops: float
    memory: float
    memory_rate: float
    wire: float
    between: float
    a_chip: int = 1
    example: str = ""


# TPU: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read in November 2026. Links are stated both ways
# together, half of which is sent. The memory is what the compiler says when a program exceeds it (libtpu 0.0.42).
# v4's links and its network between slices are not published. Links: a pod of 4,096 chips sums at 1.1 PB/s, 269 GB/s
# a chip. The network: v5e's.
# H100: NVIDIA's data sheet of the SXM5 80 GB, NVLink 900 GB/s both ways, one 400 Gb/s adapter a GPU.
CHIPS = {
    "v4": Chip(275e12, 30.75 * GIB, 1228e9, 270e9, 25e9 / 8, example="v4:2x2x4"),
    "v5e": Chip(197e12, 15.75 * GIB, 819e9, 200e9, 25e9 / 8, example="v5e:4x4"),
    "v5p": Chip(459e12, 95.73 * GIB, 2765e9, 600e9, 50e9 / 8, example="v5p:2x2x4"),
    "v6e": Chip(918e12, 31.24 * GIB, 1638e9, 400e9, 100e9 / 8, example="v6e:4x4"),
    "tpu7x": Chip(2307e12 / 2, 94.74 * GIB, 7380e9 / 2, 600e9 / 2, 100e9 / 8 / 2, a_chip=2, example="tpu7x:2x2x4"),
    "h100": Chip(989e12, 84942979072, 3352e9, 450e9, 50e9, example="h100:1x8"),
    # For trying things out: as slow as a small machine. Nothing about it is published.
    "cpu": Chip(1e11, 4 * GIB, 2e10, 1e9, 1e9, example="cpu:8"),
}
# What stands in the environment before JAX starts. The last four tell the TPU plugin that there is nothing to find.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
    "TPU_STDERR_LOG_LEVEL": "3",
}
H100 = Path(__file__).parent / "h100.txtpb"  # of the hardware, what its compiler asks for
MOST_DEVICES = 100_000
SIZES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3, "h100": 2, "cpu": 1}  # how many numbers say its shape


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of a kind, in one or several slices: TPUs in a mesh or torus, GPUs as nodes x GPUs a node."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    @property
    def n_devices(self) -> int:
        return self.slices * math.prod(self.shape) * self.chip.a_chip

    @property
    def n_chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def island(self) -> int:
        """Devices that reach each other by the fast links."""
        return self.shape[-1] if self.kind == "h100" else self.n_devices // self.slices

    def __str__(self) -> str:
        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices} slices of {name}"

    def prepare(self) -> None:
        """Set the environment that JAX starts in. What the user has set stays, but for the number of CPU devices."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if self.kind == "cpu":
            runtime.simulate(self.n_devices)

    def devices(self) -> Sequence[Any]:
        """Its devices, to compile for. Raises `ValueError` where they can't be had, with what to install or change."""
        import jax

        if self.kind == "cpu":
            devices = jax.devices("cpu")
            if len(devices) < self.n_devices:
                raise ValueError(
                    f"{self} takes {self.n_devices} devices, but JAX has started with {len(devices)}; "
                    f"set JAX_NUM_CPU_DEVICES={self.n_devices} before"
                )
            return devices[: self.n_devices]
        _check_installed(self.kind, jax.__version__)
        try:
            return self._described()
        except RuntimeError as reason:  # of the plugin, whose words are its own
            said = re.sub(r"^[A-Z_]+: ", "", str(reason).partition("\n")[0])[:200]
            raise ValueError(
                f"the compiler knows no {self}: {said}; {self.chip.example} is one that there is"
            ) from reason

    def _described(self) -> Sequence[Any]:
        from jax.experimental import topologies

        shape = "x".join(map(str, self.shape))
        if self.kind == "h100":
            options = {"topology": f"{self.slices}x{shape}", "target_config": H100.read_text()}
            return topologies.get_topology_desc("", platform="cuda", **options).devices
        options: dict[str, Any] = {} if self.slices == 1 else {"num_slices": self.slices}
        if self.kind == "v4":
            options["chip_config_name"] = "megacore"  # both cores of a chip as one device
        if min(self.shape[:2]) < 2:  # a host has 2 x 2 chips unless it is said that it has fewer
            options["chips_per_host_bounds"] = [*(min(2, size) for size in self.shape[:2]), 1]
        return topologies.get_topology_desc(f"{self.kind}:{shape}", platform="tpu", **options).devices


def parse(name: str, slices: int = 1) -> Topology:
    """`v5e:4x4` as a topology. Raises `ValueError` for what is none, with those that are known."""
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        known = ", ".join(chip.example for chip in CHIPS.values())
        raise ValueError(f"no topology is called {name!r}; known kinds, each with an example: {known}")
    sizes = (
        tuple(int(size) for size in shape.split("x"))
        if re.fullmatch("[1-9][0-9]{0,5}(x[1-9][0-9]{0,5})*", shape)
        else ()
    )
    if len(sizes) != SIZES[kind]:
        raise ValueError(f"a topology of {kind} is {SIZES[kind]} sizes, as {CHIPS[kind].example}; got {name!r}")
    if slices < 1 or (slices > 1 and kind == "cpu"):
        raise ValueError(f"--slices {slices} of {name}: at least 1, and several of accelerators only")
    if (devices := slices * math.prod(sizes)) > MOST_DEVICES:
        raise ValueError(f"{name} has {devices:,} devices, and no more than {MOST_DEVICES:,} are planned for")
    return Topology(kind, sizes, slices)


def _check_installed(kind: str, version: str) -> None:
    """Raises `ValueError` unless the compiler for `kind` is there."""
    needed = ("jax-cuda12-plugin", "jax-cuda12-pjrt") if kind == "h100" else ("libtpu",)
    for package in needed:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            line = f'pip install "jax[tpu]=={version}"'
            if kind == "h100":
                line = f"pip install --no-deps {' '.join(f'{name}=={version}' for name in needed)}"
            raise ValueError(f"the compiler for {kind} is not installed ({package}); {line}") from None
