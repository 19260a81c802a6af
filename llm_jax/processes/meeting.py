"""Find the other processes of a run, by the options or the scheduler, and name those that are missing."""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm
from jax._src.clusters import ClusterEnv

from llm_jax.processes import connections

FIND = 120  # seconds that the processes have to find each other
# Variables that hold numbers, read here or by JAX.
NUMBERS = (
    *(f"SLURM_{name}" for name in ("STEP_NUM_TASKS", "JOB_ID", "NTASKS", "PROCID", "LOCALID")),
    *(f"OMPI_COMM_WORLD_{name}" for name in ("SIZE", "RANK", "LOCAL_RANK")),
    *("JOB_COMPLETION_INDEX", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "TPU_WORKER_ID", "JAX_COORDINATOR_PORT"),
)


class Address(NamedTuple):
    """The address of process 0, how many processes there are, which one this is, and which devices it owns."""

    coordinator: str
    processes: int
    process: int
    devices: Sequence[int] | None

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])


def address_of(coordinator: str | None, processes: int | None, process: int | None) -> Address | None:
    """Return the address in the options, else the scheduler's; None for a process that is alone.

    Raise `ValueError` for options or variables that name no address.
    """
    address = _given(coordinator, processes, process)
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if address is None:
        _check_numbers(os.environ)
    if address is None and started_as_one_of_several(os.environ, tpu_vm=running_in_cloud_tpu_vm, terminal=terminal):
        return _found(os.environ)
    return address


