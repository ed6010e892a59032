"""`taylor-patch bench`, and the crossovers that `auto` takes from it."""

from __future__ import annotations

import json
import time

import pytest
import torch
from click.testing import CliRunner

import taylor_patch
from taylor_patch import calibration
from taylor_patch import engine as engines
from taylor_patch.backends.base import Backend
from taylor_patch.backends.near_far import NearFar, NearFarOptions
from taylor_patch.backends.sdpa import Sdpa
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.backends.taylor.plain import TaylorTorch
from taylor_patch.bench import measure, shapes
from taylor_patch.call import TokenGrid
from taylor_patch.cli import main
from tests.test_cli import run

CPU = torch.device("cpu")


@pytest.mark.parametrize(("name", "size", "frames", "tokens"), [
    ("flux", (1024, 1024), 1, 4096 + 512), ("wan", (1280, 720), 81, 75600), ("wan", (832, 480), 81, 32760),
    ("hunyuan", (1280, 720), 129, 118800 + 256), ("sdxl", (1024, 1024), 1, 4096)])
def test_shapes_are_those_of_the_models(name, size, frames, tokens):
    """Recorded from ComfyUI's model classes."""
    grid = shapes.grid(shapes.FAMILIES[name], size, frames)
    assert grid.tokens + grid.start == tokens


def test_table():
    words = ["bench", "--model", "sdxl", "--seconds", "0", "--device", "cpu", "--backend", "near_far"]
    found = json.loads(run(*words, "--size", "256x256", "--json"))
    assert found["tokens"] == 256 and found["device"] == "cpu"
    exact, near_far = found["rows"]
    assert exact["backend"] == "sdpa" and exact["ratio"] == 1 and exact["error_p90"] < 1e-5
    assert near_far["backend"] == "near_far" and near_far["milliseconds"] > 0 and 0.001 < near_far["error_median"] < 0.05
    assert near_far["ratio"] == pytest.approx(exact["milliseconds"] / near_far["milliseconds"])
    small = json.loads(run(*words, "--size", "128x128", "--json"))["rows"][1]
    assert small["note"] == "fewer tokens than min_tokens = 100" and small["ratio"] is None
    assert "no backend is faster" in run(*words, "--size", "128x128")


def test_says_what_it_works_on():
    words = ["bench", "--model", "sdxl", "--seconds", "0", "--device", "cpu", "--backend", "near_far", "--size", "256x256"]
    result = CliRunner().invoke(main, words)
    assert result.stderr == "timing sdpa at 256 tokens\ntiming near_far at 256 tokens\n"


@pytest.mark.parametrize(("words", "message"), [
    (["--backend", "near_fra"], 'Did you mean "near_far"?'), (["--size", "big"], "is not like 2048x2048"),
    (["--quality", "balancd"], "balanced"),
    (["--model", "fluxx"], "flux")], ids=["backend", "size", "quality", "model"])
def test_mistakes(words, message):
    assert message in run("bench", *words, status=1 if words[0] in ("--backend", "--quality") else 2)


class Late(Backend):
    """Exact on the trained model's calls; slower than exact attention below 4,000 tokens by a wait, faster beyond."""

    name = "late"

    def run(self, call):
        if call.q.shape[3] == 128:
            return Sdpa().run(call)
        time.sleep(0.3 if call.q.shape[2] < 4000 else 0)
        return call.q


class Wrong(Backend):
    """The fastest of all."""

    name = "wrong"

    def run(self, call):
        return call.q


class Failing(Backend):
    name = "failing"

    def run(self, call):
        raise RuntimeError("kernel broke")


class Short(Backend):
    name = "short"

    def run(self, call):
        return call.q[:, :, 1:]


def test_one_that_fails_or_refuses_is_a_note():
    call = measure.shaped_call(1, 16, TokenGrid(1, 8, 8), CPU, torch.float32, 0.05)
    rows = {row.backend: row for row in measure.compare([Failing(), Short(), NearFar(), Sdpa()], call, 0, with_errors=False)}
    assert rows["failing"].note == "RuntimeError: kernel broke" and rows["failing"].ratio is None
    assert rows["short"].note.startswith("returned [1, 1, 63, 16]") and rows["short"].milliseconds is None
    assert "fewer tokens than min_tokens" in rows["near_far"].note


def test_crossovers(monkeypatch):
    monkeypatch.setattr(measure, "LADDER", (1024, 2048, 4096, 8192))
    seen = []
    found = measure.crossovers([Late(), Failing(), Wrong(), Sdpa()], 4, 64, CPU, torch.float32, 0.05, 0, seen.append)
    assert len(seen) == 4 and found["failing"] is None and found["wrong"] is None and found["late"] == seen[2] >= 4000


