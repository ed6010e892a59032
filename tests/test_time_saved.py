"""The estimate of time saved, totals in status(), and the collector that reads them."""

from __future__ import annotations

import json
import time

import pytest
import torch

import taylor_patch
from taylor_patch import cache
from taylor_patch.backends.near_far import NearFar
from taylor_patch.hooks.attention import replace
from taylor_patch.run import RunSummary, Totals
from taylor_patch.telemetry import saved_text
from tests.test_auto_tune import weights  # noqa: F401
from tests.test_hooks import HEADS, SPARSE, InterruptProcessingException, last, qkv

LOGGED = SPARSE.replace("[backends", 'log_file = "log.jsonl"\n[backends')


class Exact:
    """ComfyUI's attention, so slow that its time is known."""

    def __init__(self, comfy, seconds=0.05):
        self.comfy, self.seconds, self.calls = comfy, seconds, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        time.sleep(self.seconds)
        return self.comfy.original(*args, **kwargs)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """A backend that takes no time, whatever else the machine does."""
    monkeypatch.setattr(NearFar, "run", lambda self, call: call.q)


def run(comfy, exact):
    """Three steps of four calls."""
    q, k, v = qkv()
    attention = replace(exact)
    return comfy.sample(lambda o: [attention(q, k, v, HEADS, transformer_options=o) for _ in range(4)], sigmas=(3.0, 2.0, 1.0, 0.0))


def steps(tmp_path):
    return [line for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if line["kind"] == "step"]


def test_two_calls_are_timed_and_stand_for_all(comfy, configure, tmp_path):
    configure(LOGGED)
    exact = Exact(comfy)
    run(comfy, exact)
    assert exact.calls == 2 and last().calls == {"near_far": 12}
    blocks = [block for step in steps(tmp_path) for block in step["blocks"]]
    assert len({block["exact_milliseconds"] for block in blocks}) == 1 and blocks[0]["exact_milliseconds"] >= 49
    ours, theirs = (sum(block[name] for block in blocks) for name in ("milliseconds", "exact_milliseconds"))
    assert last().saved_seconds == pytest.approx((theirs - ours) / 1000, rel=1e-2) and last().saved_seconds > 0.1
    assert last().speed_up == pytest.approx(theirs / ours, rel=1e-2)
    assert sum(step["saved_milliseconds"] for step in steps(tmp_path)) == pytest.approx(theirs - ours, rel=1e-2)
    assert f"estimated {last().saved_seconds:.1f} s saved (attention {last().speed_up:.2g} times as fast as exact)" in last().line()


def test_the_inputs_of_the_timed_call_are_those_of_the_model(comfy, configure):
    configure(SPARSE)
    seen = []

    def exact(*args, **kwargs):
        seen.append((args, kwargs))
        return comfy.original(*args, **kwargs)

    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in qkv())
    attention = replace(exact)
    wishes = {"skip_reshape": True, "skip_output_reshape": True, "scale": 0.5, "low_precision_attention": True}
    comfy.sample(lambda o: attention(q, k, v, HEADS, transformer_options=o, **wishes))
    ((args, kwargs),) = seen
    assert all(a is b for a, b in zip(args, (q, k, v, HEADS), strict=True))
    assert kwargs.pop("transformer_options")["sigmas"] is not None and kwargs == {**wishes, "mask": None, "attn_precision": None}


def test_the_time_is_kept_for_the_next_run(comfy, configure, weights):  # noqa: F811
    configure(SPARSE)
    exact = Exact(comfy, 0.02)
    run(comfy, exact)
    first = last().saved_seconds
    run(comfy, exact)
    assert exact.calls == 2 and cache.kinds() == {"exact_time": 1} and 0.1 < last().saved_seconds < 2 * first
    data = json.loads(cache.path().read_text())
    data["entries"][0]["value"]["milliseconds"] = -1
    cache.path().write_text(json.dumps(data))
    run(comfy, exact)
    assert exact.calls == 4 and last().saved_seconds > 0