def started_as_one_of_several(environ: Mapping[str, str], *, tpu_vm: bool, terminal: bool) -> bool:
    """Return whether the scheduler that started this process started others with it.

    Only then JAX looks for them. An interactive shell inside an allocation has the variables of the allocation, but is
    a step of one task; a command typed on one machine of a TPU slice means that machine.
    """
    slurm = int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 and "SLURM_PROCID" in environ
    kubernetes = {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys()
    slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1 or "," in environ.get("TPU_WORKER_HOSTNAMES", "")
    metadata = "TPU_SKIP_MDS_QUERY" not in environ and "TPU_WORKER_HOSTNAMES" not in environ
    return slurm or (kubernetes and not tpu_vm) or (tpu_vm and not terminal and (slices or metadata))


def _check_numbers(environ: Mapping[str, str]) -> None:
    """Raise `ValueError` for one of the variables `NUMBERS` that is not a number."""
    for name in NUMBERS:
        if not re.fullmatch("[0-9]{0,18}", value := environ.get(name, "")):
            raise ValueError(
                f"{name}={value!r} in the environment is not a number, as a scheduler would set it; unset it, "
                "or start all of them by the scheduler"
            )


def _given(coordinator: str | None, processes: int | None, process: int | None) -> Address | None:
    """Return the address in the options; None if none is given. Raise `ValueError` if only some are."""
    given = {"--coordinator HOST:PORT": coordinator, "--processes N": processes, "--process I": process}
    if missing := [option for option, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ValueError(f"processes find each other by {', '.join(given)} together; add {' and '.join(missing)}")
        return None
    assert coordinator is not None
    assert processes is not None
    assert process is not None
    if not 0 <= process < processes:
        raise ValueError(f"--process {process} is none of --processes {processes}; use 0 to {processes - 1}")
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator {coordinator} has no host or no port; use HOST:PORT, as node0:8476")
    return Address(coordinator, processes, process, None)


def _found(environ: Mapping[str, str]) -> Address:
    """Return the scheduler's address. Raise `ValueError` if it does not say."""
    in_pod = "KUBERNETES_SERVICE_HOST" in environ and not running_in_cloud_tpu_vm
    options = "give each process --coordinator HOST:PORT --processes N --process I"
    if in_pod and importlib.util.find_spec("kubernetes") is None:
        raise ValueError(
            f"JAX finds the pods of a job by the package kubernetes: pip install 'llm_jax[k8s]', or {options}"
        )
    try:
        told = environ.get("JAX_COORDINATOR_ADDRESS") or slurm_coordinator(environ)
        found = ClusterEnv.auto_detect_unset_distributed_params(told, None, None, None, None, FIND)
        coordinator, processes, process, devices = found
    except Exception as error:  # whatever the scheduler's own library raises
        reason = " ".join(str(error).split())
        raise ValueError(f"the scheduler does not say where the processes are ({reason}); {options}") from error
    if coordinator is None or processes is None or process is None:
        raise ValueError(f"the scheduler does not say where the processes are; {options}")
    return Address(coordinator, processes, process, devices)


def slurm_coordinator(environ: Mapping[str, str]) -> str | None:
    """Return the address of process 0 in a step of SLURM; None elsewhere.

    JAX derives the port from the number of the job, as here, but misreads a list such as `r[1-2]n[01-08]`.
    """
    nodes, job = environ.get("SLURM_STEP_NODELIST"), environ.get("SLURM_JOB_ID")
    if nodes is None or job is None:
        return None
    port = environ.get("JAX_COORDINATOR_PORT") or str(int(job) % 2**12 + 65536 - 2**12)
    return f"{first_host(nodes)}:{port}"


def first_host(nodes: str) -> str:
    """Return the first host of a SLURM list: r1n01 of `r[1-2]n[01-08],r9`."""
    if shutil.which("scontrol"):
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=False)
        if told.returncode == 0 and told.stdout.split():
            return told.stdout.split()[0]
    inside_brackets = r"\[[^\]]*\]"
    first = re.match(rf"(?:[^,\[]|{inside_brackets})*", nodes)
    assert first is not None
    return re.sub(inside_brackets, lambda listed: re.split("[-,]", listed[0][1:-1])[0], first[0])


def meet(a: Address) -> str | None:
    """Wait until all processes are there; return, in process 0, the address that JAX binds to.

    JAX itself ends the process with a stack trace if one is missing, and does not say which. Raise `ValueError`, with
    the names of those that are missing, or if process 0 can't be reached.
    """
    key = connections.run_key("meeting", a.processes)
    if a.process:
        _wait_for_the_first(a, key)
        return None
    try:
        listener = connections.listen(a.host, a.port)
    except OSError as error:
        raise ValueError(
            f"process 0 can't listen at {a.coordinator} ({_reason(error)}); use another HOST:PORT"
        ) from None
    with listener:
        address, port = listener.getsockname()[:2]
        arrivals = connections.gather(listener, key, a.processes, FIND)
    absent = absent_from(arrivals, a.processes, a.coordinator)
    for peer in arrivals.peers.values():
        connections.tell(peer, (absent or "go").encode())
    for peer in arrivals.peers.values():
        with contextlib.suppress(EOFError, OSError):
            peer.poll(1)  # until it has closed: the side that closes first keeps the port for a while
        peer.close()
    if absent:
        raise ValueError(absent)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _wait_for_the_first(a: Address, key: bytes) -> None:
    """Wait until process 0 says that all are there. Raise `ValueError` if it does not, with the reason."""
    try:
        with connections.connect(a.host, a.port, key, a.process, FIND) as first:
            answered = first.poll(FIND + connections.GREETING)
            word = first.recv_bytes(connections.LONGEST) if answered else b"it said nothing"
    except (EOFError, OSError) as error:
        what = "does not accept this process" if isinstance(error, connections.NotOurs) else "can't be reached"
        raise ValueError(
            f"process 0 of {a.processes} {what} at {a.coordinator} ({_reason(error)}); start all of them "
            f"within {FIND} s, with the same HOST:PORT, --processes and LLM_JAX_SECRET"
        ) from None
    if word != b"go":
        raise ValueError(word.decode(errors="replace"))


def _reason(error: OSError | EOFError) -> str:
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)  # without the address, which `strerror` may contain
    return getattr(error, "strerror", None) or str(error) or "it is gone"


def absent_from(arrivals: connections.Arrivals, processes: int, where: str) -> str:
    """Return who is missing, and what to do; empty if all are there."""
    missing = [number for number in range(1, processes) if number not in arrivals.peers]
    if not missing:
        return ""
    strangers = f" ({arrivals.strangers} connections were no process of this run)" if arrivals.strangers else ""
    return (
        f"{_named(missing)} of {processes} did not come to {where} within {FIND} s{strangers}; start all of them "
        "within that time, where they can reach it, with the same HOST:PORT, --processes and LLM_JAX_SECRET"
    )


def _named(numbers: Sequence[int]) -> str:
    """Return `process 3`, `processes 1, 2 and 3`, or the first few of many."""
    if len(numbers) == 1:
        return f"process {numbers[0]}"
    shown = list(map(str, numbers)) if len(numbers) <= 8 else [*map(str, numbers[:7]), f"{len(numbers) - 7} more"]
    return f"processes {', '.join(shown[:-1])} and {shown[-1]}"
