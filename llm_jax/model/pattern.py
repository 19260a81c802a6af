"""Where is layer i? The one file that knows how layers are stacked.

The pattern `model.layers`, of P layers, repeats until there are `n_layers`; layer i has offset i % P in its period.
Whole periods run in a scan: parameters and taps of layer i are row i // P of what is stacked at `layers/{offset}`, or
at `layers` if P is 1. Layers after the last whole period are not stacked, and are called `layers_{i}`. In the cache,
softmax attention (keys and values), linear attention (a state) and each mixer of a user's own count their slots
separately.

    n_layers=5, layers=("delta", "global")

    layer      0          1          2          3          4
    path       layers/0   layers/1   layers/0   layers/1   layers_4
    row        0          0          1          1          None
    slot       0          0          1          1          2
"""

import collections
import dataclasses

from llm_jax.model.config import TAPS, Layer, ModelConfig


@dataclasses.dataclass(frozen=True)
class Location:
    """Where one layer is.

    Attributes:
      kind: how it mixes tokens, and whether its feed-forward is a mixture of experts.
      path: of its parameters and taps in the tree.
      row: its index along the leading N of what is at `path`; None: that is not stacked.
    """

    kind: Layer
    path: str
    row: int | None


def locate(c: ModelConfig, layer: int) -> Location:
    """Return where layer `layer` is, an index from 0 to `n_layers - 1`."""
    row, offset = divmod(layer, len(c.layers))
    kind = Layer.of(c.layers[offset])
    if layer >= n_scanned(c):
        return Location(kind, f"layers_{layer}", None)
    return Location(kind, "layers" if len(c.layers) == 1 else f"layers/{offset}", row)


def kinds_of(c: ModelConfig) -> list[str]:
    """Return the kind of every layer, as `model.layers` spells it."""
    return [c.layers[layer % len(c.layers)] for layer in range(c.n_layers)]


def n_scanned(c: ModelConfig) -> int:
    """Return how many layers the scan runs: those of whole periods."""
    return c.n_layers - c.n_layers % len(c.layers)


def n_remembering(c: ModelConfig) -> dict[str, int]:
    """Return how many layers there are of each kind of memory: `keys`, `state`, or the path of a user's own mixer."""
    return dict(collections.Counter(locate(c, layer).kind.memory for layer in range(c.n_layers)))


def layers_at(c: ModelConfig, path: str) -> list[int]:
    """Return the layers whose parameters are at `path`, by row; none if it is outside of layers."""
    return [layer for layer in range(c.n_layers) if path.startswith(f"{locate(c, layer).path}/")]


def layers_with(c: ModelConfig, tap: str) -> list[int]:
    """Return the layers that have the activation `tap`; none if it is outside of layers."""
    inside = TAPS[tap].startswith("layers/")
    return [layer for layer in range(c.n_layers) if inside and locate(c, layer).kind.has(tap)]


def rows_by_path(c: ModelConfig, tap: str) -> dict[str, list[int] | None]:
    """Return each path of the activation `tap` in the module tree, and which rows of the gathered [N ...] are there.

    N counts the layers that have it. None: it is outside of layers, and has no N.
    """
    if not TAPS[tap].startswith("layers/"):
        return {TAPS[tap]: None}
    found: dict[str, list[int]] = {}
    for row, layer in enumerate(layers_with(c, tap)):
        found.setdefault(TAPS[tap].replace("layers", locate(c, layer).path, 1), []).append(row)
    return {**found}
