"""The timetable of a pipeline: all is done once and in order, and what it says of itself is so."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_jax.train.timetable import PipelineConfig, Timetable, Work

STAGES = st.integers(2, 6)


@st.composite
def timetables(draw: Any, schedules: tuple[str, ...] = ("gpipe", "1f1b")) -> Timetable:
    p, v = draw(STAGES), draw(st.integers(1, 4))
    M = draw(st.integers(p, 4 * p)) if v == 1 else p * draw(st.integers(1, 4))
    return Timetable(PipelineConfig(draw(st.sampled_from(schedules)), v), p, M)


def done(table: Timetable, work: Work) -> Iterator[tuple[int, int, int, int]]:
    """(microbatch, piece of the model, tick, slot) of everything in one direction."""
    for tick, stage in np.argwhere(work.busy).tolist():
        piece = int(work.chunk[tick, stage]) * table.stages + stage
        yield int(work.microbatch[tick, stage]), piece, tick, int(work.slot[tick, stage])


@given(timetables())
def test_each_microbatch_goes_forward_and_backward_once_through_each_piece(table: Timetable):
    expected = [(i, j) for i in range(table.microbatches) for j in range(table.stages * table.config.chunks)]
    for work in (table.forward, table.backward):
        assert sorted((i, j) for i, j, _, _ in done(table, work)) == expected


@given(timetables())
def test_what_a_stage_sends_is_what_its_neighbour_reads_in_the_next_tick(table: Timetable):
    """So nothing that has arrived ever waits: the executor keeps one activation and one gradient."""
    ahead = {(i, j): tick for i, j, tick, _ in done(table, table.forward)}
    back = {(i, j): tick for i, j, tick, _ in done(table, table.backward)}
    last = table.stages * table.config.chunks - 1
    for i, j in ahead:
        if j < last:
            assert ahead[i, j + 1] == ahead[i, j] + 1
            assert back[i, j] == back[i, j + 1] + 1
    assert all(back[i, last] >= ahead[i, last] for i in range(table.microbatches))


@given(timetables())
def test_an_input_stays_in_its_slot_until_it_is_read_again(table: Timetable):
    back = {(i, j): (tick, slot) for i, j, tick, slot in done(table, table.backward)}
    taken: dict[tuple[int, int], int] = {}  # (stage, slot) -> until when
    for i, j, tick, slot in sorted(done(table, table.forward), key=lambda row: row[2]):
        until, same = back[i, j]
        assert same == slot < table.held
        assert taken.get((j % table.stages, slot), -1) < tick
        taken[j % table.stages, slot] = until


@given(timetables())
def test_the_bubble_is_that_of_the_formula(table: Timetable):
    p, M, v = table.stages, table.microbatches, table.config.chunks
    assert table.bubble == pytest.approx((p - 1) / (v * M + p - 1))


@given(timetables(schedules=("1f1b",)))
def test_1f1b_holds_the_same_however_many_microbatches_there_are(table: Timetable):
    p, v = table.stages, table.config.chunks
    assert table.held == min(p * (v + 1) - 1, v * table.microbatches)


@given(timetables(schedules=("gpipe",)))
def test_gpipe_holds_every_input(table: Timetable):
    assert table.held == table.config.chunks * table.microbatches


def test_a_timetable_is_drawn_a_line_for_each_stage_and_direction():
    assert str(Timetable(PipelineConfig(), 2, 3)).splitlines() == [
        "stage 0 F  0  1  2  .  .",
        "stage 0 B  .  .  0  1  2",
        "stage 1 F  .  0  1  2  .",
        "stage 1 B  .  0  1  2  .",
    ]


@pytest.mark.parametrize(
    ("chunks", "microbatches", "message"),
    [
        (1, 3, "accumulate=3 .*mesh.pipeline=4 .*at least 4; use accumulate=4"),
        (2, 6, "accumulate=6 .*pipeline.chunks=2.*a multiple of 4; use accumulate=8"),
    ],
)
def test_microbatches_that_do_not_fill_the_stages_are_refused(chunks: int, microbatches: int, message: str):
    with pytest.raises(ValueError, match=message):
        Timetable(PipelineConfig("1f1b", chunks), 4, microbatches)
    with pytest.raises(ValueError, match=r"pipeline.chunks=0"):
        PipelineConfig(chunks=0)
