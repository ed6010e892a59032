"""Both backends with an exact stand-in for the library on the CPU, and, marked gpu, with the library."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from taylor_patch_kitchen import Plugin, SolOptions, library
from taylor_patch_kitchen.int8 import Int8
from taylor_patch_kitchen.order import block_order
from taylor_patch_kitchen.sol import Sol, library_nbytes

import taylor_patch
from taylor_patch import config as configuration
from taylor_patch.backends.tiles import BLOCK, tile_index
from taylor_patch.testing import conformance
from taylor_patch.testing.cases import exact, make_call, relative_error


def int8_attention(q, k, v, *, scale=None, attn_mask=None):
    """What int8_attention asks for: attention with k and v in 8 bits, with one scale for all keys."""
    assert all(stride > 0 for x in (q, k, v) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    k, v = (rounded(x) for x in (k, v))
    return attention(q, k, v, scale, attn_mask)


def rounded(x):
    """x in 8 bits, with one scale for each head."""
    scale = x.abs().amax((2, 3), keepdim=True) / 127
    return (x / scale).round() * scale


def attention(q, k, v, scale, attn_mask=None):
    """Exact attention."""
    assert all(x.dim() == 4 and x.stride(-1) == 1 and x.dtype == q.dtype for x in (q, k, v)) and q.shape[1] % k.shape[1] == 0
    if attn_mask is not None:
        torch.broadcast_to(attn_mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q.double() @ k.transpose(-1, -2) * scale + (0 if attn_mask is None else attn_mask)
    return (torch.softmax(logits, -1) @ v).to(q.dtype)


def sol_attn(q, k, v, tau=1.0, scale=None, sink_blocks=None, sink_q=None, key_bias=None, topk_ratio=0.0, tail=True, block_len=None,
             coarse_gate=None, token_aug=0):
    """What sol_attn asks for, answered exactly: rows behind block_len are no keys, and come back as NaN."""
    blocks = -(-q.shape[1] // 64)
    assert q.shape == k.shape == v.shape and q.shape[-1] == 128 and q.shape[1] % 64 == 0 and 0 <= topk_ratio < 1
    assert block_len.dtype == torch.int32 and block_len.shape == (blocks,) and int(block_len.min()) >= 1
    assert sink_blocks == sink_q and 0 <= sink_blocks[0] <= sink_blocks[1] <= blocks
    live = (torch.arange(64) < block_len[:, None]).flatten()
    out = torch.full_like(q, torch.nan)
    heads_first = [x[:, live].transpose(1, 2) for x in (q, k, v)]
    out[:, live] = attention(*heads_first, scale).transpose(1, 2)
    return out


STAND_IN = SimpleNamespace(int8_attention=int8_attention, sol_attn=sol_attn, int8_attention_is_available=lambda: True,
                           sol_attn_is_available=lambda: True)


class Int8OnCpu(Int8):
    devices = frozenset({"cpu"})

    def unavailable(self):
        return ()


class SolOnCpu(Sol):
    devices = frozenset({"cpu"})

    def unavailable(self):
        return ()


class OnCpu:
    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backends():
        return [Int8OnCpu, SolOnCpu]


class StandIn:
    """Mixed into classes of tests that get the stand-in, whose memory is not the library's."""

    test_workspace = None


@pytest.fixture(autouse=True)
def replace_library(request, monkeypatch):
    if request.cls and issubclass(request.cls, StandIn):
        monkeypatch.setattr(library, "library", lambda: STAND_IN)


class TestInt8(StandIn, conformance(OnCpu, "kitchen_int8")):
    test_large_logits_are_accurate = None  # an offset of all keys takes most of 8 bits; the library is not said to subtract it


class TestSol(StandIn, conformance(OnCpu, "kitchen_sol", options={"min_tokens": 1})):
    pass


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TestInt8AsInstalled = conformance("taylor_patch_kitchen:Plugin", "kitchen_int8", device=DEVICE, max_error=0.1)
TestSolAsInstalled = conformance("taylor_patch_kitchen:Plugin", "kitchen_sol", device=DEVICE, options={"min_tokens": 1}, max_error=0.2)


@pytest.mark.parametrize(("grid", "start", "after"), [((1, 16, 16), 0, 0), ((1, 9, 17), 7, 0), ((3, 5, 7), 70, 3)],
                         ids=["even", "edge", "video"])
