"""Count and time the steps of a run, and write a row of metrics for each."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

from llm_jax.chips import peak_flops
from llm_jax.data.loader import Batch
from llm_jax.log import MetricsLog
from llm_jax.model.count import flops_per_token
from llm_jax.runs.checkpoint import Progress
from llm_jax.train.config import RunConfig
from llm_jax.train.step import Metrics

Row = dict[str, Any]

WINDOW = (
    10  # steps over which speed is measured: a CPU runs a step while it is dispatched, so single ends are uncertain
)


class Meter:
    """Metrics read one step late: the device never waits for a number that is only printed.

    `step` counts the steps dispatched, `progress` those that are done. `token_shares(step)` returns the share of each
    source of a mixture in all tokens before that step; a row has them as `share/NAME`.
    """

    def __init__(
        self,
        config: RunConfig,
        rows: MetricsLog,
        progress: Progress,
        token_shares: Callable[[int], dict[str, float]] = lambda step: {},
    ) -> None:
        self.step, self.progress = progress.step, progress
        self._rows, self._token_shares = rows, token_shares
        self._flops, self._peak = flops_per_token(config.model, config.data.seq_len), peak_flops()
        self._pending: Row | None = None
        self._wait = 0.0
        self._clock = deque[tuple[float, int]](maxlen=WINDOW + 1)  # when steps ended, and tokens until then

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield `batches`. How long a step waited for its own is `data_wait` in its row, in seconds."""
        reader = iter(batches)
        while True:
            asked = time.perf_counter()
            batch = next(reader, None)
            self._wait = time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def push(self, metrics: Metrics) -> None:
        """Take the metrics of a step just dispatched, and write the row of the step before."""
        if self._pending is not None:
            self.write(self.read())
        self._pending = {**metrics, "data_wait": self._wait}
        self.step += 1

    def read(self) -> Row:
        """Wait for the newest step, count it, and return its row."""
        assert self._pending is not None
        row: Row = {name: float(value) for name, value in jax.device_get(self._pending).items()}
        self._pending = None
        tokens, skipped = int(row["tokens"]), int(row["skipped"])
        self.progress = Progress(
            step=self.step,
            tokens=self.progress.tokens + tokens,
            skipped=self.progress.skipped + skipped,
            skipped_in_a_row=skipped * (self.progress.skipped_in_a_row + 1),
        )
        self._clock.append((time.perf_counter(), self.progress.tokens))
        row |= {f"share/{name}": share for name, share in self._token_shares(self.step).items()}
        return row | {"tokens": self.progress.tokens, "skipped": self.progress.skipped} | self._speed()

    def write(self, row: Row) -> None:
        """Write the row of the newest step that was read."""
        self._rows.write(self.progress.step, row)

    def restart(self) -> None:
        """Restart the clock, after a pause between two steps that was no training."""
        self._clock.clear()
        self._clock.append((time.perf_counter(), self.progress.tokens))

    def _speed(self) -> Row:
        """Return the speed since the last restart, over at most `WINDOW` steps, without the first, which compiles."""
        (began, before), (ended, after) = self._clock[0], self._clock[-1]
        if began == ended:
            return {}
        seconds = ended - began
        rate = (after - before) / seconds
        speed: Row = {"tokens_per_second": rate, "step_seconds": seconds / (len(self._clock) - 1)}
        if self._peak is not None:
            speed["peak_fraction"] = rate * self._flops / self._peak
        return speed
