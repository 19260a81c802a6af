"""What a step sends, by the kind of collective and the axes of the mesh, and how long the device waits for it."""

import dataclasses
from collections.abc import Mapping, Sequence

from llm_jax.plan import hlo
from llm_jax.plan.estimate import rate_along
from llm_jax.plan.topology import Topology


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a device sends per step by one kind of collective along some mesh axes.

    Attributes:
      overlapped: the bytes that are sent while the device computes.
      seconds: to send all bytes, at the published rate of its links.
    """

    kind: str
    axes: str
    count: int
    bytes: float
    overlapped: float
    seconds: float

    @property
    def waited(self) -> float:
        """The seconds for the bytes with nothing computed beside them: the device waits for these."""
        return self.seconds * (1 - self.overlapped / self.bytes)


def traffic_of(sent: Sequence[hlo.Collective], mesh: Mapping[str, int], topology: Topology) -> list[Traffic]:
    """Return what a step sends, by kind and axes, the most first; without collectives whose count is unknown."""
    found = []
    for (kind, axes), (count, amount) in hlo.totals(sent).items():
        hidden = [one for one in sent if one.overlapped]
        _, overlapped = hlo.totals(hidden).get((kind, axes), (0, 0.0))
        seconds = amount / rate_along(axes.split("+") if axes else list(mesh), mesh, topology)
        found.append(Traffic(kind, axes, count, amount, overlapped, seconds))
    return sorted((one for one in found if one.count), key=lambda one: -one.bytes)
