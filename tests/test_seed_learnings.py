"""One test for each learning of the first experiment that no other test names. docs/seed-learnings.md has the whole list."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import sys
import tracemalloc
from types import ModuleType, SimpleNamespace

import pytest
import torch

from taylor_patch import guard
from taylor_patch.backends.base import Fallback
from taylor_patch.backends.taylor import plain
from taylor_patch.backends.taylor.gpu import TritonFull, TritonFused
from taylor_patch.backends.taylor.options import SEED_PRESET, TaylorOptions
from taylor_patch.backends.taylor.plain import TaylorTorch
from taylor_patch.call import AttentionCall
from taylor_patch.features.symmetric import index_chunks, multiset_count
from tests.test_hooks import HEADS, last, qkv
from tests.test_memory import Flux, estimate

TAYLOR = '[taylor_patch]\nbackend = "taylor_torch"\nquality_limit = 0\nlog = "step"\nlog_file = "log.jsonl"\n[backends.taylor_torch]\nP = 3\n'


def make(n=120, dim=16, size=0.5, **fields):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, dim, generator=g) for _ in "qkv")
    return AttentionCall(q * size, k * size, v, scale=0.25, **fields)


def backend(kind=TaylorTorch, **options):
    return kind(TaylorOptions(min_tokens=1, **options))


def run(comfy, tensors):
    return comfy.sample(lambda o: comfy.attention.optimized_attention(*tensors, HEADS, transformer_options=o), sigmas=(2.0, 1.0, 0.0))


def test_memory_is_reserved_before_the_run_and_never_freed_in_it(comfy, configure, monkeypatch):
    """free_memory in a forward pass would move weights that are in use."""
    management = ModuleType("comfy.model_management")
    management.free_memory = management.unload_all_models = lambda *_, **__: pytest.fail("called in a run")
    monkeypatch.setitem(sys.modules, "comfy.model_management", management)
    configure(TAYLOR)
    assert estimate(comfy, Flux(num_heads=4, hidden_size=256))[0] > 1000
    run(comfy, qkv())
    assert last().calls == {"taylor_torch": 2}


def test_early_probe_spares_the_full_work_where_denominators_are_bad(monkeypatch):
    call = make(size=8.0)
    bad = backend(P=2, center_keys=False)
    monkeypatch.setattr(TaylorTorch, "_series", lambda *_: pytest.fail("the full work"))
    with pytest.raises(Fallback, match="probe"):
        bad.run(dataclasses.replace(call, k=-call.q))


@pytest.mark.parametrize("denom_fp32", [True, False])
def test_denom_fp32_keeps_denominators_in_float32(denom_fp32, monkeypatch):
    """Features of float16 inputs are float16; sums kept in it are numbers of float16."""
    seen, stats = [], plain._stats
    monkeypatch.setattr(plain, "_stats", lambda found, eps: seen.extend(found) or stats(found, eps))
    call = make()
    backend(denom_fp32=denom_fp32, early_probe=False).run(dataclasses.replace(call, q=call.q.half(), k=call.k.half(), v=call.v.half()))
    assert all(torch.equal(x, x.half().float()) for x in seen) is not denom_fp32 and len(seen) == 2


def test_preset_seed_has_the_defaults_of_the_experiment():
    resolved = backend(preset="seed").options
    assert {name: getattr(resolved, name) for name in SEED_PRESET} == {**SEED_PRESET, "min_tokens": 1}
    assert TaylorOptions().min_tokens == 100 and TaylorOptions().P == 4 and TaylorOptions(preset="seed", P=3).resolved().P == 3


def test_qk_normalize_and_scale_mul_shrink_the_logits():
    call = make(size=5.0)
    effective = backend(qk_normalize=True, scale_mul=0.5).effective(call)
    assert torch.allclose(effective.q.norm(dim=-1), torch.ones(())) and torch.allclose(effective.k.norm(dim=-1), torch.ones(()))
    assert effective.scale == call.scale / 2


def test_qk_norm_clip_and_qk_norm_power_shrink_norms_without_normalising():
    call = make(size=5.0)
    clipped = backend(qk_norm_clip=15.0).effective(call).q.norm(dim=-1)
    powered = backend(qk_norm_power=0.5).effective(call).q.norm(dim=-1)
    norm = call.q.norm(dim=-1)
    assert torch.allclose(clipped, norm.clamp_max(15)) and torch.allclose(powered, norm.sqrt()) and (norm > 15).any() and (norm < 15).any()


def some_bad():
    """A call of which some denominators of 1 + x are negative, and their fraction."""
    call = make(size=3.0)
    seen = backend(P=2, center_keys=False, denom_fallback_frac_limit=1.0, early_probe=False)
    seen.run(call)
    assert 0.02 < seen.last_denominators.bad_fraction < 0.6
    return call, seen.last_denominators.bad_fraction


def test_denom_fallback_frac_limit_lets_a_fraction_pass():
    call, fraction = some_bad()
    options = {"P": 2, "center_keys": False, "early_probe": False}
    backend(**options, denom_fallback_frac_limit=fraction + 0.01).run(call)
    with pytest.raises(Fallback, match="limit"):
        backend(**options, denom_fallback_frac_limit=fraction - 0.01).run(call)


def test_early_probe_obeys_the_fraction_limit_and_logs_its_statistics(caplog):
    caplog.set_level(logging.DEBUG)
    call, _ = some_bad()
    tuned = backend(P=2, center_keys=False, denom_fallback_frac_limit=1.0)
    tuned.run(call)
    assert tuned.last_probe.count == 2 * 16 and tuned.last_probe.bad_fraction > 0
    assert any("probe:" in m and "denominators not above eps (least" in m for m in caplog.messages)
    with pytest.raises(Fallback, match="probe: fraction"):
        backend(P=2, center_keys=False).run(call)


def test_quality_raw_is_against_the_unmodified_and_quality_eff_against_the_modified():
    """Half the scale in a Taylor series that has converged: far from what the model asked for, close to what was computed."""
    call, tuned = make(), backend(P=7, scale_mul=0.5)
    found = dict(zip(guard.FIGURES, guard.figures(tuned, call, tuned.run(call), 16, 0).tolist(), strict=True))
    exact, half = (torch.softmax(call.scale * factor * call.q @ call.k.transpose(-1, -2), -1) @ call.v for factor in (1, 0.5))
    rows = guard.rows_of(call, 16, 0)
    expected = (half - exact)[:, :, rows].norm() / exact[:, :, rows].norm()
    assert found["quality_raw"] == pytest.approx(float(expected), rel=0.02) and found["quality_eff"] < 0.01 * found["quality_raw"]


def test_quality_raw_and_quality_eff_share_their_rows(monkeypatch):
    seen, exact_rows = [], guard.exact_rows
    monkeypatch.setattr(guard, "exact_rows", lambda call, rows: seen.append(rows) or exact_rows(call, rows))
    call, tuned = make(), backend(scale_mul=0.5)
    guard.figures(tuned, call, tuned.run(call), 16, 3)
    assert len(seen) == 2 and seen[0] is seen[1]


def test_step_lines_have_norms_logit_percentiles_reasons_and_max_head_dim(comfy, configure, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    configure(TAYLOR + "taylor_sigma_max = 1.5\n")
    run(comfy, [x * 0.3 for x in qkv()])
    (first, second) = (m for m in caplog.messages if "Flux: step" in m)
    assert "exact because: taylor_torch: sigma above taylor_sigma_max = 1.5: 1" in first
    assert "max_head_dim 16" in first and "quality_raw" not in first, "max_head_dim also where no call was sampled"
    for part in ("q norm", "k norm", "q.k p1", "p50", "p99", "max_head_dim 16", "quality_raw", "quality_eff"):
        assert part in second


def test_a_step_aggregates_denominators_and_quality_in_a_single_line(comfy, configure, caplog, tmp_path):
    """With two terms and no centring a denominator is 1 + scale * q.mean(k)."""
    caplog.set_level(logging.INFO)
    configure(TAYLOR.replace("P = 3", "P = 2\ncenter_keys = false\ndenom_fallback_frac_limit = 1.0"))
    inputs = [[2 * x + 0.5 for x in qkv(tokens)] for tokens in (120, 200)]

    def model(options):
        return [comfy.attention.optimized_attention(*tensors, HEADS, transformer_options=options) for tensors in inputs]

    comfy.sample(model, sigmas=(1.0, 0.0))
    parts = []
    for q, k, _ in inputs:
        q, k = (x.double().unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k))
        parts.append((1 + (q * k.mean(2, keepdim=True)).sum(-1) * q.shape[-1] ** -0.5).flatten())
    expected = torch.cat(parts)
    bad = float((expected <= 1e-6).double().mean())
    (step,) = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if '"step"' in line[:40])
    found, errors = step["denominators"], [block["figures"]["quality_raw"] for block in step["blocks"]]
    assert found["count"] == HEADS * 320 and 0 < bad < 1 and step["R"] == 17 and step["max_head_dim"] == 16 and len(errors) == 2
    assert (found["bad_fraction"], found["least"], found["greatest"], found["mean"]) == pytest.approx(
        (bad, float(expected.min()), float(expected.max()), float(expected.mean())), rel=2e-3)
    assert [block["denominators"]["count"] for block in step["blocks"]] == [HEADS * 120, HEADS * 200]
    (line,) = (m for m in caplog.messages if "Flux: step" in m)
    assert f"R 17, denominators least {expected.min():.3g}, fraction bad {bad:.3g}, max_head_dim 16" in line
    assert f"quality_raw {sum(errors) / 2:.3g} (largest {max(errors):.3g})" in line.replace("e+00", "")


def test_r_is_recorded_where_denominators_are_not_looked_at():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    call = make(n=32)
    full = backend(TritonFull, P=3, fallback_on_negative=False)
    full.run(dataclasses.replace(call, **{name: getattr(call, name).to(device) for name in "qkv"}))
    assert full.denominators() == {"R": math.comb(18, 2)}


def test_max_feature_dim_r_takes_any_size():
    call = make(n=8, dim=128)
    huge = 10**12
    assert not any("max_feature_dim_R" in reason for reason in backend(P=7, max_feature_dim_R=huge).reasons_against(call))
    assert any(f"R = {math.comb(134, 6)} features" in reason for reason in backend(P=7).reasons_against(call))


def test_five_terms_build_no_tuples_on_the_host():
    """A chunk of the 11.7 million features of degree 4 costs what a chunk costs."""
    assert multiset_count(128, 4) > 11_000_000
    tracemalloc.start()
    indices, _ = next(iter(index_chunks(128, 4, 8192, torch.device("cpu"))))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert indices.shape == (8192, 4) and peak < 1 << 20


def test_streaming_estimates_count_chunks_and_not_the_full_tensor():
    call = make(n=256, dim=64)
    sizes = [TritonFused(TaylorOptions(P=5, fused_feature_chunk_size=size, max_feature_dim_R=10**9)).workspace_nbytes(call)
             for size in (1024, 8192)]
    features = math.comb(68, 4) * 64 * 4
    assert sizes[0] < sizes[1] < features


def test_taylor_sigma_max_and_taylor_layer_start_and_end_are_gates():
    gated = backend(taylor_sigma_max=0.5, taylor_layer_start=2, taylor_layer_end=4)
    for sigma, block, reason in ((0.6, 3, "taylor_sigma_max"), (0.5, 1, "taylor_layer_start"), (0.5, 5, "taylor_layer_end")):
        with pytest.raises(Fallback, match=reason):
            gated.run(make(sigma=sigma, block=block))
    for block in (2, 3, 4):
        gated.run(make(sigma=0.5, block=block))


def test_triton_full_makes_all_features_at_once_and_triton_fused_in_chunks():
    call = SimpleNamespace(q=torch.empty(1, 2, 64, 64), k=torch.empty(1, 2, 64, 64))
    full, fused = (kind(TaylorOptions(P=4, fused_feature_chunk_size=1024)).plan(call) for kind in (TritonFull, TritonFused))
    assert [chunk.degree for chunk in full.chunks] == sorted({chunk.degree for chunk in full.chunks}) and len(fused.chunks) > len(full.chunks)
