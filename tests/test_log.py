import io
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from rich.console import Console

from llm_jax import log
from llm_jax.log import MetricsLog

ROW = {"loss": 2.5, "learning_rate": 3e-4, "grad_norm": 0.41, "tokens_per_second": 38214.0, "skipped": 0}


def written(folder: Path, rows: list[tuple[int, dict]], **options) -> Path:
    with MetricsLog(folder, console=options.pop("console", None), total_steps=100, **options) as metrics:
        for step, values in rows:
            metrics.write(step, values)
    return folder / log.FILE


def piped() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=80), text


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.sampled_from([("g", 3), ("f", 2)]))
@example(0.005, 0.0050000001, ("g", 3))
@example(2.0, 2.0001, ("f", 2))
def test_numbers_that_differ_are_said_with_the_digits_that_show_it(a: float, b: float, how: tuple[str, int]):
    assume(f"{a:.19f}" != f"{b:.19f}")
    x, y = log.apart(a, b, *how)
    assert x != y
    assert (float(x), float(y)) == pytest.approx((a, b), rel=1e-2, abs=1e-2)


def test_a_killed_process_loses_no_row(tmp_path: Path):
    program = (
        "import os, signal, sys; from llm_jax.log import MetricsLog\n"
        "metrics = MetricsLog(sys.argv[1], console=None, total_steps=3).__enter__()\n"
        "for step in (1, 2, 3): metrics.write(step, {'loss': 1.0 / step})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(log.__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root)
    assert killed.returncode == -signal.SIGKILL
    assert log.read(tmp_path) == [{"step": step, "loss": 1.0 / step} for step in (1, 2, 3)]


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False)))
def test_numbers_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: list[float]):
    folder = tmp_path_factory.mktemp("run")
    written(folder, [(step, {"loss": value}) for step, value in enumerate(values)])
    assert [row["loss"].hex() for row in log.read(folder)] == [value.hex() for value in values]


def test_what_json_does_not_have_is_null_in_the_file_and_nan_when_read(tmp_path: Path):
    path = written(tmp_path, [(1, {"loss": math.nan, "grad_norm": np.float32(np.inf), "skipped": 1})])
    row = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert row == {"step": 1, "loss": None, "grad_norm": None, "skipped": 1}
    assert math.isnan(log.read(tmp_path)[0]["loss"])


def test_scalars_of_numpy_and_jax_are_written_as_plain_numbers(tmp_path: Path):
    written(tmp_path, [(1, {"a": np.float32(0.5), "b": jnp.float32(0.5), "c": jnp.int32(7), "d": np.int64(7)})])
    assert log.read(tmp_path) == [{"step": 1, "a": 0.5, "b": 0.5, "c": 7, "d": 7}]


def test_samples_are_rows_too(tmp_path: Path):
    samples = [{"prompt": "def f(", "text": "x):\n\u2028\x00\ud800"}]
    written(tmp_path, [(1, {"samples": samples})])
    assert log.read(tmp_path) == [{"step": 1, "samples": samples}]


def test_truncate_leaves_what_an_uninterrupted_run_wrote_by_that_step(tmp_path: Path):
    rows = [(1, {"loss": 2.0}), (2, {"loss": math.nan}), (2, {"heldout_loss": 0.1}), (3, {"loss": 1.0})]
    whole = written(tmp_path, rows[:3]).read_bytes()
    path = written(tmp_path, rows[3:])
    path.write_bytes(path.read_bytes() + b'{"step": 4, "lo')
    log.truncate(tmp_path, 2)
    assert path.read_bytes() == whole


