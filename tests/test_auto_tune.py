"""auto_tune of the global Taylor backends: what it scores, what it chooses, and what it keeps."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode

from taylor_patch import cache
from taylor_patch import config as configuration
from taylor_patch import engine as engines
from taylor_patch.backends.base import Fallback, expand_kv
from taylor_patch.backends.taylor import auto_tune
from taylor_patch.backends.taylor.gpu import TritonFull, TritonFused
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.backends.taylor.plain import TaylorTorch
from taylor_patch.call import AttentionCall
from taylor_patch.errors import ConfigError
from tests.taylor_oracle import dense
from tests.test_hooks import DIM, HEADS, last, qkv

SEARCHING = "taylor_torch: auto_tune: exact while it searches"


def make(n=300, heads=4, kv_heads=2, size=3.0, masked=False, **fields):
    q = torch.randn(1, heads, n, DIM) * size
    k, v = torch.randn(1, kv_heads, n, DIM) * size, torch.randn(1, kv_heads, n, DIM)
    mask = torch.where(torch.arange(n) % 3 == 0, -torch.inf, 0.0)[None] if masked else None
    return AttentionCall(q, k, v, scale=0.25, key_mask=mask, **fields)


def backend(kind=TaylorTorch, **options):
    return kind(TaylorOptions(auto_tune=True, min_tokens=1, **options))


def expand(call):
    heads = call.q.shape[1]
    return dataclasses.replace(call, k=expand_kv(call.k, heads), v=expand_kv(call.v, heads))


CASES = {"plain": {}, "hermite": {"coefficients": "hermite"}, "sub-heads": {"sub_head_blocks": 4}, "not centred": {"center_keys": False},
         "changed": {"qk_norm_power": 0.5, "qk_norm_clip": 6.0, "scale_mul": 0.9, "P": 3}, "normalised": {"qk_normalize": True}}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_candidates_are_scored_by_what_the_backend_computes(case, masked):
    call, options = make(size=0.7, masked=masked), TaylorOptions(min_tokens=1, fallback_on_negative=False, **CASES[case])
    out, denominators = auto_tune.polynomial(TaylorTorch(options), expand(call))
    expected = dense(call, options)
    assert (out - expected).norm() / expected.norm() < 1e-4 and denominators.shape == (1, 4, options.sub_head_blocks, 300)
    ours = TaylorTorch(dataclasses.replace(options, denom_fallback_frac_limit=1.0, fallback_on_negative=True))
    ours.run(call)
    assert float(denominators.mean()) == pytest.approx(ours.last_denominators.mean, rel=1e-3)


def error_of(call, options):
    """By float64, on all rows and keys."""
    k, v = (expand_kv(x, call.q.shape[1]).double() for x in (call.k, call.v))
    exact = torch.softmax(call.scale * call.q.double() @ k.transpose(-1, -2), -1) @ v
    return float((dense(call, options) - exact).norm() / exact.norm())


def search(tuned, calls, steps=1):
    """The backend that is chosen after `calls` in each of the first steps."""
    memo = {}
    for step in range(steps):
        for call in calls:
            with pytest.raises(Fallback, match="auto_tune"):
                tuned.run(dataclasses.replace(call, memo=memo, step=step))
    return auto_tune.settle(tuned, dataclasses.replace(calls[0], memo=memo, step=steps))


def test_the_best_candidate_is_chosen():
    """With every row and key sampled the score without a penalty is the error itself."""
    call = make(size=0.4)
    tuned = backend(P=3, scale_mul=3.0, auto_tune_quality_samples=300)
    chosen = search(tuned, [call])
    found = auto_tune.Search(tuned, dataclasses.replace(call, memo={}))
    errors = [error_of(call, candidate.options) for candidate in found._candidates]
    assert len(errors) == 9 and found._candidates[errors.index(min(errors))].options == chosen.options
    assert min(errors) < errors[0] and chosen.options.auto_tune is False
    scores = auto_tune.scores(found._candidates, call)
    assert scores.tolist() == pytest.approx(errors, rel=1e-3)


def test_denominators_that_are_not_positive_are_penalised():
    """P = 2 has 1 + x, which is negative for x below -1."""
    call = make(size=4.0)
    candidate = backend(P=2, auto_tune_quality_samples=300)
    score = float(auto_tune.scores([candidate], call)[0])
    _, denominators = auto_tune.polynomial(candidate, dataclasses.replace(expand(call)))
    bad = float((denominators <= candidate.options.eps).float().mean())
    error = min(error_of(call, candidate.options), auto_tune.WORST)
    uncentred = backend(P=2, auto_tune_quality_samples=300, center_keys=False)
    _, denominators = auto_tune.polynomial(uncentred, expand(call))
    also_bad = float((denominators <= 1e-6).float().mean())
    assert bad == 0 and score == pytest.approx(error, rel=1e-2) and also_bad > 0.05
    assert float(auto_tune.scores([uncentred], call)[0]) > auto_tune.DENOMINATOR_PENALTY * also_bad


def test_a_candidate_without_a_finite_result_is_the_worst():
    call = make(masked=True)
    call = dataclasses.replace(call, key_mask=torch.full_like(call.key_mask, -torch.inf))
    assert auto_tune.scores([backend()], call).tolist() == [auto_tune.WORST + auto_tune.DENOMINATOR_PENALTY]


@pytest.mark.parametrize("kind", [TaylorTorch, TritonFull, TritonFused], ids=lambda kind: kind.name)
def test_every_global_backend_searches_with_a_seed_and_within_the_ranges(kind):
    """Same seed, same candidates; random state is not touched."""
    call, state = make(), torch.random.get_rng_state()
    first, again, other = (search(backend(kind, auto_tune_candidates=40, auto_tune_seed=seed, scale_mul=9.0), [call]).options
                           for seed in (3, 3, 4))
    assert first == again and first.auto_tune_seed == 3
    assert [getattr(first, name) for name in auto_tune.TUNED] != [getattr(other, name) for name in auto_tune.TUNED]
    assert torch.equal(state, torch.random.get_rng_state())
    options = [candidate.options for candidate in auto_tune.Search(backend(kind, auto_tune_candidates=40), make())._candidates[1:]]
    for name, (least, most) in {"qk_norm_power": (0.2, 0.7), "qk_norm_clip": (8, 20), "scale_mul": (0.8, 1.0)}.items():
        values = [getattr(o, name) for o in options]
        assert least <= min(values) < least + 0.2 * (most - least) and most - 0.2 * (most - least) < max(values) <= most


def test_the_work_is_bounded_by_max_tokens(monkeypatch):
    seen = []
    polynomial = auto_tune.polynomial
    monkeypatch.setattr(auto_tune, "polynomial", lambda b, call: seen.append((call.q.shape[2], call.k.shape[2])) or polynomial(b, call))
    auto_tune.scores([backend(auto_tune_max_tokens=100)], make(n=3000))
    auto_tune.scores([backend()], make(n=40))
    assert seen == [(4, 100), (4, 40)]


def test_nothing_is_read_from_the_device_while_it_searches():
    """Fake tensors have no values: reading one raises."""
    with FakeTensorMode():
        call = make(masked=True)
        assert auto_tune.scores([backend(), backend(coefficients="hermite")], call).shape == (2,)
        tuned, memo = backend(), {}
        for block in range(3):
            with pytest.raises(Fallback):
                tuned.run(dataclasses.replace(call, memo=memo, step=0, block=block))
        with pytest.raises(Exception, match="_local_scalar_dense"):
            auto_tune.settle(tuned, dataclasses.replace(call, memo=memo, step=1))


def test_steps_and_gates():
    call = make()
    search(backend(auto_tune_steps=3), [call, make()], steps=3)
    tuned, memo = backend(qk_norm_sigma_max=0.5, taylor_layer_start=1), {}
    above = dataclasses.replace(call, memo=memo, step=0, sigma=0.9, block=1)
    assert auto_tune.settle(tuned, above) is tuned and memo == {}
    below = dataclasses.replace(above, step=4, sigma=0.4)
    with pytest.raises(Fallback, match="taylor_layer_start"):
        tuned.run(dataclasses.replace(below, block=0))
    assert memo == {}
    with pytest.raises(Fallback, match="auto_tune"):
        tuned.run(below)
    assert auto_tune.settle(tuned, dataclasses.replace(below, step=5)) is not tuned


@pytest.mark.parametrize("missing", [{"memo": None, "step": 0}, {"memo": {}, "step": None}], ids=["no run", "no step"])
def test_outside_a_run_the_configured_options_hold(missing):
    call = dataclasses.replace(make(size=0.3), **missing)
    assert torch.equal(backend().run(call), TaylorTorch(TaylorOptions(min_tokens=1)).run(call))


def test_shapes_are_settled_by_themselves():
    tuned, memo = backend(), {}
    for n in (100, 200):
        with pytest.raises(Fallback):
            tuned.run(dataclasses.replace(make(n=n), memo=memo, step=0))
    assert len(memo) == 2


@pytest.mark.parametrize(("key", "value", "text"), [
    ("auto_tune_steps", 0, "0 is below 1"), ("auto_tune_qk_norm_power_min", -1, "-1.0 is below 0"),
    ("auto_tune_qk_norm_clip_max", 2, "2.0 is below auto_tune_qk_norm_clip_min = 8.0"), ("auto_tune_scale_mul_min", 0, "0.0 is not above 0")])
def test_wrong_options(key, value, text):
    with pytest.raises(ConfigError, match=f"{key}: {text}"):
        configuration.merge([configuration.Layer("here", {"backends": {"taylor_torch": {key: value}}})], {"taylor_torch": TaylorOptions})


TUNE = ('[taylor_patch]\nbackend = "taylor_torch"\nquality_limit = 0\nlog_file = "log.jsonl"\n'
        "[backends.taylor_torch]\nP = 3\nscale_mul = 3.0\nauto_tune = true\n")


@pytest.fixture
def weights(monkeypatch):
    """Gives the stand-in's model the parameters that a fingerprint is made of."""
    import fake_comfy

    monkeypatch.setattr(fake_comfy.Diffusion, "named_parameters", lambda self: [("weight", torch.empty(4, 8, device="meta"))], raising=False)


