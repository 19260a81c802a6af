"""The pipeline schedule: which stage works on which microbatch when, as a table made before anything is compiled.

Layers are cut into `stages * chunks` pieces, assigned round robin: stage s holds the pieces s, stages + s, ... A
microbatch goes forward through all pieces, then backward. In one tick every stage computes at most one piece forward
and one backward; what it sends, its neighbour reads in the next tick.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Bool, Int

from llm_jax.train.config import PipelineConfig

# The cost of a piece in forward passes: backward is twice the work, and recomputes the forward pass first.
FORWARD, BACKWARD = 1, 3


@dataclasses.dataclass(frozen=True)
class Work:
    """One direction: what each stage does in each tick. A microbatch of -1 means idle.

    `slot` is where the stage keeps the input of the piece, from its forward pass to its backward pass.
    """

    microbatch: Int[np.ndarray, "ticks stages"]
    chunk: Int[np.ndarray, "ticks stages"]
    slot: Int[np.ndarray, "ticks stages"]

    @property
    def busy(self) -> Bool[np.ndarray, "ticks stages"]:
        """Where a stage has something to do."""
        return self.microbatch >= 0


@dataclasses.dataclass(frozen=True)
class Timetable:
    """The schedule of `microbatches` microbatches on `stages` devices, with `chunks` pieces each.

    Raise `ValueError` for fewer microbatches than stages, or, with several chunks, not a multiple of them.
    """

    config: PipelineConfig
    stages: int
    microbatches: int

    def __post_init__(self) -> None:
        p, M, v = self.stages, self.microbatches, self.config.chunks
        if p > M or (v > 1 and M % p):
            need = f"at least {p}" if v == 1 else f"a multiple of {p}"
            raise ValueError(
                f"accumulate={M} microbatches don't fill mesh.pipeline={p} stages with pipeline.chunks={v}: "
                f"it takes {need}; use accumulate={-(-M // p) * p}"
            )

    @functools.cached_property
    def forward(self) -> Work:
        """The forward passes, and the slot where each keeps its input."""
        return self._with_slots[0]

    @functools.cached_property
    def backward(self) -> Work:
        """The backward passes, and the slot from which each reads its input."""
        return self._with_slots[1]

    @functools.cached_property
    def _with_slots(self) -> tuple[Work, Work]:
        """Both directions, every input in the first free slot."""
        forward, backward = self._directions
        slots = [np.full(work.microbatch.shape, -1) for work in (forward, backward)]
        for stage in range(self.stages):
            held: dict[tuple[int, int], int] = {}
            for tick in range(len(forward.microbatch)):
                if forward.busy[tick, stage]:
                    free = next(slot for slot in range(len(held) + 1) if slot not in held.values())
                    held[forward.microbatch[tick, stage], forward.chunk[tick, stage]] = free
                    slots[0][tick, stage] = free
                if backward.busy[tick, stage]:
                    piece = backward.microbatch[tick, stage], backward.chunk[tick, stage]
                    slots[1][tick, stage] = held.pop(piece)
        return dataclasses.replace(forward, slot=slots[0]), dataclasses.replace(backward, slot=slots[1])

    @functools.cached_property
    def _directions(self) -> tuple[Work, Work]:
        """Both directions: each stage takes its pieces in one order, each a tick after the stage before.

        Microbatches come in groups of as many as there are stages: the first group through the first chunk, then
        through the second, and so on, then the next group. The stream never pauses: when stage 0 is done with a
        group, the first of that group has just left the last stage. Backward is the mirror image; it begins when the
        first microbatch is through (1f1b), or the last (gpipe).
        """
        p, M, v = self.stages, self.microbatches, self.config.chunks
        first = p * v - 1 if self.config.schedule == "1f1b" else M * v + p - 1
        ticks, stage = np.arange(first + M * v + p - 1)[:, None], np.arange(p)[None]

        def work(position: Int[np.ndarray, "ticks stages"], last_first: bool) -> Work:
            inside = (position >= 0) & (position < M * v)
            microbatch, chunk = position // (p * v) * p + position % p, position // p % v
            chunk = v - 1 - chunk if last_first else chunk
            return Work(np.where(inside, microbatch, -1), np.where(inside, chunk, 0), np.zeros_like(position))

        return work(ticks - stage, False), work(ticks - first - (p - 1 - stage), True)

    @property
    def held(self) -> int:
        """How many inputs a stage keeps at most; in the tick of its backward pass a piece still has its own."""
        forward, backward = (work.busy for work in self._directions)
        return int((forward.cumsum(0) - backward.cumsum(0) + backward).max())

    @property
    def bubble(self) -> float:
        """The share of time in which a stage is idle, counted from the table: (p - 1) / (v M + p - 1).

        A tick takes as long as its busiest stage.
        """
        work = [(work.busy, cost) for work, cost in zip(self._directions, (FORWARD, BACKWARD), strict=True)]
        total = sum(cost * busy.any(1).sum() for busy, cost in work)
        done = sum(cost * busy.sum() for busy, cost in work)
        return float(1 - done / (self.stages * total))

    @property
    def summary(self) -> str:
        """A line on how well the stages are used."""
        pieces = "a piece" if self.config.chunks == 1 else f"{self.config.chunks} pieces"
        return (
            f"a pipeline of {self.stages} stages ({self.config.schedule}, {pieces} of the model on each), "
            f"{self.microbatches} microbatches: {self.bubble:.1%} of the time is bubble, {self.held} inputs are held"
        )

    def __str__(self) -> str:
        """Draw a line for each stage and a column for each tick: forward over backward, microbatches by number."""
        several = self.config.chunks > 1

        def cell(work: Work, tick: int, stage: int) -> str:
            if not work.busy[tick, stage]:
                return "."
            return f"{work.microbatch[tick, stage]}{'abcdefgh'[work.chunk[tick, stage]] if several else ''}"

        lines = []
        for stage in range(self.stages):
            for name, work in (("F", self.forward), ("B", self.backward)):
                cells = [cell(work, tick, stage) for tick in range(len(work.microbatch))]
                lines.append(f"stage {stage} {name} " + " ".join(f"{text:>{2 + several}}" for text in cells))
        return "\n".join(lines)