def test_the_router_takes_what_was_measured_here(monkeypatch):
    q, k, v = (torch.randn(1, 24, 1024, 16) for _ in range(3))

    def chosen():
        engines.reset()
        choice = taylor_patch.explain(q, k, v, grid=(1, 32, 32))
        return choice.backend.name if choice.backend else None

    assert chosen() is None
    calibration.store(CPU, {"near_far": 1000, "taylor_torch": None})
    assert chosen() == "near_far" and calibration.measured(CPU) == {"near_far": 1000, "taylor_torch": None}
    few = taylor_patch.explain(q[:, :20], k[:, :20], v[:, :20], grid=(1, 32, 32))
    assert few.backend is None and any("too few heads (20) for 1024 tokens" in reason for reason in few.reasons)
    wide = q.repeat(1, 1, 3, 1)  # 3072 queries
    for n_kv, enough in ((2048, True), (400, False), (300, False)):
        keys = torch.randn(1, 24, n_kv, 16)
        choice = taylor_patch.explain(wide, keys, keys)
        assert (choice.backend is not None) == enough
        assert enough or ("too few keys (300)" if n_kv == 300 else "cross-attention with fewer keys") in "".join(choice.reasons)
    calibration.store(torch.device("meta"), {"near_far": 5})
    assert chosen() == "near_far"
    calibration.store(CPU, {"near_far": 2000})
    assert chosen() is None
    monkeypatch.setattr(NearFar, "crossover_tokens", lambda self, device: 10)
    assert chosen() is None
    calibration.store(CPU, {"near_far": None})
    assert chosen() is None
    calibration.path().unlink()
    assert chosen() == "near_far"


@pytest.mark.parametrize("content", ["", "{", '{"version": 99}', '{"version": 1, "devices": {"cpu": {"near_far": "x"}}}', "[]"])
def test_a_broken_file_is_one_line_and_no_crossover(content, caplog):
    calibration.path().parent.mkdir(parents=True)
    calibration.path().write_text(content)
    assert calibration.measured(CPU) == {}
    assert ("is not used" in caplog.text) == (content != '{"version": 99}')
    calibration.store(CPU, {"near_far": 7})
    assert calibration.measured(CPU) == {"near_far": 7}


def test_calibrate_command(monkeypatch):
    monkeypatch.setattr(measure, "LADDER", (256,))
    found = json.loads(run("bench", "--calibrate", "--model", "sdxl", "--seconds", "0", "--device", "cpu", "--backend", "near_far", "--json"))
    assert found == {"device": "cpu", "crossovers": dict(calibration.measured(CPU))} and set(found["crossovers"]) == {"near_far"}


def test_errors_are_zero_for_exact_attention_and_grow_as_density_falls():
    calls = list(measure.trained_calls(CPU, torch.float32, 0.05, size=48))
    assert len(calls) == 5
    dense, sparse = (measure.errors(NearFar(NearFarOptions(density=density)), calls) for density in (0.5, 0.1))
    exact = measure.errors(Sdpa(), calls)
    assert exact[1] < 1e-6 < dense[0] < sparse[0] < 0.2


@pytest.mark.parametrize(("each", "seconds", "calls"), [(0.001, 0.05, range(4, 201)), (0.05, 0.02, range(2, 4)), (0.2, 0.01, [1])])
def test_a_slow_backend_is_called_a_few_times_only(each, seconds, calls):
    made = []
    found = measure.milliseconds(lambda: made.append(time.sleep(each)), torch.device("cpu"), seconds)
    assert len(made) in calls and found >= 1000 * each


def test_series_with_as_many_features_as_keys_are_not_timed_unless_they_are_named():
    call = measure.shaped_call(2, 32, TokenGrid(1, 16, 16), CPU, torch.float32, 0.03)
    backend = TaylorTorch(TaylorOptions(P=4, min_tokens=1))
    left_out, timed = (measure.compare([backend], call, 0.01, with_errors=False, all_of_them=named)[1] for named in (False, True))
    assert left_out.milliseconds is None and left_out.note.startswith("P 4 has 6,545 features for 256 keys: not timed")
    assert timed.milliseconds is not None
    assert measure.hopeless(TaylorTorch(TaylorOptions(P=2)), 32, 256) is None and measure.hopeless(Sdpa(), 32, 256) is None


def test_calibrate_takes_no_size():
    done = CliRunner().invoke(main, ["bench", "--calibrate", "--size", "512x512", "--device", "cpu"])
    assert done.exit_code == 2 and "--calibrate times lengths of its own. Leave out --size and --frames." in done.output