def run(comfy, tensors):
    """The results of three steps of two calls."""
    attention = comfy.attention.optimized_attention
    return comfy.sample(lambda o: [attention(*tensors, HEADS, transformer_options=o) for _ in range(2)], sigmas=(3.0, 2.0, 1.0, 0.0))


def tuned_entries(data):
    return [entry for entry in data["entries"] if entry["kind"] == "auto_tune"]


def lines(caplog):
    return [r.getMessage() for r in caplog.records if "auto_tune: qk_norm_power" in r.getMessage()]


def test_auto_tune_searches_in_the_first_step_locks_the_best_in_and_remembers(comfy, configure, weights, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    configure(TUNE)
    q, k, v = (x * s for x, s in zip(qkv(), (0.4, 0.4, 1), strict=True))
    first, second, third = run(comfy, (q, k, v))
    exact = comfy.original(q, k, v, HEADS)
    assert all(torch.equal(out, exact) for out in first) and not torch.equal(second[0], exact) and torch.equal(second[0], third[1])
    assert last().calls == {"exact": 2, "taylor_torch": 4} and last().fallbacks == {SEARCHING: 2}
    assert len(lines(caplog)) == 1 and "(2 calls)" in lines(caplog)[0]
    (entry,) = tuned_entries(json.loads(cache.path().read_text()))
    assert entry["kind"] == "auto_tune" and entry["key"]["model"].startswith("Flux-") and set(entry["value"]) == {*auto_tune.TUNED, "score"}
    chosen = TaylorTorch(TaylorOptions(P=3, **{name: entry["value"][name] for name in auto_tune.TUNED}))
    call = AttentionCall(*(x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v)), scale=DIM**-0.5)
    torch.testing.assert_close(second[0], chosen.run(call).transpose(1, 2).flatten(2))

    again = run(comfy, (q, k, v))
    assert last().calls == {"taylor_torch": 6} and torch.equal(again[0][0], second[0]) and len(lines(caplog)) == 1
    blocks = [json.loads(line)["blocks"] for line in (tmp_path / "log.jsonl").read_text().splitlines() if '"step"' in line]
    figures = blocks[1][0]["figures"]
    assert figures["quality_eff"] < figures["quality_raw"], "measured against the q, k that the search chose"