def test_a_half_written_last_line_is_passed_over(tmp_path: Path):
    path = written(tmp_path, [(1, {"loss": 2.0})])
    path.write_bytes(path.read_bytes() + b'{"step": 2, "text": "\xe2\x82')
    assert log.read(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_damage_before_the_last_line_is_named(tmp_path: Path):
    path = written(tmp_path, [(1, {"loss": 2.0})])
    path.write_text('{"step": 1\n' + path.read_text())
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1 is not JSON \(.*\); delete that line, '\{\"step\": 1'"):
        log.read(tmp_path)


def test_a_truncation_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch):
    before = written(tmp_path, [(1, {"loss": 2.0}), (2, {"loss": 1.0})]).read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        log.truncate(tmp_path, 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {log.FILE: before}


def test_a_run_that_has_written_nothing_has_no_rows(tmp_path: Path):
    log.truncate(tmp_path, 5)
    assert log.read(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_a_piped_run_prints_about_twenty_lines_with_every_number(tmp_path: Path):
    console, text = piped()
    with MetricsLog(tmp_path, console=console, total_steps=1000) as metrics:
        for step in range(1, 1001):
            metrics.write(step, ROW | {"loss": 1000.0 / step / 100, "grad_norm": 20.0 / step, "peak_fraction": 0.614})
    lines = text.getvalue().splitlines()
    assert 20 <= len(lines) <= 22
    assert lines[0] == ("step     1/1,000  loss 10.0000  lr 3.00e-04  grad 20.000  38.2k tok/s  61% of peak")
    assert lines[-1].startswith("step 1,000/1,000")
    assert len({line.index("of peak") for line in lines}) == 1


def test_a_slow_piped_run_is_never_silent_for_more_than_a_minute(tmp_path: Path, monkeypatch):
    console, text = piped()
    clock = iter(range(0, 10_000, 40))
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    with MetricsLog(tmp_path, console=console, total_steps=1000) as metrics:
        for step in range(1, 6):
            metrics.write(step, ROW)
    steps = [line.split("/")[0].split()[-1] for line in text.getvalue().splitlines()]
    assert steps == ["1", "3", "5"]


def test_the_time_left_counts_the_steps_of_this_session_only(tmp_path: Path, monkeypatch):
    console, text = piped()
    clock = iter([1000, 1060])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(clock))
    with MetricsLog(tmp_path, console=console, total_steps=1000, start_step=900) as metrics:
        metrics.write(901, ROW)
        metrics.write(961, ROW)
    assert text.getvalue().splitlines()[-1].endswith("0:39 left")


def test_a_terminal_shows_a_bar_and_what_is_printed_stands_above_it(tmp_path: Path):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=80, height=24, _environ={"TERM": "xterm"})
    with MetricsLog(tmp_path, console=console, total_steps=1000) as metrics:
        metrics.write(500, ROW | {"skipped": 3})
        metrics.print("held-out loss 1.9")
    shown = text.getvalue()
    assert shown.index("held-out loss 1.9") < shown.rindex("━")
    assert "500/1,000" in shown
    assert "step" not in shown
    assert "2.5000" in shown
    assert "3\x1b[2m skipped" in shown


def test_a_sample_can_neither_steer_the_terminal_nor_be_taken_for_markup(tmp_path: Path):
    console, text = piped()
    with MetricsLog(tmp_path, console=console, total_steps=10) as metrics:
        metrics.print("\x1b[2J[bold]a[/] :smile: \x9b\ud800\n" + "x" * 100)
    assert text.getvalue() == "␛[2J[bold]a[/] :smile: \ufffd\ufffd\n" + "x" * 100 + "\n"


def test_rows_without_a_loss_print_nothing(tmp_path: Path):
    console, text = piped()
    written(tmp_path, [(1, {"heldout_loss": 2.0}), (1, {"samples": []})], console=console)
    assert text.getvalue() == ""


def test_without_a_console_nothing_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with MetricsLog(tmp_path, console=None, total_steps=1) as metrics:
        metrics.write(1, ROW)
        metrics.print("text")
    assert capsys.readouterr() == ("", "")


def test_tensorboard_gets_every_number(tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    written(tmp_path, [(5, {"loss": 2.5, "samples": []}), (6, {"loss": math.nan})], tensorboard=True)
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["tensors"] == ["loss"]
    first, second = events.Tensors("loss")
    assert (first.step, list(first.tensor_proto.float_val)) == (5, [2.5])
    assert second.step == 6
    assert math.isnan(second.tensor_proto.float_val[0])


def test_a_missing_tensorboard_is_named_with_the_line_that_installs_it(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    with pytest.raises(ValueError, match=r'pip install "llm-jax\[tensorboard\]"'):
        MetricsLog(tmp_path, console=None, total_steps=1, tensorboard=True)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (512, "512"),
        (999.6, "1.00k"),
        (38214, "38.2k"),
        (999_900, "1.00M"),
        (6.738e9, "6.74B"),
        (1.5e13, "15.0T"),
    ],
)
def test_quantities_have_three_digits(count: float, text: str):
    assert log.quantity(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(59.7, "1:00"), (42, "0:42"), (9667, "2:41:07"), (274_320, "3d 04:12")])
def test_durations_are_rounded_to_seconds(seconds: float, text: str):
    assert log.duration(seconds) == text
