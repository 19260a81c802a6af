"""The meter: counts that are right, and speeds that count training alone."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from tiny_run import tiny

from llm_jax.runs import meter as meters
from llm_jax.runs.checkpoint import Progress
from llm_jax.runs.meter import Meter


class Rows:
    """A metrics log that keeps its rows."""

    def __init__(self) -> None:
        self.written: dict[int, Mapping[str, Any]] = {}

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        assert step not in self.written
        self.written[step] = values


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(meters.time, "perf_counter", clock)
    monkeypatch.setattr(meters, "peak_flops", lambda: None)
    return clock


def metrics(tokens: int = 100, skipped: bool = False) -> dict[str, Any]:
    return {"loss": jnp.float32(2.0), "tokens": jnp.int32(tokens), "skipped": jnp.bool_(skipped)}


def meter_of(progress: Progress = Progress()) -> tuple[Meter, Rows]:
    rows = Rows()
    return Meter(tiny(Path("nowhere")), rows, progress), rows


def test_a_row_is_written_one_step_late_and_never_twice(clock: Clock):
    meter, rows = meter_of()
    meter.push(metrics())
    assert (meter.step, meter.progress.step, list(rows.written)) == (1, 0, [])
    meter.push(metrics())
    assert (meter.step, meter.progress.step, list(rows.written)) == (2, 1, [1])
    meter.write(meter.read() | {"heldout_loss": 3.0})
    assert list(rows.written) == [1, 2]
    assert rows.written[2]["heldout_loss"] == 3.0
    meter.push(metrics())
    assert list(rows.written) == [1, 2]


def test_counts_continue_from_where_the_run_stopped(clock: Clock):
    meter, _ = meter_of(Progress(step=7, tokens=700, skipped=2, skipped_in_a_row=1))
    meter.push(metrics(tokens=50, skipped=True))
    row = meter.read()
    assert meter.progress == Progress(step=8, tokens=750, skipped=3, skipped_in_a_row=2)
    assert (row["tokens"], row["skipped"]) == (750, 3)
    meter.push(metrics())
    meter.read()
    assert meter.progress.skipped_in_a_row == 0


def test_a_row_has_the_share_of_each_source_of_all_tokens_so_far(clock: Clock):
    rows = Rows()
    meter = Meter(tiny(Path("nowhere")), rows, Progress(step=7), lambda step: {"a": step / 10, "b": 1 - step / 10})
    meter.push(metrics())
    meter.write(meter.read())
    assert (rows.written[8]["share/a"], rows.written[8]["share/b"]) == (0.8, pytest.approx(0.2))


def run(meter: Meter, clock: Clock, steps: int, seconds: float = 1.0) -> None:
    for _ in range(steps):
        clock.now += seconds
        meter.push(metrics())


def test_the_first_step_of_a_process_has_no_speed_for_it_compiles(clock: Clock):
    meter, rows = meter_of()
    clock.now = 60.0
    run(meter, clock, 4)
    assert "tokens_per_second" not in rows.written[1]
    assert rows.written[2]["tokens_per_second"] == 100
    assert rows.written[2]["step_seconds"] == 1


def test_a_pause_is_in_no_speed(clock: Clock):
    meter, rows = meter_of()
    run(meter, clock, 4)
    meter.write(meter.read())
    clock.now += 1000  # evaluation, samples, a checkpoint
    meter.restart()
    run(meter, clock, 4, seconds=0.5)
    meter.write(meter.read())
    assert [rows.written[step]["tokens_per_second"] for step in (2, 3)] == [100, 100]
    assert all(rows.written[step]["tokens_per_second"] >= 100 for step in (5, 6, 7, 8))
    assert rows.written[8]["tokens_per_second"] == 200


def test_a_row_says_how_long_its_own_step_waited_for_its_batch(clock: Clock):
    def slowly(waits: list[float]) -> Iterator[Any]:
        for wait in waits:
            clock.now += wait
            yield None, wait

    meter, rows = meter_of()
    waits = [3.0, 0.0, 0.5]
    for _ in meter.timed(pair for pair in slowly(waits)):
        clock.now += 10  # the step itself
        meter.push(metrics())
    meter.write(meter.read())
    assert [rows.written[step]["data_wait"] for step in (1, 2, 3)] == waits


def test_the_share_of_the_peak_is_the_models_work_over_the_machines_best(clock: Clock, monkeypatch):
    monkeypatch.setattr(meters, "peak_flops", lambda: 1e9)
    monkeypatch.setattr(meters, "flops_per_token", lambda config, seq_len: 2_000_000)
    meter, rows = meter_of()
    run(meter, clock, 3)
    assert rows.written[2]["peak_fraction"] == pytest.approx(100 * 2e6 / 1e9)
