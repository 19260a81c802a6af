"""The process is set up once: guarded compilers, the platform that exists, memory that is kept."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax import runtime
from llm_jax.cli.main import SYNTAX, main
from llm_jax.runtime import FUSIONS, for_one_call, guard, known_faults, open_faults, unavailable

ROWS = 40_001  # jax#39103: wrong between 32,768 and 65,536


def test_sums_of_many_rows_are_those_of_their_own_rows():
    rows = np.random.default_rng(0).standard_normal((ROWS, 3), np.float32)
    turn = np.eye(3, dtype=np.float32)
    found = jax.jit(jax.vmap(lambda row: jnp.sum((turn @ row) ** 2)))(rows)
    np.testing.assert_allclose(found, (rows.astype(np.float64) ** 2).sum(1), rtol=1e-6)


def test_the_sum_of_a_broadcast_array_is_the_same_at_every_call():
    total = jax.jit(lambda x: jnp.broadcast_to(x, (2, 1024, 1024)).sum())
    assert {float(total(jnp.ones((1024, 1)))) for _ in range(20)} == {2.0**21}


def test_the_compiler_of_this_process_is_guarded():
    assert open_faults(jax.devices()[0]) == ()


@pytest.mark.parametrize(
    ("jaxlib", "reports"),
    [
        ("0.10.1", set()),
        ("0.10.2", {"jax#39103", "tensorflow#126812", "jax#39257, jax#40412"}),
        ("0.11.2", {"tensorflow#126812"}),
        ("0.12.0.1", set()),
        ("0.13.0.dev20261201", set()),
    ],
)
def test_versions_with_known_faults_are_named_and_no_others(jaxlib: str, reports: set[str]):
    assert {fault.reports for fault in known_faults(jaxlib)} == reports


@pytest.mark.parametrize(
    ("before", "jaxlib", "after"),
    [
        ("", "0.10.2", f"{FUSIONS}="),
        ("--xla_dump_to=x", "0.10.2", f"--xla_dump_to=x {FUSIONS}="),
        (f"{FUSIONS}=reduce", "0.10.2", f"{FUSIONS}=reduce"),
        ("--xla_dump_to=x", "0.12.0.1", "--xla_dump_to=x"),
        ("", "0.10.1", ""),
    ],
)
def test_the_guard_adds_to_the_flags_of_the_user(before: str, jaxlib: str, after: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_FLAGS", before)
    guard(jaxlib)
    assert os.environ["XLA_FLAGS"] == after


def test_flags_in_a_file_are_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "flags").write_text("--xla_dump_to=x\n--xla_dump_hlo_as_text\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    guard("0.10.2")
    assert os.environ["XLA_FLAGS"].split() == ["--xla_dump_to=x", "--xla_dump_hlo_as_text", f"{FUSIONS}="]


def printed(program: str, path: Path | None = None, **environment: str) -> tuple[str, str]:
    """What a Python program of its own prints, and what it says on standard error."""
    kept = {name: x for name, x in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    root = str(Path(__file__).parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [str(path or ""), root]))
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr.strip()


@pytest.mark.skipif(not known_faults(), reason="this jaxlib has no known fault")
def test_who_starts_jax_before_the_library_is_told_that_nothing_guards():
    begin = "import jax; jax.devices(); from llm_jax import runtime; print(runtime.warning(jax.devices()[0]))"
    out, _ = printed(begin, JAX_PLATFORMS="cpu")
    assert "jax#39103" in out
    assert f"{FUSIONS}= in XLA_FLAGS" in out
    assert "\n" not in out


PLATFORMS = """
import jax
from jax._src import hardware_utils
from llm_jax import runtime

def found(chips, nodes, chosen=None):
    hardware_utils.num_available_tpu_chips_and_device_id = lambda: (chips, None)
    runtime.glob = lambda pattern: ["/dev/accel0"] if nodes else []
    jax.config.update("jax_platforms", chosen)
    runtime.choose_platform()
    return str(jax.config.jax_platforms)

print(found(0, False), found(4, True, "tpu,cpu"), found(4, False, "tpu,cpu"), found(0, False, "cuda"))
"""


def test_a_tpu_is_looked_for_only_where_one_can_be_used(tmp_path: Path):
    assert printed(PLATFORMS) == ("None tpu,cpu tpu,cpu cuda", "")  # without libtpu all is left to JAX
    (tmp_path / "libtpu.py").write_text("def get_library_path():\n    return 'libtpu.so'\n")
    out, said = printed(PLATFORMS, tmp_path)
    assert out == "cpu tpu,cpu cpu cuda"
    assert said.startswith("the TPU of this machine was not given to this container")


def test_a_device_that_is_taken_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    def fail(args: object) -> None:
        """Fail as JAX does."""
        raise RuntimeError(
            "Unable to initialize backend 'tpu': ABORTED: The TPU is already in use by process with pid 7. Not "
            "attempting to load libtpu.so in this process. (set JAX_PLATFORMS='' to automatically choose a backend)"
        )

    monkeypatch.setitem(SYNTAX, fail, ())
    assert main(["fail"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llm-jax: error: JAX can't start on tpu: The TPU is already in use by process with pid 7.")
    assert "set JAX_PLATFORMS=cpu" in said
    assert said.count("\n") == 1
    assert unavailable(RuntimeError("something else")) is None


def test_devices_are_simulated_after_any_import_but_not_after_an_array():
    count = "runtime.start(devices=3); import jax; print(jax.device_count())"
    assert printed(f"import jax; from llm_jax import runtime; {count}")[0] == "3"
    assert printed(f"from llm_jax import runtime; {count}")[0] == "3"
    jax.devices()
    with pytest.raises(ValueError, match=r"JAX runs in this process already, with 8 devices, and 9 are asked for"):
        runtime.start(devices=9)


def test_compiling_for_accelerators_needs_no_order_of_imports():
    begin = "from llm_jax.plan.topology import parse_topology as parse; from llm_jax import runtime"
    show = "import jax; print(jax.devices()[0].platform, jax.config.jax_platforms)"
    for first in ("import jax", "pass"):
        said = printed(f"{first}; {begin}; runtime.start(topology=parse('v5e:4x4')); {show}")
        assert said[0] == "cpu cpu"


REUSE = """
import ctypes, resource
from llm_jax.runtime import for_one_call, reuse_freed_memory
reuse_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for size in [3 << 30, 3 << 30]:  # more than a trim threshold of 31 bits
    block = libc.malloc(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    ctypes.memset(block, 0, 1 << 26)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    libc.free(block)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the C library's own knobs")
def test_freed_memory_is_had_again_without_new_pages():
    done = subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, check=True)
    first, again = map(int, done.stdout.split())
    page = resource.getpagesize()
    assert first > again
    assert again * page < 1 << 20


def test_what_runs_once_is_compiled_in_less_time_unless_the_user_says_how(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    assert for_one_call("cpu") == {"xla_backend_optimization_level": 1}
    assert for_one_call("tpu") is None
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=3")
    assert for_one_call("cpu") is None
