import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from llm_jax.log import MetricsLog, read
from llm_jax.runs.report import curves_of, loss_chart, smooth, write_report

CONFIG = {"model": {"d_model": 64, "tied": True, "pattern": [1, 2]}, "steps": 2000, "init_from": None}
ENVIRONMENT = {
    "command": "llm-jax train tiny",
    "date": "2026-11-22",
    "commit": "abc1234",
    "devices": ["cpu:0 <cpu>"],
}
VOID = {"meta", "br"}


class Page(HTMLParser):
    """A page's tags, and its text by the innermost tag; a tag that is not closed in order is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.text = [], [], {}
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.setdefault(self.open[-1] if self.open else "", []).append(data)


def row(step: int, loss: float | None = None) -> dict[str, float]:
    loss = 2 + 6 / step if loss is None else loss
    speed = {"tokens_per_second": 40_000.0, "step_seconds": 0.1}
    return {
        "loss": loss,
        "learning_rate": 1e-3,
        "grad_norm": loss / 5,
        "tokens": 4096 * step,
        "skipped": 0,
    } | speed


def run(folder: Path, rows: list[tuple[int, dict]], config: dict | None = None) -> Page:
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    with MetricsLog(folder, console=None, total_steps=2000) as log:
        for step, values in rows:
            log.write(step, values)
    return Page(write_report(folder).read_text())


def headline(page: Page) -> dict[str, tuple[str, str]]:
    """Name -> value and note."""
    bold = page.text["b"][: len(page.text["dt"])]
    return dict(zip(page.text["dt"], zip(bold, page.text["span"], strict=False), strict=True))


RUNS = {
    "nothing yet": [],
    "one step": [(1, row(1))],
    "no held-out rows": [(step, row(step)) for step in range(1, 90)],
    "every loss a NaN": [(step, row(step, math.nan)) for step in range(1, 90)],
    "some losses infinite": [(step, row(step, math.inf if step % 7 else 2.0)) for step in range(1, 90)],
    "a held-out NaN": [(1, row(1)), (1, {"heldout_loss": math.nan, "bits_per_byte": math.nan})],
    "samples only": [(1, {"samples": [{"prompt": "", "text": ""}]})],
}


@pytest.mark.parametrize("rows", RUNS.values(), ids=RUNS)
def test_every_run_gets_a_whole_page(tmp_path: Path, rows: list):
    page = run(tmp_path, rows)
    assert page.tags.count("h1") == 1
    assert page.text["h1"] == [tmp_path.name]


def test_a_folder_without_any_file_gets_a_page_too(tmp_path: Path):
    page = Page(write_report(tmp_path).read_text())
    assert page.text["p"] == ["no step yet"]
    assert "svg" not in page.tags


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path):
    page = run(tmp_path, [(1, row(1)), (1, {"samples": [{"prompt": "a", "text": "b"}]})])
    html = (tmp_path / "report.html").read_text()
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert set(re.findall(r"https?://[^\s\"']*", html)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|\son\w+=", html)
    assert "prefers-color-scheme: dark" in html


def test_what_the_model_wrote_is_text_and_not_markup(tmp_path: Path):
    sample = {"prompt": "<b>&amp;", "text": "</pre><script>alert(1)</script>\x1b[0m\x00\ud800"}
    page = run(tmp_path, [(1, row(1)), (1, {"samples": [sample]})])
    assert "script" not in page.tags
    assert page.text["mark"] == ["<b>&amp;"]
    assert page.text["pre"] == ["</pre><script>alert(1)</script>␛[0m␀\ufffd"]


def test_config_and_environment_are_text_and_not_markup(tmp_path: Path):
    page = run(tmp_path, [], {"prompts": ["<script>"], "</table>": {"<i>": "</td>"}})
    assert {"<script>", "</td>", "<i>", "cpu:0 <cpu>"} <= set(page.text["td"])


def test_the_headline_says_what_came_out_and_what_it_took(tmp_path: Path):
    rows = [(step, row(step)) for step in range(1, 2001)]
    rows += [
        (1000, {"heldout_loss": 1.9, "bits_per_byte": 0.9}),
        (2000, {"heldout_loss": 2.1, "bits_per_byte": 1.0}),
    ]
    assert headline(run(tmp_path, rows)) == {
        "training loss": ("2.0030", "smoothed"),
        "held-out loss": ("2.1000", "best 1.9000 at step 1,000"),
        "bits per byte": ("1.0000", "held out"),
        "tokens seen": ("8.19M", "8,192,000"),
        "tokens a second": ("40.0k", "median"),
        "time": ("3:20", "in training steps"),
    }


def test_skipped_steps_share_of_peak_and_waits_are_named_if_there_are_any(tmp_path: Path):
    shown = headline(run(tmp_path, [(1, row(1) | {"skipped": 3, "peak_fraction": 0.614})]))
    assert shown["skipped steps"][0] == "3"
    rows = [(step, row(step) | {"data_wait": 0.02 if step > 1 else 9.0}) for step in range(1, 101)]
    assert headline(run(tmp_path, rows))["time"] == ("0:10", "in training steps, 20% waiting for data")
    assert shown["tokens a second"][1] == "61% of peak"


def test_the_configuration_stands_as_the_command_line_takes_it(tmp_path: Path):
    page = run(tmp_path, [])
    cells = dict(zip(page.text["td"][::2], page.text["td"][1::2], strict=True))
    assert {"d_model": "64", "tied": "true", "pattern": "1,2", "init_from": "none"}.items() <= cells.items()
    assert {"run", "model", "machine"} <= set(page.text["b"])


def test_samples_go_from_the_first_to_the_last_which_stands_open(tmp_path: Path):
    page = run(
        tmp_path,
        [(step, {"samples": [{"prompt": "p", "text": f"at {step}"}]}) for step in range(10, 1010, 10)],
    )
    assert (page.text["pre"][0], page.text["pre"][-1]) == ("at 10", "at 1000")
    assert len(page.text["pre"]) == 12
    assert "12 of 100 steps; all are in metrics.jsonl." in page.text["p"]
    html = (tmp_path / "report.html").read_text()
    assert html.index("<details open>") > html.index("at 910")


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path, monkeypatch):
    run(tmp_path, [(1, row(1))])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_hundred_thousand_steps_make_a_small_picture():
    numbers = curves_of([{"step": step, "loss": 2 + 6 / step + step % 7 / 10} for step in range(1, 100_001)])
    assert len(loss_chart(numbers)) < 60_000


def test_the_loss_curve_is_complete_as_a_file(tmp_path: Path):
    run(tmp_path, [(1, row(1)), (2, row(2)), (2, {"heldout_loss": 2.5})])
    svg = ElementTree.fromstring(loss_chart(curves_of(read(tmp_path)), title="tiny <1>"))
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert svg[0].text == "tiny <1>"


def test_smoothing_keeps_the_ends_and_is_not_moved_by_wild_steps():
    steps = np.arange(1.0, 2001.0)
    values = np.where(steps % 100 == 50, 1e30, 3.0)
    x, y = smooth(steps, values)
    assert (x[0], x[-1]) == (1, 2000)
    assert np.all(y[x > 20] == 3.0)


def test_smoothing_bridges_a_lost_step_and_leaves_a_lost_stretch_open():
    values = np.ones(1000)
    values[500] = math.nan
    values[600:800] = math.nan
    x, y = smooth(np.arange(1000.0), values)
    assert np.all(np.isfinite(y[x < 600]))
    assert np.all(np.isnan(y[(x > 630) & (x < 770)]))


def test_a_run_of_a_few_steps_is_not_smoothed():
    assert np.array_equal(smooth(np.arange(5.0), np.array([5.0, 1.0, 4.0, 2.0, 3.0]))[1], [5, 1, 4, 2, 3])


def test_a_mixture_has_a_line_for_each_source_with_its_newest_numbers(tmp_path: Path):
    of_a = {"share/<a>": 0.6891, "heldout_loss/<a>": 3.0}
    rows = [(1, of_a | {"share/b": 0.3109}), (2, {"share/<a>": 0.7, "share/b": 0.3, "heldout_loss/<a>": math.nan})]
    page = run(tmp_path, rows)
    assert page.text["td"][:7] == ["share of tokens", "held-out loss", "<a>", "70.0%", "nan", "b", "30.0%"]
    assert "Sources" in page.text["h2"]
    (tmp_path / "alone").mkdir()
    assert "Sources" not in run(tmp_path / "alone", [(1, row(1))]).text["h2"]
