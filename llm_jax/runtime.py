"""The process that JAX runs in: compiler flags, the platform that exists, devices, memory, caches.

    import llm_jax       # calls `guard`: a compiler with known faults does not run unguarded
    runtime.start()      # once, before the first array

Nothing here imports JAX until `start`: flags and the environment count only until its backend starts.
"""

import contextlib
import ctypes
import dataclasses
import importlib.util
import os
import platform
import re
import sys
from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import Any, Protocol

from jaxlib.version import __version__ as JAXLIB

# Which sums XLA gives to YNNPACK, a library of kernels, on a CPU; empty: none, and XLA compiles them itself.
FUSIONS = "--xla_cpu_experimental_ynn_fusion_type"


# Whether a program for a CPU may use the C++ of ops/native, where it can be compiled. It decides the last bits.
NATIVE = os.environ.get("LLM_JAX_NATIVE") != "0"


@dataclasses.dataclass(frozen=True)
class Fault:
    """A wrong computation of YNNPACK on a CPU, in jaxlib from the version `first` up to `fixed`, excluded."""

    reports: str
    first: tuple[int, ...]
    fixed: tuple[int, ...]
    what: str


FAULTS = (
    Fault("jax#39103", (0, 10, 2), (0, 11, 0), "rows past the 32,768th can get the sums of other rows"),
    Fault("tensorflow#126812", (0, 10, 2), (0, 12, 0), "the sum of a broadcast array changes from call to call"),
    Fault("jax#39257, jax#40412", (0, 10, 2), (0, 11, 1), "sums over seven axes or more can end the process"),
)


def known_faults(jaxlib: str = JAXLIB) -> tuple[Fault, ...]:
    """Return the faults of a version of jaxlib, whether guarded against or not."""
    version = tuple(map(int, re.findall(r"\d+", jaxlib)[:3]))
    return tuple(fault for fault in FAULTS if fault.first <= version < fault.fixed)