@pytest.mark.parametrize("damage", [{"scale_mul": -1}, {"qk_norm_power": "much"}, {"qk_norm_clip": None}], ids=str)
def test_kept_values_that_cannot_be_used_are_settled_anew(comfy, configure, weights, damage):
    configure(TUNE)
    tensors = qkv()
    run(comfy, tensors)
    data = json.loads(cache.path().read_text())
    tuned_entries(data)[0]["value"].update(damage)
    cache.path().write_text(json.dumps(data))
    run(comfy, tensors)
    assert last().fallbacks == {SEARCHING: 2}


def test_other_options_are_settled_by_themselves(comfy, configure, weights):
    configure(TUNE)
    tensors = qkv()
    run(comfy, tensors)
    configure(TUNE + "auto_tune_seed = 5\n")
    run(comfy, tensors)
    assert last().fallbacks == {SEARCHING: 2} and cache.kinds()["auto_tune"] == 2


def test_a_model_without_a_fingerprint_is_settled_in_every_run(comfy, configure):
    configure(TUNE)
    q, k, v = qkv()
    for _ in range(2):
        comfy.sample(lambda o: comfy.attention.optimized_attention(q, k, v, HEADS, transformer_options=o), sigmas=(2.0, 1.0, 0.0))
        assert last().fallbacks == {SEARCHING: 1}
    assert not cache.path().exists() and engines.current().last_run.calls["taylor_torch"] == 1
