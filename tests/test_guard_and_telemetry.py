"""Sampled quality, and the records that an evaluation leaves."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taylor_patch import config as configuration
from taylor_patch import engine as engines
from taylor_patch import guard, telemetry
from taylor_patch.backends.base import Backend, not_finite, note_not_finite
from taylor_patch.call import AttentionCall
from taylor_patch.run import SamplingRun, current_evaluation
from taylor_patch.telemetry import Answer, BlockRecord, Check, LogFile, StepRecord, Timer, read
from tests.test_hooks import HEADS, SPARSE, broken_backend, last, qkv


def make(n=300, m=None, heads=4, kv_heads=2, dim=16, **fields):
    q = torch.randn(2, heads, n, dim)
    k, v = (torch.randn(2, kv_heads, m or n, dim) for _ in "kv")
    return AttentionCall(q, k, v, scale=0.4, **fields)


def exact(call):
    k, v = (x.double().repeat_interleave(call.q.shape[1] // x.shape[1], 1) for x in (call.k, call.v))
    logits = call.q.double() @ k.transpose(-1, -2) * call.scale
    return torch.softmax(logits if call.key_mask is None else logits + call.key_mask[:, None, None].double(), -1) @ v


class Halved(Backend):
    """Works with half of q."""

    name = "halved"

    def effective(self, call):
        return dataclasses.replace(call, q=call.q / 2)


@pytest.mark.parametrize("masked", [False, True])
def test_figures(masked):
    mask = torch.zeros(1, 300)
    mask[:, ::3] = -math.inf
    call = make(key_mask=mask if masked else None)
    out = (exact(call) * 1.1).float()
    before = [x.clone() for x in (call.q, call.k, call.v, out)]
    found = dict(zip(guard.FIGURES, guard.figures(Backend.__new__(Halved), call, out, 16, 3).tolist(), strict=True))
    rows = guard.rows_of(call, 16, 3)
    assert found["quality_raw"] == pytest.approx(0.1, rel=1e-3)
    half = exact(dataclasses.replace(call, q=call.q / 2))[:, :, rows]
    expected = (out.double()[:, :, rows] - half).norm() / half.norm()
    assert found["quality_eff"] == pytest.approx(float(expected), rel=1e-3) and expected > 0.2
    assert found["q_norm"] == pytest.approx(float(call.q[:, :, rows].norm(dim=-1).mean()), rel=1e-5)
    assert -20 < found["logit_p01"] < found["logit_p50"] < found["logit_p99"] <= found["logit_max"]
    assert all(torch.equal(a, b) for a, b in zip((call.q, call.k, call.v, out), before, strict=True))


@given(st.integers(1, 100_000), st.integers(1, 100), st.integers(0, 10_000))
@settings(max_examples=200, deadline=None)
def test_rows_are_spread_in_range_and_of_every_column(total, count, seed):
    rows = list(range(total))[guard.spread(total, count, seed)]
    assert len(rows) == min(total, count)
    assert rows[-1] - rows[0] + 1 >= 0.5 * total * (len(rows) - 1) / len(rows), "over most of the range"
    for width in (33, 48, 64, 99, 128):
        if total >= width * 64 and count >= 16:
            assert len({row % width for row in rows}) >= 16, f"of more than a few columns of an image {width} wide"


def test_every_call_is_sampled_in_some_step():
    seen = {call for step in range(guard.EVERY_CALLS) for call in range(40) if guard.is_sampled(call, step, 1, False)}
    assert seen == set(range(40))
    assert sum(guard.is_sampled(call, 3, 1, False) for call in range(4 * guard.EVERY_CALLS)) == 4 and guard.is_sampled(17, 3, 1, True)
    assert not any(guard.is_sampled(call, step, 4, False) for call in range(40) for step in (1, 2, 3))


def test_events_are_of_the_stream_of_the_device_that_is_timed(monkeypatch):
    recorded = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            recorded.append(stream)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    Timer(torch.device("cuda:1")).stop()
    assert recorded == ["stream of cuda:1"] * 2


def test_read_pairs_figures_with_their_calls():
    def answer(name, block, figures=None):
        timer = Timer(torch.device("cpu"))
        timer.stop()
        return Answer(name, ("shape", block), block, timer, 50.0, figures)

    values = torch.arange(len(guard.FIGURES)).float()
    checks = [Check("a", ("shape", block), "odd", torch.tensor(block == 1)) for block in (0, 1)]
    reading = read([answer("a", 0), answer("a", 1, values), answer("b", 2, values + 100)], checks)
    records = [block() for block in reading.timed]
    assert [r.figures.get("quality_raw") for r in records] == [None, 0, 100] and records[2].figures["logit_max"] == 107
    assert reading.too_far == {("b", ("shape", 2), 2): 100}
    assert reading.failed == (checks[1],) and all(0 <= r.milliseconds < 1000 for r in records)
    assert read([]) == telemetry.Reading()


def test_a_record_does_not_touch_a_timer_of_the_next_evaluation():
    """Records are made while the device works on the next evaluation, whose calls may time exact attention, too."""
    class NotPassed:
        def milliseconds(self):
            raise RuntimeError("device not ready")

    exact = telemetry.ExactTime({"form": 1})
    exact.measure(lambda: None, torch.device("cpu"))
    timer = Timer(torch.device("cpu"))
    timer.stop()
    reading = read([Answer("a", ("shape", 0), 0, timer, exact=exact)])
    exact._timers.append(NotPassed())
    assert [block().exact_milliseconds for block in reading.timed] == [None]


def step_of(*denominators, saved=None):
    """A step with a call for each of `denominators`, the first of which took `saved` milliseconds less than exact attention."""
    blocks = tuple(BlockRecord("a", number, 10.0, {}, found, 10.0 + saved if saved is not None and number == 0 else None)
                   for number, found in enumerate(denominators))
    return StepRecord("Flux", 0, 1.0, 1.0, {"a": len(blocks)}, {}, 64, blocks)


def test_denominators_of_a_step_weigh_calls_by_how_many_they_have():
    few = {"R": 15, "count": 10, "bad_fraction": 0.5, "least": -1.0, "greatest": 2.0, "mean": 1.0}
    many = {"R": 5, "count": 90, "bad_fraction": 0.1, "least": 0.5, "greatest": 9.0, "mean": 3.0}
    step = step_of(few, None, many, {"R": 7})
    assert step.R == 15
    assert step.denominators == pytest.approx({"count": 100, "bad_fraction": 0.14, "least": -1, "greatest": 9, "mean": 2.8})
    assert "R 15, denominators least -1, fraction bad 0.14, max_head_dim 64" in telemetry.figures_text(step)
    for other in (step_of(None), step_of({"smallest": 1.0})):
        assert other.R is None and other.denominators is None and telemetry.figures_text(other) == "max_head_dim 64"


@pytest.mark.parametrize(("saved", "text"), [(8.7, "estimated 8.7 ms saved"), (-8.7, "estimated 8.7 ms lost")])
def test_a_step_says_saved_or_lost_and_the_configuration_in_force(configure, caplog, tmp_path, saved, text):
    written = f'log = "step"\nquality = 0.02\nlog_file = "{tmp_path}/log.jsonl"\n[backends.taylor_torch]\nP = 3\n[backends'
    configure(SPARSE.replace("[backends", written))
    caplog.set_level("INFO")
    engines.engine().record(SamplingRun(), step_of(None, saved=saved))
    (line,) = (m for m in caplog.messages if "step 0" in m)
    assert text in line and line.endswith('configuration: backend = "near_far", quality = 0.02, min_tokens = auto, near_far.density = 0.1')
    (step,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert step["settings"] == configuration.plain(engines.engine().config) and step["settings"]["backends"]["near_far"] == {"density": 0.1}
    assert step["saved_milliseconds"] == saved


def run(comfy, **kwargs):
    q, k, v = qkv()
    return comfy.sample(lambda o: [comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o) for _ in range(8)],
                        sigmas=(3.0, 2.0, 1.0, 0.0), **kwargs)


def test_the_run_has_the_error_and_the_file_every_step(comfy, configure, tmp_path, monkeypatch):
    monkeypatch.setattr(guard, "EVERY_CALLS", 8)
    configure(SPARSE.replace("[backends", f'log_file = "{tmp_path}/log.jsonl"\n[backends'))
    run(comfy)
    assert "10 calls sampled" in last().quality and last().milliseconds["near_far"] > 0
    assert "error 0." in last().line() and "near_far 24" in last().line()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "step", "step", "run"]
    assert len({line["run"] for line in lines}) == 1 and {line["version"] for line in lines} == {telemetry.SCHEMA_VERSION}
    step = lines[1]
    assert (step["model"], step["step"], step["sigma"], step["calls"], step["max_head_dim"]) == ("Flux", 1, 2.0, {"near_far": 8}, 16)
    assert [block["block"] for block in step["blocks"]] == list(range(8))
    assert [sorted(block["figures"]) for block in step["blocks"] if block["figures"]] == [sorted(guard.FIGURES)]
    assert 0 < sum(block["figures"].get("quality_raw", 0) for block in step["blocks"]) < 1
    assert lines[3]["schedule"] == [3, 2, 1, 0] and lines[3]["settings"]["taylor_patch"]["backend"] == "near_far"


@pytest.mark.parametrize(("limit", "calls"), [("2.0", {"near_far": 8, "exact": 24}), ("0", {"near_far": 24})], ids=["on", "off"])
def test_a_block_that_is_too_far_off_is_exact_in_this_step_and_from_then_on(comfy, configure, caplog, limit, calls):
    """Random q, k, v: no far field stands for them."""
    configure(SPARSE.replace("quality_limit = 0", f"quality = 0.01\nquality_limit = {limit}"))
    outs = run(comfy)
    assert last().calls == calls
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    if limit == "0":
        assert warnings == []
    else:
        assert last().fallbacks == {"near_far: error above quality_limit in this block": 24}
        assert len(warnings) == 1 and "in block 0 and 7 more is above quality_limit" in warnings[0]
        assert all(torch.equal(out, outs[0][0]) for step in outs for out in step), "exact in all steps"
        assert last().evaluations == 4 and last().quality == "", "what was not used is no error of the picture"


@pytest.mark.parametrize("samples", [1, 5, 16])
def test_quality_check_samples_is_the_number_of_rows_of_24_heads(comfy, configure, monkeypatch, samples):
    monkeypatch.setattr(guard, "FULL_HEADS", 4)
    seen, exact_rows = set(), guard.exact_rows
    monkeypatch.setattr(guard, "exact_rows", lambda call, rows: seen.add(len(range(call.q.shape[2])[rows])) or exact_rows(call, rows))
    configure(SPARSE.replace("[backends", f"quality_check_samples = {samples}\n[backends"))
    run(comfy)
    assert seen == {2 * samples}, "the model has two heads"


@pytest.mark.parametrize(("batch", "heads", "rows"), [(1, 24, 16), (1, 40, 16), (2, 24, 16), (2, 6, 32), (1, 2, 192), (2, 8, 24), (1, 13, 30)])
def test_fewer_heads_mean_more_rows(batch, heads, rows):
    q = torch.empty(batch, heads, 4096, 8, device="meta")
    assert len(range(4096)[guard.rows_of(AttentionCall(q, q, q, 1.0), 16, 0)]) == rows


@pytest.mark.parametrize("calls", [5, 19, 57, 64])
def test_the_share_of_sampled_calls_is_the_same_for_small_models(calls):
    found = sum(guard.is_sampled(call, step, 1, False) for step in range(1, 33) for call in range(calls))
    short = sum(guard.is_sampled(call, step, 1, False) for step in range(1, 17) for call in range(calls))
    assert found == calls and abs(2 * short - calls) <= 3


@pytest.mark.parametrize(("every", "sampled"), [(1, [0, 1, 2]), (2, [0, 2]), (3, [0])])
def test_quality_check_log_every_leaves_steps_out(comfy, configure, tmp_path, monkeypatch, every, sampled):
    monkeypatch.setattr(guard, "EVERY_CALLS", 1)
    configure(SPARSE.replace("[backends", f'quality_check_log_every = {every}\nlog_file = "{tmp_path}/log.jsonl"\n[backends'))
    run(comfy)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step" and any(block["figures"] for block in line["blocks"])] == sampled


def test_quality_check_off(comfy, configure):
    configure(SPARSE.replace("[backends", "quality_check = false\n[backends"))
    run(comfy)
    assert last().quality == "" and last().calls == {"near_far": 24}


def test_rows_of_later_steps_are_others():
    sampled = [(call, step) for step in range(1, 20) for call in range(1, 58) if guard.is_sampled(call, step, 1, False)]
    assert len({guard.spread(16_896, 16, guard.seed_of(*where)).start for where in sampled}) > 0.8 * len(sampled) > 20


def test_grouped_heads_are_not_repeated_and_agree():
    call = make(heads=6, kv_heads=2)
    torch.testing.assert_close(guard.exact_rows(call, slice(3, 200, 17)), exact(call)[:, :, 3:200:17].float())


def test_the_guard_is_back_in_the_next_run(comfy, configure, monkeypatch):
    configure(SPARSE)
    with monkeypatch.context() as broken:
        broken.setattr(guard, "figures", lambda *_: 1 / 0)
        run(comfy)
        assert last().quality == ""
    run(comfy)
    assert "calls sampled" in last().quality


def test_a_guard_without_memory_leaves_out_that_call_and_says_so(comfy, configure, monkeypatch, caplog):
    figures, seen = guard.figures, []

    def sometimes(*arguments):
        seen.append(arguments)
        if len(seen) in (2, 5):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return figures(*arguments)

    monkeypatch.setattr(guard, "figures", sometimes)
    configure(SPARSE)
    run(comfy)
    assert last().calls == {"near_far": 24} and last().quality.endswith("2 calls not sampled for lack of memory")
    assert f"{len(seen) - 2} calls sampled" in last().quality and "quality check" not in caplog.text


def test_each_kind_of_evaluation_is_sampled_in_full_once(comfy, configure, monkeypatch):
    """Positive and negative prompts that are evaluated one after the other: a backend may be right for one only."""
    kinds = []
    monkeypatch.setattr(guard, "is_sampled", lambda number, step, every, first: kinds.append(first))
    configure(SPARSE)
    q, k, v = qkv()

    def attend(options):
        return comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=options)

    comfy.sample(attend, sigmas=(2.0, 1.0, 0.0), prompts=([0], [1]))
    assert kinds == [True, True, False, False]


def test_threads_of_a_run_may_catch_up_together():
    current, made = SamplingRun(), []
    for _ in range(200):
        current.unrecorded.extend(partial(made.append, number) for number in range(20))
        threads = [threading.Thread(target=current.catch_up) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(made) == 4000


def test_a_record_that_is_still_to_be_made_keeps_no_tensor(comfy, configure):
    configure(SPARSE)
    q, k, v = qkv()
    held = []

    def attend(options):
        out = comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=options)
        evaluation = current_evaluation()
        held.append((evaluation, len(evaluation.answers)))
        return out

    comfy.sample(attend, sigmas=(1.0, 0.0))
    assert [count for _, count in held] == [1] and held[0][0].answers == [] and held[0][0].checks == []


def test_autocast_does_not_change_what_a_backend_computes(comfy, configure):
    configure(SPARSE)
    q, k, v = qkv()

    def attend(options):
        return comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=options)

    plain = comfy.sample(attend, sigmas=(1.0, 0.0))
    with torch.autocast("cpu", torch.bfloat16):
        cast = comfy.sample(attend, sigmas=(1.0, 0.0))
    assert last().calls == {"near_far": 1} and torch.equal(plain[0], cast[0]) and cast[0].dtype == torch.float32


def test_a_guard_that_fails_costs_one_line(comfy, configure, monkeypatch, caplog):
    configure(SPARSE)
    monkeypatch.setattr(guard, "figures", lambda *_: 1 / 0)
    run(comfy)
    assert last().calls == {"near_far": 24} and last().quality == ""
    assert len([r for r in caplog.records if "quality check failed (ZeroDivisionError" in r.getMessage()]) == 1


def test_a_log_file_that_cannot_be_written_costs_one_line(comfy, configure, tmp_path, caplog):
    configure(SPARSE.replace("[backends", f'log_file = "{tmp_path}"\n[backends'))
    run(comfy)
    assert last().calls == {"near_far": 24}
    assert len([r for r in caplog.records if "cannot be written" in r.getMessage()]) == 1


def test_the_log_file_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(telemetry, "LOG_FILE_LIMIT", 200)
    file = LogFile(tmp_path / "log.jsonl")
    for number in range(20):
        file.write("step", "r", {"number": number})
    rows = [json.loads(line)["number"] for name in ("log.jsonl.1", "log.jsonl") for line in (tmp_path / name).read_text().splitlines()]
    assert rows == list(range(rows[0], 20)) and len(rows) < 12


def test_values_that_are_not_finite_are_null(comfy, configure, tmp_path, monkeypatch):
    configure(SPARSE.replace("[backends", f'log_file = "{tmp_path}/log.jsonl"\n[backends'))
    monkeypatch.setattr(engines, "checks_later", lambda device: True)
    broken_backend(monkeypatch, lambda call: call.q * torch.nan)
    run(comfy)
    lines = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["step", "step", "step", "step", "run"]


@pytest.mark.parametrize(("settings", "calls"), [("end_percent = 0.5", {"exact": 8, "near_far": 16}),
                                                 ("start_percent = 0.4\nend_percent = 0.5", {"exact": 16, "near_far": 8})])
def test_end_percent(comfy, configure, settings, calls):
    configure(SPARSE.replace("[backends", f"{settings}\n[backends"))
    run(comfy)
    assert last().calls == calls and "after end_percent" in last().fallbacks


def test_a_kernels_word_takes_the_place_of_a_look_at_every_value():
    out = torch.ones(2, 3)
    assert not bool(not_finite(out)) and bool(not_finite(out / 0))
    for flag in (0, 1):
        note_not_finite(out, torch.tensor([float(flag)]))
        assert bool(not_finite(out)) == (flag == 1)


@pytest.mark.parametrize("tokens", [320, 327])
def test_rows_over_split_keys_are_exact_attention(monkeypatch, tokens):
    """The operator of the GPU replaced by its formula, since a CPU does not have it."""
    def flash(q, k, v, scale):
        logits = scale * q @ k.transpose(-1, -2)
        return torch.softmax(logits, -1) @ v, torch.logsumexp(logits, -1), None

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash, raising=False)
    gen = torch.Generator().manual_seed(0)
    q, k, v = (3 * torch.randn(2, 4, n, 16, generator=gen) for n in (5, tokens, tokens))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
    torch.testing.assert_close(guard._split_rows(q, k, v, 0.3), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [8192, 8199])
def test_rows_over_split_keys_are_exact_attention_on_the_gpu(monkeypatch, tokens):
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 4, 128, generator=gen, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    call, rows, used = AttentionCall(q, k, v, 0.2), slice(7, tokens, 1021), []
    original = guard._split_rows
    monkeypatch.setattr(guard, "_split_rows", lambda *arguments: used.append(original(*arguments)) or used[0])
    found = guard.exact_rows(call, rows)
    assert used
    expected = torch.softmax(0.2 * q[:, :, rows].double() @ k.double().transpose(-1, -2), -1) @ v.double()
    assert guard.relative_error(found.double(), expected) < 4e-3
