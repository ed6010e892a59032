"""error_aimed of the global Taylor backends: what it compares, what it chooses, and for how long that holds."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

import taylor_patch
from taylor_patch import config as configuration
from taylor_patch.backends.base import Fallback, expand_kv
from taylor_patch.backends.taylor import error_aimed
from taylor_patch.backends.taylor.gpu import TritonFull, TritonFused
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.backends.taylor.plain import TaylorTorch
from taylor_patch.call import AttentionCall
from taylor_patch.errors import ConfigError
from taylor_patch.guard import spread
from taylor_patch.testing.memory import peak_nbytes
from tests.taylor_oracle import dense
from tests.test_hooks import DIM, HEADS, last, qkv

ROWS = slice(None)


def make(size=0.5, n=900, heads=4, kv_heads=2, masked=False, seed=0, **fields):
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(1, heads, n, DIM, generator=gen) * size * 2
    k, v = torch.randn(1, kv_heads, n, DIM, generator=gen) * size * 2, torch.randn(1, kv_heads, n, DIM, generator=gen) + 0.5
    mask = torch.where(torch.arange(n) % 3 == 0, -torch.inf, 0.0)[None] if masked else None
    return AttentionCall(q, k, v, scale=0.25, key_mask=mask, **fields)


def backend(kind=TaylorTorch, **options):
    return kind(TaylorOptions(**{"error_aimed": True, "min_tokens": 1, **options}))


def error(out, call, rows=ROWS):
    """Relative L2 against float64 exact attention."""
    k, v = (expand_kv(x, call.q.shape[1]).double() for x in (call.k, call.v))
    logits = call.scale * call.q[:, :, rows].double() @ k.transpose(-1, -2) + (0 if call.key_mask is None else call.key_mask[:, None, None])
    exact = torch.softmax(logits, -1) @ v
    return float((out[:, :, rows] - exact).norm() / exact.norm())


CASES = {"plain": {}, "sub-heads": {"sub_head_blocks": 4}, "not centred": {"center_keys": False},
         "changed": {"qk_norm_power": 0.2, "scale_mul": 0.9}}


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_compared_is_what_the_backend_computes(case, masked):
    call, tuned = make(masked=masked), backend(**CASES[case])
    tried = error_aimed.candidates(tuned, call)
    kinds = ("taylor",) if case == "not centred" else ("taylor", "hermite")
    most = 4 if case == "sub-heads" else 3  # R of head_dim 16: 17, 153, 969
    assert [(x.options.P, x.options.coefficients) for x in tried] == [(p, kind) for p in range(2, most + 1) for kind in kinds[: p - 1]]
    found = error_aimed.errors(tried, call)
    for candidate, ours in zip(tried, found.tolist(), strict=True):
        assert ours == pytest.approx(error(dense(call, candidate.options), call, spread(900, 64, 0)), rel=1e-3)


def test_heads_compared_in_groups_give_the_same(monkeypatch):
    call, tuned = make(heads=6, kv_heads=3), backend()
    tried = error_aimed.candidates(tuned, call)
    whole = error_aimed.errors(tried, call)
    monkeypatch.setattr(error_aimed, "WORKSPACE", 5 * error_aimed._head_nbytes(call, 1))  # five heads, then one
    torch.testing.assert_close(error_aimed.errors(tried, call), whole)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", [0.005, 0.02, 0.1])
def test_what_is_chosen_meets_the_error_with_the_fewest_features(target, seed):
    chosen = set()
    for size in (0.1, 0.3, 0.6, 1.0, 2.0):
        call, tuned = make(size, seed=seed, target_error=target), backend()
        try:
            out = tuned.run(call)
        except Fallback as reason:
            assert str(reason) == "error_aimed: no P up to 3 meets the error asked for (P 4 has no fewer features than the 900 keys)"
            chosen.add(None)
            continue
        terms = error_aimed.settle(tuned, call).options.P
        chosen.add(terms)
        assert error(out, call) < target
        fewer = [error_aimed.settle(backend(P=terms - 1), call) for _ in range(terms > 2 and 1) if not misses(backend(P=terms - 1), call)]
        assert fewer == []
    assert None in chosen and len(chosen) > 1, chosen


def misses(tuned, call):
    try:
        error_aimed.settle(tuned, call)
    except Fallback:
        return True
    return False


def test_series_whose_features_are_no_fewer_than_the_keys_are_not_tried():
    def most(n):
        return error_aimed.candidates(backend(P=5), make(n=n))[-1].options.P

    assert [most(n) for n in (100, 153, 154, 969, 970, 5000)] == [2, 2, 3, 3, 4, 5]
    assert backend().reasons_against(make(n=17)) == ("error_aimed: P 2 has R = 17 features, not fewer than 17 keys",)
    assert backend().reasons_against(make(n=18)) == ()


def test_too_many_features_for_a_configured_p_are_no_reason_against_fewer():
    tuned = backend(P=6, max_feature_dim_R=200)
    assert tuned.reasons_against(make()) == () and error_aimed.candidates(tuned, make())[-1].options.P == 3
    assert "R = 17 features above max_feature_dim_R = 10" in backend(max_feature_dim_R=10).reasons_against(make())[0]


def test_bad_denominators_are_not_chosen():
    """The mean of 1 + x is negative where logits are about -10; with a limit of 1 nothing stands against it but the error."""
    call = make(1.5, target_error=100.0)
    call = dataclasses.replace(call, q=-call.q.abs(), k=call.k + 3)
    strict, lenient = (backend(P=2, center_keys=False, denom_fallback_frac_limit=limit) for limit in (0.0, 1.0))
    assert error_aimed.errors(error_aimed.candidates(strict, call), call).isinf().all()
    assert error_aimed.errors(error_aimed.candidates(lenient, call), call).isfinite().all()
    with pytest.raises(Fallback, match="no P up to 2"):
        strict.run(call)


def test_values_that_are_not_finite_are_not_chosen():
    call = make()
    call.v[0, 0, 5, 3] = torch.nan
    with pytest.raises(Fallback, match="no P up to 3"):
        backend().run(call)


@pytest.fixture
def comparisons(monkeypatch):
    """How many comparisons were made."""
    seen, errors = [], error_aimed.errors
    monkeypatch.setattr(error_aimed, "errors", lambda tried, call: seen.append(call) or errors(tried, call))
    return seen


def test_a_choice_holds_for_a_block_and_a_sigma_bin(comparisons):
    call, tuned, memo = make(0.2), backend(), {}

    def run(**place):
        tuned.run(dataclasses.replace(call, memo=memo, **{"sigma": 0.9, "block": 0, "step": 0, **place}))
        return len(comparisons)

    counts = [run(), run(), run(sigma=0.89), run(block=1), run(sigma=0.4), run(block=1), run(cond_or_uncond=(1,)), run()]
    assert counts == [1, 1, 1, 2, 3, 3, 4, 4]
    memo.clear()
    assert run() == 5, "another run"


def test_exact_is_remembered_too(comparisons):
    call, tuned = make(2.0, memo={}, sigma=0.5, block=0), backend()
    for _ in range(3):
        with pytest.raises(Fallback):
            tuned.run(call)
    assert len(comparisons) == 1


def test_without_a_place_in_a_run_every_call_is_compared(comparisons):
    for _ in range(2):
        backend().run(make(0.2))
    assert len(comparisons) == 2


def test_with_auto_tune_the_series_is_that_of_what_was_tuned(comparisons):
    tuned, memo = backend(auto_tune=True, auto_tune_candidates=3), {}
    call = make(0.2, memo=memo, sigma=0.9, block=0)
    with pytest.raises(Fallback, match="exact while it searches"):
        tuned.run(dataclasses.replace(call, step=0))
    assert comparisons == []
    out = tuned.run(dataclasses.replace(call, step=1))
    assert len(comparisons) == 1 and error(out, call) < call.target_error


def test_inputs_stay_as_they_are_and_the_log_says_what_was_found(caplog):
    caplog.set_level(logging.DEBUG, logger="taylor_patch")
    call = make(0.2, block=3, sigma=0.5, memo={})
    before = [x.clone() for x in (call.q, call.k, call.v)]
    backend().run(call)
    assert all(torch.equal(a, b) for a, b in zip(before, (call.q, call.k, call.v), strict=True))
    assert any("error_aimed: block 3, sigma 0.5: least error" in line and "0.03 asked for" in line for line in caplog.messages)


@pytest.mark.parametrize("kind", [TaylorTorch, TritonFull, TritonFused], ids=lambda kind: kind.name)
def test_workspace_is_that_of_the_largest_series_or_of_the_comparison(kind):
    call, tuned = make(), backend(kind)
    variants = tuned.variants(call)
    assert len(variants) == 3
    assert tuned.workspace_nbytes(call) == max(error_aimed.workspace_nbytes(call, 1), *(x.series_nbytes(call) for x in variants))


@pytest.mark.parametrize("options", [{}, {"sub_head_blocks": 4}, {"qk_norm_power": 0.2}, {"sub_head_blocks": 2, "center_keys": False}],
                         ids=["plain", "4 sub-heads", "changed keys", "2 sub-heads, not centred"])
def test_what_is_compared_fits_in_what_is_stated(options, monkeypatch):
    monkeypatch.setattr(error_aimed, "WORKSPACE", 4 << 20)  # groups of heads
    call, tuned = make(n=3000, heads=6, kv_heads=3), backend(**options)
    tried = error_aimed.candidates(tuned, call)
    peak = peak_nbytes(lambda: error_aimed.errors(tried, call), [call.q, call.k, call.v])
    stated = error_aimed.workspace_nbytes(call, tuned.options.sub_head_blocks)
    assert 0.7 * stated < peak <= 1.02 * stated, peak / stated


def test_a_series_that_fails_on_other_rows_is_not_tried_again(monkeypatch):
    """Its denominators are looked at on 64 rows; the whole call looks at all."""
    runs = []

    def attend(self, call):
        runs.append(self.options.P)
        raise Fallback("fraction 0.0001 of denominators not above eps, limit 0")

    monkeypatch.setattr(TaylorTorch, "attend", attend)
    tuned, call = backend(), make(0.2, memo={}, sigma=0.5, block=0)
    for _ in range(3):
        with pytest.raises(Fallback, match=r"fraction 0\.0001"):
            tuned.run(call)
    assert len(runs) == 1


def test_r_of_the_record_is_that_of_the_series():
    tuned = backend()
    tuned.run(make(0.05, target_error=0.1))
    assert tuned.denominators()["R"] == 17


def test_p_1_leaves_nothing_to_try():
    with pytest.raises(ConfigError, match="1 leaves error_aimed nothing to try"):
        layer = configuration.Layer("here", {"backends": {"taylor_torch": {"error_aimed": True, "P": 1}}})
        configuration.merge([layer], {"taylor_torch": TaylorOptions})


def test_in_a_run_each_block_has_its_own_series(comfy, configure):
    configure('[taylor_patch]\nbackend = "taylor_torch"\nquality = 0.02\n[backends.taylor_torch]\nerror_aimed = true\n')
    q, k, v = qkv()

    def model(options):
        attend = comfy.attention.optimized_attention
        for block, size in enumerate((0.02, 2.0)):
            attend(size * q, k, v, HEADS, transformer_options={**options, "block_index": block})

    comfy.sample(model, sigmas=(2.0, 1.0, 0.0))
    assert last().calls == {"taylor_torch": 2, "exact": 2}
    reason = "no P up to 3 meets the error asked for (P 4 has no fewer features than the 264 keys)"
    assert list(last().fallbacks) == [f"taylor_torch: error_aimed: {reason}"]


def test_public_function():
    call = make(0.2)
    out = taylor_patch.attention(call.q, call.k, call.v, backend="taylor_torch", scale=0.25, quality=0.02,
                                 options={"error_aimed": True, "min_tokens": 1})
    assert error(out, call) < 0.02