def guard(jaxlib: str = JAXLIB) -> None:
    """Keep sums from YNNPACK where this jaxlib has known faults; what `XLA_FLAGS` says of it already stays.

    It works before JAX's backend has started. Versions without faults get no flag: jaxlib ends the process for an
    unknown one, and those with faults know it.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):  # XLA also takes the name of a file
        with contextlib.suppress(OSError, ValueError):  # XLA itself refuses what is no file
            flags = Path(flags).read_text(encoding="utf-8").strip()
    if known_faults(jaxlib) and FUSIONS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FUSIONS}=".lstrip()


def open_faults(device: Any) -> tuple[Fault, ...]:
    """Return the known faults that programs on `device` can meet, by what the compiler does, not by the flags."""
    import jax
    import jax.numpy as jnp

    if device.platform != "cpu" or not known_faults():
        return ()
    x = jax.ShapeDtypeStruct((1024, 1), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    program = jax.jit(lambda x: jnp.broadcast_to(x, (2, 1024, 1024)).sum()).lower(x).compile()
    return known_faults() if "ynn_fusion" in (program.as_text() or "") else ()


def warning(device: Any) -> str | None:
    """Return a line that says that programs on `device` are not guarded, and what to do; None if nothing is wrong."""
    if not (faults := open_faults(device)):
        return None
    reports = ", ".join(fault.reports for fault in faults)
    return (
        f"jaxlib {JAXLIB} sums wrongly on a CPU now and then ({reports}), and nothing guards this process; import "
        f"llm_jax before JAX computes anything, and have {FUSIONS}= in XLA_FLAGS if you name that flag"
    )


class Target(Protocol):
    """Accelerators to compile for, which need not be here: `plan/topology.py` has them."""

    @property
    def environment(self) -> Mapping[str, str]:
        """Variables of the environment in which their compiler runs."""
        ...

    @property
    def simulated(self) -> int | None:
        """How many CPU devices stand for them; None for accelerators."""
        ...


def start(devices: int | None = None, topology: Target | None = None) -> None:
    """Set up this process for JAX, before its first array: the platform, memory, the cache of compiled programs.

    devices: so many simulated CPU devices, in place of those of this machine.
    topology: accelerators that programs are compiled for, here or not.

    It does not matter what was imported before, nor that it is called again. Raise `ValueError` if JAX runs already
    without what this asks for: with fewer devices, or with accelerators where programs are to be compiled for others.
    """
    import jax

    if topology is not None and started() and jax.default_backend() != "cpu":
        raise ValueError(
            f"JAX runs in this process already, on {jax.default_backend()}, and programs for other devices are "
            "compiled in a process of their own; call llm_jax.runtime.start(topology=...) before the first array"
        )
    devices = devices if topology is None else topology.simulated
    for name, value in ({} if topology is None else topology.environment).items():
        os.environ.setdefault(name, value)  # what the user has set stays
    if devices is not None:
        _simulate(devices)
    elif topology is None:
        choose_platform()
    elif not started():
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])  # JAX may have read its variables before
    reuse_freed_memory()
    if topology is None and jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def started() -> bool:
    """Return whether JAX's backend runs in this process, so that its devices and compiler flags are fixed."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def choose_platform() -> None:
    """Leave the TPU out if its library is installed but no TPU can be used; a choice of the user stays.

    JAX would load the library to find out, which prints a dozen lines, and may wait for a network that isn't there. A
    TPU of this machine that this container has no access to is reported on standard error.
    """
    from importlib.metadata import entry_points

    import jax
    from jax._src import hardware_utils  # which JAX itself uses to recognise a TPU

    chosen = any(os.environ.get(name) for name in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"))
    if chosen or started() or importlib.util.find_spec("libtpu") is None:
        return
    config: Any = jax.config
    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    given = glob("/dev/accel*") or glob("/dev/vfio/[0-9]*")
    if (chips and given) or config.jax_platforms not in (None, "", "tpu,cpu"):  # the last is JAX's own choice
        return
    plugins = [plugin.name for plugin in entry_points(group="jax_plugins") if "tpu" not in plugin.name]
    if any("cuda" not in name for name in plugins):  # JAX knows what these are called
        return
    jax.config.update("jax_platforms", "cuda,cpu" if plugins else "cpu")
    if chips:
        print(
            "the TPU of this machine was not given to this container (no /dev/accel* and no /dev/vfio/*); "
            f"continuing without it, on {config.jax_platforms}",
            file=sys.stderr,
        )


def unavailable(error: Exception) -> str | None:
    """Return a line that says that a device is not available, if JAX's `error` means that; None for any other error."""
    found = re.search(r"Unable to initialize backend '(\w+)': (?:[A-Z_]+: )?(.*)", str(error))
    if found is None:
        return None
    said = re.sub(r" \((set|you may need).*", "", found[2]).rstrip(".")
    return f"JAX can't start on {found[1]}: {said}; free it of what holds it, or set JAX_PLATFORMS=cpu to do without"


def _simulate(devices: int) -> None:
    """Make JAX see `devices` CPU devices, and no others."""
    import jax

    if started():
        if len(here := jax.devices()) < devices:
            raise ValueError(
                f"JAX runs in this process already, with {len(here)} devices, and {devices} are asked for; call "
                f"llm_jax.runtime.start(devices={devices}) before the first array, or set JAX_NUM_CPU_DEVICES={devices}"
            )
        return
    # NPROC is the number of XLA's threads: with one for each device, collectives wait for each other forever.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "NPROC": str(4 * devices)}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def for_one_call(platform: str) -> dict[str, Any] | None:
    """Return compiler options for a program that runs once: less time in the compiler, the same bits.

    On a CPU, LLVM takes 0.4 s to optimize the random numbers of each array in full, and half of that at level 1, with
    which they run as fast. A level in `XLA_FLAGS` stays.
    """
    level = "xla_backend_optimization_level"
    return {level: 1} if platform == "cpu" and level not in os.environ.get("XLA_FLAGS", "") else None


def reuse_freed_memory() -> None:
    """Keep the memory that this process frees, instead of returning it to the kernel after every step.

    A train step on CPU takes and frees one large temporary buffer; faulting in its pages each time costs up to a third
    of a small model's step. Memory stays at its peak. Does nothing if the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX of malloc.h
    mallopt(arena_max, 1)  # the arena of another thread maps and unmaps whatever exceeds 64 MB, despite the limits
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never


def cache_folder() -> Path:
    """Return where prepared data and compiled programs are kept: $LLM_JAX_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("LLM_JAX_CACHE", f"{base}/llm_jax")).expanduser()
