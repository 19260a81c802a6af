"""Run jobs on a Ray cluster: that of `ray://HOST:PORT`, or with `ray` that of this machine, started if there is none.

The machines need the same Python, Ray and llm-jax as this one. What a job needs is sent with it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from llm_jax.data.addresses import one_line

START = "ray start --head --ray-client-server-port=10001"
Begin = Callable[[Any], Callable[[], Any]]


def check(address: str) -> Any:
    """Return Ray. Raise `ValueError` where it is not installed, and for an address that is not Ray's."""
    if address != "ray" and not address.startswith("ray://"):
        raise ValueError(f"workers={address} is unknown; expected a number of processes, ray, or ray://HOST:PORT")
    try:
        import ray
    except ImportError:
        raise ValueError(f"workers={address} needs Ray; pip install 'llm-jax[ray]'") from None
    return ray


@contextlib.contextmanager
def connected(address: str, function: Callable[[Any], Any]) -> Iterator[tuple[int, Begin]]:
    """Yield the number of cores of the cluster, and a function that begins `function(job)` and returns one that waits.

    Raise `ValueError` like `check`, where no cluster answers, and where a worker fails.
    """
    ray = check(address)
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    try:
        remote = ray.remote(_call)
        # Sent once, and not with each job.
        sent = ray.put(function)
        yield (
            int(ray.cluster_resources().get("CPU", 1)),
            lambda job: functools.partial(_result, ray, remote.remote(sent, job)),
        )
    finally:
        if ours:
            ray.shutdown()


def _call(function: Callable[[Any], Any], job: Any) -> Any:
    return function(job)


def _connect(ray: Any, address: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(**quiet) if address == "ray" else ray.init(address, **quiet)
    except Exception as error:  # of many types, by what is wrong: the address, the network, versions
        raise ValueError(
            f"no Ray cluster answers at {address}: {one_line(error)}; start one there ({START}), or use workers=ray"
        ) from error


def _result(ray: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from None
        raise ValueError(
            f"a worker of Ray failed: {one_line(error.cause)}; they need the Python, Ray and llm-jax of this machine"
        ) from error
    except ray.exceptions.RayError as error:
        raise ValueError(
            f"a worker of Ray died: {one_line(error)}; it had too little memory, or its machine is gone; start again"
        ) from error