def test_without_a_measurement_nothing_is_claimed(comfy, configure, tmp_path):
    configure(LOGGED.replace("[backends", "quality_check = false\n[backends"))
    exact = Exact(comfy)
    run(comfy, exact)
    assert exact.calls == 0 and last().saved_seconds is None and last().speed_up is None and "estimated" not in last().line()
    assert all(step["saved_milliseconds"] is None for step in steps(tmp_path))


def test_exact_attention_that_fails_while_it_is_timed_costs_nothing(comfy, configure):
    configure(SPARSE)
    calls = []

    def exact(*args, **kwargs):
        calls.append(args)
        raise torch.OutOfMemoryError("CUDA out of memory")

    run(comfy, exact)
    assert len(calls) == 1 and last().calls == {"near_far": 12} and last().saved_seconds is None


def test_an_interrupt_while_it_is_timed_interrupts(comfy, configure):
    configure(SPARSE)

    def exact(*args, **kwargs):
        raise InterruptProcessingException("cancel")

    with pytest.raises(InterruptProcessingException):
        run(comfy, exact)


@pytest.mark.parametrize(("saved", "speed", "text"), [
    (3.14, 2.4, "estimated 3.1 s saved (attention 2.4 times as fast as exact)"),
    (-0.5, 0.8, "estimated 0.5 s lost (attention 0.8 times as fast as exact)"), (None, None, "")])
def test_a_loss_is_called_a_loss(saved, speed, text):
    assert saved_text(saved, speed) == text


def test_status_is_live(comfy, configure):
    configure(SPARSE)
    q, k, v = qkv()
    seen = []

    def body(o):
        out = comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o)
        seen.append(taylor_patch.status())
        return out

    comfy.sample(body, sigmas=(2.0, 1.0, 0.0))
    comfy.sample(body)
    now = taylor_patch.status()
    assert [state["current_run"].calls for state in seen] == [{"near_far": n} for n in (1, 2, 1)]
    assert [state["totals"].calls["near_far"] for state in seen] == [1, 2, 3] and seen[0]["totals"].runs == {"in progress": 1}
    assert now["current_run"] is None and now["totals"].runs == {"finished": 2} and now["totals"].evaluations == 3


def test_reasons_are_bounded():
    totals = Totals()
    for number in range(300):
        totals.add(RunSummary("Flux", 1, 1, {"exact": 1}, {f"reason {number}": 1}, 1.0, "finished"))
    assert len(totals.fallbacks) == Totals.REASONS + 1 and totals.fallbacks["other"] == 200 and sum(totals.fallbacks.values()) == 300


def test_the_collector(comfy, configure):
    client = pytest.importorskip("prometheus_client", reason="prometheus_client is not installed (the extra prometheus)")
    from taylor_patch.prometheus import Collector

    configure(SPARSE)
    registry = client.CollectorRegistry()
    registry.register(Collector())
    q, k, v = qkv()
    inside = []

    def body(o):
        comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o)
        comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o, low_precision_attention=False)
        inside.append((registry.get_sample_value("taylor_patch_runs_in_progress"),
                       registry.get_sample_value("taylor_patch_attention_calls_total", {"backend": "near_far"})))

    comfy.sample(body, sigmas=(2.0, 1.0, 0.0))

    def value(name, **labels):
        return registry.get_sample_value(f"taylor_patch_{name}", labels)

    assert inside == [(1, 1), (1, 2)] and value("runs_in_progress") == 0 and value("runs_total", outcome="finished") == 1
    assert value("runs_total", outcome="in progress") is None and value("evaluations_total") == 2
    assert value("exact_calls_total", reason="the model asked for full precision") == 2
    assert value("backend_seconds_total", backend="near_far") == pytest.approx(last().milliseconds["near_far"] / 1000)
    assert value("estimated_saved_seconds") == pytest.approx(last().saved_seconds)
    assert b"taylor_patch_attention_calls_total" in client.generate_latest(registry)
