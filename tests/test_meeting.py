"""Processes find each other where they are told to, and say who is missing. Loopback, threads for processes."""

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llm_jax.processes import connections, meeting
from llm_jax.processes.meeting import Address


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def outcome(address: Address) -> str | None:
    """What a process that meets the others gets: an address or nothing, or what it complains about."""
    try:
        return meeting.meet(address)
    except ValueError as error:
        return str(error)


def met(processes: int, present: list[int]) -> dict[int, str | None]:
    """What each of the processes that are `present` gets."""
    where = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(processes) as pool:
        found = {n: pool.submit(outcome, Address(where, processes, n, None)) for n in present}
        return {n: future.result() for n, future in found.items()}


def test_all_processes_meet_and_the_port_is_free_again():
    found = met(4, [3, 0, 2, 1])
    address = found.pop(0)
    assert found == {1: None, 2: None, 3: None}
    assert address is not None
    host, _, port = address.rpartition(":")
    connections.listen(host, int(port)).close()


def test_everyone_hears_who_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meeting, "FIND", 0.5)
    found = met(5, [0, 2, 4])
    assert len(set(found.values())) == 1
    assert "processes 1 and 3 of 5 did not come to 127.0.0.1:" in found[0]
    assert "process 0 of 2 can't be reached at 127.0.0.1:" in met(2, [1])[1]


def test_a_number_given_twice_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(meeting, "FIND", 1)
    where = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(3) as pool:
        found = [pool.submit(outcome, Address(where, 3, n, None)) for n in (0, 1, 1)]
        said = sorted(str(future.result()) for future in found)
    assert said[0].startswith("--process 1 is another one already; give each process a number of its own")
    assert said[1].startswith("process 2 of 3 did not come")


def test_a_port_that_is_taken_is_named():
    with connections.listen("127.0.0.1", 0) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=r"process 0 can't listen at .*\d \(Address already in use\); use another"):
            meeting.meet(Address(f"127.0.0.1:{port}", 2, 0, None))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[001-015],host2", "node001"),
        ("node[001,007-015],host2", "node001"),
        ("r[1-2]n[01-08]", "r1n01"),
        ("r[3,5]n[10-12]-ib,r9", "r3n10-ib"),
    ],
)
@pytest.mark.parametrize("installed", [True, False])
def test_process_0_of_a_slurm_step_is_on_the_first_host_of_the_list(
    installed: bool, nodes: str, first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PATH", str(tmp_path))
    if installed:  # what it says is right, whatever the list looks like
        (tmp_path / "scontrol").write_text('#!/bin/sh\necho "told-$3"\necho second\n')
        (tmp_path / "scontrol").chmod(0o755)
    environ = {"SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": nodes}
    assert meeting.slurm_coordinator(environ) == f"{f'told-{nodes}' if installed else first}:61441"


def test_a_step_of_slurm_gives_every_process_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    environ = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "r[1-2]n[01-08]", "SLURM_NTASKS": "16"}
    environ |= {"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16"}
    for name, value in (environ | {"PATH": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    assert meeting.address_of(None, None, None) == Address("r1n01:61441", 16, 9, [1])


@pytest.mark.parametrize("name", meeting.NUMBERS)
def test_a_variable_of_a_scheduler_that_is_no_number_is_named(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(name, "x")
    with pytest.raises(ValueError, match=rf"^{name}='x' in the environment is not a number, .*; unset it, or start"):
        meeting.address_of(None, None, None)
    assert meeting.address_of("node0:8476", 2, 1) == Address("node0:8476", 2, 1, None)


def test_a_pod_without_the_package_by_which_pods_meet_says_which(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'llm_jax\[k8s\]', or give each process --coordinator HOST:PORT"):
        meeting.address_of(None, None, None)


@pytest.mark.parametrize(
    ("environ", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # the shell of salloc
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),  # its interactive step
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a notebook in a pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_only_a_process_that_was_started_with_others_looks_for_them(environ: dict[str, str], several: bool):
    assert meeting.started_as_one_of_several(environ, tpu_vm=False, terminal=False) == several


@pytest.mark.parametrize(("terminal", "several"), [(True, False), (False, True)])
def test_who_types_on_one_machine_of_a_tpu_slice_means_that_machine(terminal: bool, several: bool):
    assert meeting.started_as_one_of_several({}, tpu_vm=True, terminal=terminal) == several


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", 2, None), "together; add --process I"),
        (("localhost:٣", 2, 0), "has no host or no port"),
        (("localhost:65536", 2, 0), "has no host or no port"),
        (("localhost:1", 2, 2), "--process 2 is none of --processes 2; use 0 to 1"),
        (("localhost", 2, 0), "--coordinator localhost has no host or no port; use HOST:PORT"),
    ],
)
def test_half_an_address_is_refused(given: tuple[str, int, int | None], message: str):
    with pytest.raises(ValueError, match=message):
        meeting.address_of(*given)