def test_order_keeps_tiles_together(grid, start, after):
    where = taylor_patch.TokenGrid(*grid, start=start)
    tokens = start + where.tokens + after
    order = block_order(where, tokens, torch.device("cpu"))
    assert order.outside == -(-(start + after) // BLOCK)
    assert torch.equal(order.index[order.places], torch.arange(tokens)) and len(order.places.unique()) == tokens
    tiles, filled = tile_index(where)
    for number, (tile, live) in enumerate(zip(tiles, filled, strict=True)):
        block, length = order.index.view(-1, BLOCK)[order.outside + number], int(order.length[order.outside + number])
        assert block[:length].tolist() == (tile[live] + start).tolist()


@pytest.mark.parametrize(("found", "reason"), [
    ("comfy-kitchen cannot be imported", "cannot be imported"),
    (SimpleNamespace(), "has no sol_attn that is known here; 0.2.33 has it"),
    (SimpleNamespace(sol_attn=sol_attn), "has no sol_attn that is known here; 0.2.33 has it"),
    (STAND_IN, "no CUDA GPU"),
], ids=["missing", "too-old", "0.2.32", "no-gpu"])
def test_reasons(found, reason, monkeypatch):
    monkeypatch.setattr(library, "library", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (text,) = Sol().unavailable()
    assert reason in text


def test_a_gpu_that_the_library_does_not_know(monkeypatch):
    monkeypatch.setattr(library, "library", lambda: SimpleNamespace(int8_attention=1, int8_attention_is_available=lambda: False))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Int8().unavailable() == ("comfy-kitchen has no int8_attention for this GPU",)


def test_missing_library_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    library.library.cache_clear()
    (text,) = Int8().unavailable()
    library.library.cache_clear()
    assert "pip install comfy-kitchen" in text


@pytest.mark.parametrize(("option", "value"), [("min_tokens", 0), ("topk_ratio", 1.0), ("topk_ratio", -0.1), ("token_aug", 65)])
def test_wrong_options_are_named(option, value):
    layer = configuration.Layer("file", {"backends": {"kitchen_sol": {option: value}}})
    with pytest.raises(taylor_patch.TaylorPatchError, match=rf"backends\.kitchen_sol\.{option}: {value} is "):
        configuration.merge([layer], {"kitchen_sol": SolOptions})


# Bytes that sol_attn_plan of comfy-kitchen 0.2.40 gives for (batch times heads, blocks of 64 tokens, token_aug).
@pytest.mark.parametrize(("lanes", "blocks", "token_aug", "nbytes"), [(4, 5, 0, 884832), (4, 5, 64, 1085184), (24, 265, 0, 178021392),
                                                                     (24, 265, 64, 240170112), (24, 265, 256, 242621568)])
def test_the_workspace_is_the_library_s(lanes, blocks, token_aug, nbytes):
    assert 0 <= library_nbytes(lanes, blocks, token_aug) - nbytes <= 640


@pytest.mark.parametrize("grid, tokens", [(taylor_patch.TokenGrid(1, 24, 24, 16), 600), (taylor_patch.TokenGrid(5, 9, 13, 3), 700)])
def test_blocks_are_counted_as_they_are_made(grid, tokens):
    call = taylor_patch.AttentionCall(*3 * (torch.empty(1, 1, tokens, 128),), 1.0, grid=grid)
    assert Sol._blocks(call) == len(block_order(grid, tokens, torch.device("cpu")).length)


def test_the_workspace_covers_what_an_h200_used():
    used = 2411008
    assert used <= Sol(SolOptions(min_tokens=1)).workspace_nbytes(make_call(128, torch.float16, "cpu")) <= 1.1 * used


def test_few_tokens_are_refused():
    assert any("min_tokens = 12288" in reason for reason in Sol().reasons_against(make_call(128, torch.float16, "cpu")))


def test_declarations_hold():
    assert [declaration.load() for declaration in Plugin.taylor_patch_register_backends()] == [Int8, Sol]


@pytest.mark.skipif(DEVICE == "cuda", reason="the library's own function for the CPU")
@pytest.mark.parametrize("topk_ratio", [0.0, 0.3])
def test_the_library_on_the_cpu(topk_ratio):
    """comfy-kitchen's reference form takes what we pass, and is near exact attention on smooth keys."""
    kitchen = pytest.importorskip("comfy_kitchen")
    if not hasattr(kitchen, "sol_attn"):
        pytest.skip("this comfy-kitchen has no sol_attn")
    call = make_call(128, torch.float32, "cpu", grid=(1, 17, 33), text=9)
    assert relative_error(SolOnCpu(SolOptions(min_tokens=1, topk_ratio=topk_ratio)).run(call), exact(call)) < 0.2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_places_without_a_token_are_no_keys_on_a_gpu():
    """Edge tiles are filled up with token 0; the kernels must not count it again, however large it is."""
    pytest.importorskip("comfy_kitchen")
    call = make_call(128, torch.bfloat16, "cuda", grid=(1, 100, 130), text=9)
    call.v[:, :, 0] = 20  # not more: the library keeps v in 8 bits
    call.k[:, :, 0] = 0
    assert relative_error(Sol(SolOptions(min_tokens=1)).run(call), exact(call)) < 0.3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["kitchen_int8", "kitchen_sol"])
def test_library_on_a_gpu(name):
    pytest.importorskip("comfy_kitchen")
    call = make_call(128, torch.bfloat16, "cuda", grid=(1, 128, 128), text=64)
    out = taylor_patch.attention(call.q, call.k, call.v, backend=name, grid=(1, 128, 128), text=(0, 64))
    assert relative_error(out, exact(call)) < 0.2
