"""report, watch and compare on a log file that a run has made."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from taylor_patch import guard
from taylor_patch.cli import main
from taylor_patch.report import charts, page, runs, watch
from tests.test_guard_and_telemetry import SPARSE, run


@pytest.fixture
def log(comfy, configure, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "EVERY_CALLS", 8)
    configure(SPARSE.replace("[backends", f'log_file = "{tmp_path}/log.jsonl"\n[backends')
              + '[[rules]]\nwhen = { layers = "3", sigma = "<=2" }\nbackend = "sdpa"\n')
    run(comfy)
    run(comfy)
    return tmp_path / "log.jsonl"


def invoke(*words, status=0):
    result = CliRunner().invoke(main, [str(word) for word in words])
    assert result.exit_code == status, result.output + str(result.exception)
    return result.output if status else result.stdout


class Checker(HTMLParser):
    """Open tags are closed in order; nothing is loaded from elsewhere."""

    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in ("rect", "line", "circle")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_has_every_part(log, tmp_path):
    assert "Wrote" in invoke("report", log, "--html", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    checker = Checker()
    checker.feed(text)
    assert checker.open == [] and checker.seen.count("svg") == 8 and "script" not in checker.seen
    for part in ("2 sampling runs", "Error of sampled calls", "Backend of each block", "Time in backends", "Logits by block",
                 "exact attention for the same calls, estimated", "times as fast as exact",
                 "backend = &quot;sdpa&quot;", "backends.near_far.density", "prefers-color-scheme: dark", 'name="viewport"'):
        assert part in text, part


def test_cells_are_what_the_log_says(log):
    newest = runs.load(log)[-1]
    assert newest.blocks == list(range(8)) and newest.fallbacks == {'backend = "sdpa"': 2}
    text = page.render([newest], "log")
    titles = re.findall(r"<title>(step \d, block \d: [^<]+)</title>", text)
    sampled = [title for title in titles if not title.endswith("near_far")]
    assert len(sampled) == len(newest.figures("quality_raw")) == 10
    assert len([title for title in titles if title.endswith("near_far")]) == 24 - 2
    assert all(f": {value:.3g}" in " ".join(sampled) for value in newest.figures("quality_raw"))


@pytest.mark.parametrize(("value", "top"), [(1, 1), (1.1, 2), (37, 40), (99, 100), (1050, 2000), (0.03, 0.04)])
def test_axes_end_at_short_numbers(value, top):
    assert charts.nice(value) == pytest.approx(top)


@pytest.mark.parametrize(("value", "text"), [(0, "0"), (0.025, "0.025"), (750, "750"), (15000, "15,000"), (-2000, "-2,000")])
def test_numbers_of_axes_have_no_exponent(value, text):
    assert charts.number(value) == text


def test_png(log, tmp_path):
    invoke("report", log, "--png", tmp_path / "r.png")
    assert len(Image.open(tmp_path / "r.png").convert("RGB").getcolors(1 << 24)) > 50


def test_watch_shows_the_newest_run(log):
    output = invoke("watch", log, "--once")
    assert "Flux: 3 model evaluations, finished" in output and "near_far" in output


@pytest.mark.parametrize(("saved", "text"), [(8.7, "8.7 ms saved"), (-8.7, "8.7 ms lost")])
def test_watch_says_saved_or_lost(log, saved, text):
    (found,) = runs.load(log)[-1:]
    found.steps[-1]["saved_milliseconds"] = saved
    console = Console(width=300, record=True)
    console.print(watch.table(found))
    assert text in console.export_text()


def test_a_run_in_progress_and_lines_that_are_no_records(log, tmp_path):
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:2], '{"version": 99}', "[1]", "cut o"]))
    (found,) = runs.load(log)
    assert len(found.steps) == 2 and found.summary == {} and "in progress" in page.render([found], "x")


@pytest.mark.parametrize("content", [None, "", '{"version": 1, "kind": "run", "run": "a"}\n'], ids=["missing", "empty", "no-step"])
def test_nothing_to_report(tmp_path, content):
    path = tmp_path / "log.jsonl"
    if content is not None:
        path.write_text(content)
    assert "log_file" in invoke("report", path, status=1)
    assert "log_file" in invoke("watch", path, "--once", status=1)


def picture(path, array):
    Image.fromarray(array.astype(np.uint8)).save(path)
    return path


def test_compare(tmp_path):
    rng = np.random.default_rng(0)
    base = rng.integers(40, 200, (40, 52, 3))
    a, b = picture(tmp_path / "a.png", base), picture(tmp_path / "b.png", base + 5)
    c = picture(tmp_path / "c.png", rng.integers(40, 200, (40, 52, 3)))
    near, far, same = (json.loads(invoke("compare", a, x, "--json")) for x in (b, c, a))
    assert near["psnr_db"] == pytest.approx(20 * np.log10(255 / 5), abs=1e-6) and near["ssim"] > 0.99
    assert far["psnr_db"] < 15 and far["ssim"] < 0.2 and same == {"psnr_db": None, "ssim": pytest.approx(1)}
    assert "PSNR inf dB" in invoke("compare", a, a)
    invoke("compare", a, b, "--difference", tmp_path / "d.png")
    assert set(np.asarray(Image.open(tmp_path / "d.png")).flatten()) == {20}


def test_compare_refuses(tmp_path):
    a, b = picture(tmp_path / "a.png", np.zeros((8, 8, 3))), picture(tmp_path / "b.png", np.zeros((8, 9, 3)))
    (tmp_path / "t.txt").write_text("no picture")
    assert "only pictures of one size" in invoke("compare", a, b, status=1)
    assert "not a picture" in invoke("compare", a, tmp_path / "t.txt", status=1)


def test_a_step_that_was_computed_again_is_marked(comfy, configure, tmp_path):
    configure(SPARSE.replace("quality_limit = 0", f'quality = 0.01\nquality_limit = 2.0\nlog_file = "{tmp_path}/log.jsonl"'))
    run(comfy)
    (found,) = runs.load(tmp_path / "log.jsonl")
    assert [step["repeated"] for step in found.steps] == [True, False, False, False]
    text = page.render([found], "log")
    assert "* not used: the step was computed again" in text and 'text-anchor="middle">0*</text>' in text
