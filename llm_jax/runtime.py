"""The process that JAX runs in: compiler flags, the platform that exists, devices, memory, caches. All in one place.

    import llm_jax       # calls `guard`: a compiler with known faults does not run unguarded
    runtime.start()      # what a verb calls before its first array

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
from glob import glob
from pathlib import Path
from typing import Any

from jaxlib.version import __version__ as JAXLIB

# Which sums XLA gives to YNNPACK, a library of kernels, on a CPU; empty: none, and XLA compiles them itself.
FUSIONS = "--xla_cpu_experimental_ynn_fusion_type"


@dataclasses.dataclass(frozen=True)
class Fault:
    """What a CPU computes wrongly by way of YNNPACK, in jaxlib from `first` on, and right again from `fixed` on."""

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
    """Return the faults of a version of jaxlib, guarded against or not."""
    version = tuple(map(int, re.findall(r"\d+", jaxlib)[:3]))
    return tuple(fault for fault in FAULTS if fault.first <= version < fault.fixed)


def guard(jaxlib: str = JAXLIB) -> None:
    """Keep sums from YNNPACK where this jaxlib has known faults; what `XLA_FLAGS` says of it already stays.

    Counts if JAX's backend has not started. Versions without faults get no flag: one that jaxlib does not know ends
    the process, and those with faults know it.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-"):  # XLA takes the name of a file, too
        with contextlib.suppress(OSError, ValueError):  # what is none is XLA's to refuse
            flags = Path(flags).read_text(encoding="utf-8").strip()
    if known_faults(jaxlib) and FUSIONS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FUSIONS}=".lstrip()


def open_faults(device: Any) -> tuple[Fault, ...]:
    """Return the known faults that programs on `device` can meet. It is the compiler that is asked, not the flags."""
    import jax
    import jax.numpy as jnp

    if device.platform != "cpu" or not known_faults():
        return ()
    x = jax.ShapeDtypeStruct((1024, 1), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    program = jax.jit(lambda x: jnp.broadcast_to(x, (2, 1024, 1024)).sum()).lower(x).compile()
    return known_faults() if "ynn_fusion" in (program.as_text() or "") else ()


def warning(device: Any) -> str | None:
    """Say in a line that programs on `device` are not guarded, and what to do; None where nothing is wrong."""
    if not (faults := open_faults(device)):
        return None
    reports = ", ".join(fault.reports for fault in faults)
    return (
        f"jaxlib {JAXLIB} sums wrongly on a CPU now and then ({reports}), and nothing guards this process; import "
        f"llm_jax before JAX computes anything, and have {FUSIONS}= in XLA_FLAGS if you name that flag"
    )


def start(devices: int | None = None) -> None:
    """Set up a process that is ours alone, before its first array.

    It sees the platform that exists, or so many simulated `devices`; keeps freed memory, and every compiled program.
    """
    import jax

    if devices is None:
        choose_platform()
    else:
        simulate(devices)
    reuse_freed_memory()
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def started() -> bool:
    """Return whether JAX's backend runs in this process: its devices and compiler flags are settled then."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bridge is not None and bridge.backends_are_initialized()


def choose_platform() -> None:
    """Leave the TPU out where its library is installed, but no TPU can be used; what the user has chosen stays.

    JAX would load the library to see: that prints a dozen lines, and may wait for a network that isn't there. A TPU of
    this machine that was not given to this container is named on standard error.
    """
    from importlib.metadata import entry_points

    import jax
    from jax._src import hardware_utils  # by which JAX itself tells a TPU from Google's other devices

    chosen = any(os.environ.get(name) for name in ("JAX_PLATFORMS", "JAX_FORCE_TPU_INIT"))
    if chosen or started() or importlib.util.find_spec("libtpu") is None:
        return
    config: Any = jax.config
    chips, _ = hardware_utils.num_available_tpu_chips_and_device_id()
    given = glob("/dev/accel*") or glob("/dev/vfio/[0-9]*")
    if (chips and given) or config.jax_platforms not in (None, "", "tpu,cpu"):  # the last is JAX's own choice
        return
    plugins = [plugin.name for plugin in entry_points(group="jax_plugins") if "tpu" not in plugin.name]
    if any("cuda" not in name for name in plugins):  # JAX knows what these are called; leave it to find out
        return
    jax.config.update("jax_platforms", "cuda,cpu" if plugins else "cpu")
    if chips:
        print(
            "the TPU of this machine was not given to this container (no /dev/accel* and no /dev/vfio/*); "
            f"going on without it, on {config.jax_platforms}",
            file=sys.stderr,
        )


def unavailable(error: Exception) -> str | None:
    """Say in a line that a device can't be had, where that is what JAX's `error` means; None for any other error."""
    found = re.search(r"Unable to initialize backend '(\w+)': (?:[A-Z_]+: )?(.*)", str(error))
    if found is None:
        return None
    said = re.sub(r" \((set|you may need).*", "", found[2]).rstrip(".")
    return f"JAX can't start on {found[1]}: {said}; free it of what holds it, or set JAX_PLATFORMS=cpu to do without"


def simulate(devices: int) -> None:
    """Let JAX see so many CPU devices, and no other. Comes before the first array, and changes nothing after it."""
    if started():
        return
    # NPROC is XLA's threads: with one for each device, collectives wait for each other for ever.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "NPROC": str(4 * devices)}
    if "jax" in sys.modules:  # it has read the first two already
        import jax

        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)


def reuse_freed_memory() -> None:
    """Let this process keep the memory it frees, instead of returning it to the kernel after every step.

    A train step on CPU takes and frees one large temporary buffer; fetching its pages anew each time costs up to a
    third of a small model's step. Memory stays at its peak. Does nothing where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max, arena_max = -1, -4, -8  # M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX of malloc.h
    mallopt(arena_max, 1)  # another thread's arena maps and unmaps whatever exceeds 64 MB, whatever the limits say
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, -1)  # never


def cache_folder() -> Path:
    """Return where prepared data and compiled programs are kept: $LLM_JAX_CACHE, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("LLM_JAX_CACHE", f"{base}/llm_jax")).expanduser()
