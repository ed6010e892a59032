"""Options and refusals of the global Taylor backends that no other file tests."""

from __future__ import annotations

import logging

import pytest
import torch

from taylor_patch.backends.base import Fallback
from taylor_patch.backends.taylor.gpu import TritonFull, TritonFused
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.backends.taylor.plain import TaylorTorch
from taylor_patch.call import AttentionCall


def make(n=40, d=16, m=None, dtype=torch.float32):
    gen = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, count, d, generator=gen).to(dtype) * 0.5 for count in (n, m or n, m or n))
    return AttentionCall(q, k, v, d**-0.5)


def refusals(kind, call, **options):
    return [reason for reason in kind(TaylorOptions(min_tokens=1, **options)).reasons_against(call)
            if reason not in ("device cpu", "no CUDA device", "Triton is not installed")]


@pytest.mark.parametrize(("asked", "probed"), [(5, 5), (40, 40), (1000, 40)])
def test_probe_samples_are_queries_of_each_head(asked, probed):
    backend = TaylorTorch(TaylorOptions(P=3, probe_samples=asked))
    backend.run(make())
    assert backend.last_probe.count == 2 * probed and backend.last_denominators.count == 2 * 40


@pytest.mark.parametrize("kind", [TaylorTorch, TritonFull], ids=lambda kind: kind.name)
def test_allow_cross_attention(kind):
    for call, reasons in ((make(m=60), ["allow_cross_attention = false"]), (make(), [])):
        assert refusals(kind, call, P=3, allow_cross_attention=False) == reasons
        assert refusals(kind, call, P=3) == []


@pytest.mark.parametrize("on", [True, False])
def test_log_shapes(caplog, on):
    caplog.set_level(logging.DEBUG, logger="taylor_patch")
    TaylorTorch(TaylorOptions(P=2, log_shapes=on)).run(make())
    assert any("taylor_torch: q [1, 2, 40, 16], k [1, 2, 40, 16]" in line for line in caplog.messages) == on


@pytest.mark.parametrize("on", [True, False])
def test_log_fallbacks(caplog, on):
    caplog.set_level(logging.DEBUG, logger="taylor_patch")
    x = torch.ones(1, 1, 40, 4)
    with pytest.raises(Fallback, match="denominators"):
        TaylorTorch(TaylorOptions(P=2, center_keys=False, log_fallbacks=on)).run(AttentionCall(-50 * x, x, x, 0.25))  # 1 + x = -49
    assert any("taylor_torch: exact attention instead: probe: fraction" in line for line in caplog.messages) == on


@pytest.mark.parametrize("kind", [TaylorTorch, TritonFull, TritonFused], ids=lambda kind: kind.name)
def test_max_head_dim(kind):
    assert refusals(kind, make(d=48), P=3, max_head_dim=40) == ["head_dim 48 above max_head_dim = 40"]
    assert refusals(kind, make(d=48), P=3, max_head_dim=48) == []


@pytest.mark.parametrize("kind", [TaylorTorch, TritonFull, TritonFused], ids=lambda kind: kind.name)
def test_heads_that_do_not_split_evenly(kind):
    assert refusals(kind, make(d=40), P=3, sub_head_blocks=3) == ["head_dim 40 is not a multiple of sub_head_blocks = 3"]
    assert refusals(kind, make(d=48), P=3, sub_head_blocks=3) == []


def test_kernels_take_blocks_of_8_coordinates_and_more():
    for kind in (TritonFull, TritonFused):
        assert refusals(kind, make(d=16), P=3, sub_head_blocks=4) == ["block_dim 4 below 8 (head_dim 16, sub_head_blocks 4)"]
        assert refusals(kind, make(d=16), P=3, sub_head_blocks=2) == []
    assert refusals(TaylorTorch, make(d=16), P=3, sub_head_blocks=4) == []
