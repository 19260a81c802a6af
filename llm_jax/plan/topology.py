"""Accelerators that programs can be compiled for, whether here or not, and how JAX gets to know them.

    topology = parse_topology("v5e:4x4")
    runtime.start(topology=topology)
    devices = topology.devices()

The plugin of an accelerator reads the environment when it is loaded, by `devices`.
"""

import dataclasses
import importlib.metadata
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_jax.chips import CHIPS, Chip

# The environment of a process that compiles for accelerators elsewhere. It keeps the TPU plugin from asking the network
# for a TPU, from refusing to load next to another process, and from logging.
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
H100 = Path(__file__).parent / "h100.txtpb"  # the description of the hardware that its compiler needs
MOST_DEVICES = 100_000
SIZES = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3, "h100": 2, "cpu": 1}  # how many numbers a shape has


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices of a kind, in one or several slices: TPUs in a mesh or torus, GPUs as nodes x GPUs per node."""

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chip(self) -> Chip:
        """What is published of the kind of chip: its rates and memory."""
        return CHIPS[self.kind]

    @property
    def n_devices(self) -> int:
        """How many devices JAX sees in all slices; some chips are two."""
        return self.slices * math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def n_chips(self) -> int:
        """How many chips there are in all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def island(self) -> int:
        """How many devices reach each other over the fast links."""
        return self.shape[-1] if self.kind == "h100" else self.n_devices // self.slices

    def __str__(self) -> str:
        name = f"{self.kind}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices} slices of {name}"

    @property
    def environment(self) -> Mapping[str, str]:
        """What stands in the environment of a process that compiles for it."""
        return ENVIRONMENT

    @property
    def simulated(self) -> int | None:
        """How many CPU devices stand for it; None for accelerators."""
        return self.n_devices if self.kind == "cpu" else None

    def devices(self) -> Sequence[Any]:
        """Return its devices, to compile for. Raise `ValueError` if there are none, with what to install or change."""
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
        except RuntimeError as reason:  # in the words of the plugin
            said = re.sub(r"^[A-Z_]+: ", "", str(reason).partition("\n")[0])[:200]
            raise ValueError(f"the compiler does not know {self}: {said}; {self.chip.example} exists") from reason

    def _described(self) -> Sequence[Any]:
        from jax.experimental import topologies

        shape = "x".join(map(str, self.shape))
        if self.kind == "h100":
            options = {"topology": f"{self.slices}x{shape}", "target_config": H100.read_text()}
            return topologies.get_topology_desc("", platform="cuda", **options).devices
        options: dict[str, Any] = {} if self.slices == 1 else {"num_slices": self.slices}
        if self.kind == "v4":
            options["chip_config_name"] = "megacore"  # both cores of a chip are one device
        if min(self.shape[:2]) < 2:  # by default a host has 2 x 2 chips
            options["chips_per_host_bounds"] = [*(min(2, size) for size in self.shape[:2]), 1]
        return topologies.get_topology_desc(f"{self.kind}:{shape}", platform="tpu", **options).devices


def parse_topology(name: str, slices: int = 1) -> Topology:
    """Return the topology `name`, such as `v5e:4x4`. Raise `ValueError` for any other name, with the known ones."""
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
        raise ValueError(f"a topology of {kind} has {SIZES[kind]} sizes, like {CHIPS[kind].example}; got {name!r}")
    if slices < 1 or (slices > 1 and kind == "cpu"):
        raise ValueError(f"--slices {slices} of {name}: use 1 or more, and 1 on a CPU")
    if (devices := slices * math.prod(sizes)) > MOST_DEVICES:
        raise ValueError(f"{name} has {devices:,} devices; use at most {MOST_DEVICES:,}")
    return Topology(kind, sizes, slices)


def _check_installed(kind: str, version: str) -> None:
    """Raise `ValueError` unless the compiler for `kind` is installed."""
    needed = ("jax-cuda12-plugin", "jax-cuda12-pjrt") if kind == "h100" else ("libtpu",)
    for package in needed:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            line = f'pip install "jax[tpu]=={version}"'
            if kind == "h100":
                line = f"pip install --no-deps {' '.join(f'{name}=={version}' for name in needed)}"
            raise ValueError(f"the compiler for {kind} is not installed ({package}); {line}") from None
