"""`sage` with a stand-in for the library on the CPU, and, marked gpu, with the library."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from taylor_patch_sage import Plugin, backend

import taylor_patch
from taylor_patch.testing import conformance
from taylor_patch.testing.cases import changed, exact, make_call, relative_error


def stand_in(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    """What sageattn of 1.x asks for and does, in full precision: it subtracts the mean from the caller's own k, and counts the keys that
    are missing to a multiple of 64 as keys and values of zeros."""
    assert tensor_layout == "HND" and not is_causal and not kwargs and sm_scale is not None
    assert q.shape[-1] in (64, 96, 128) and all(x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in (q, k, v))
    if smooth_k:
        k -= k.mean(2, keepdim=True)
    k, v = (F.pad(x, (0, 0, 0, -x.shape[2] % 64)) for x in (k, v))
    call = dataclasses.replace(make_call(64, torch.float32, "cpu"), q=q, k=k, v=v, scale=sm_scale)
    return exact(call).to(q.dtype)


def stand_in_2(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    """sageattn of 2.x: any head_dim up to 128; it drops smooth_k, so that must not be passed."""
    assert tensor_layout == "HND" and not is_causal and not kwargs and sm_scale is not None and not return_lse and q.shape[-1] <= 128
    return exact(dataclasses.replace(make_call(64, torch.float32, "cpu"), q=q, k=k, v=v, scale=sm_scale)).to(q.dtype)


class SageOnCpu(backend.Sage):
    devices = frozenset({"cpu"})

    def unavailable(self):
        return ()


class OnCpu:
    """A plugin whose backend runs on the CPU."""

    @staticmethod
    @taylor_patch.hookimpl
    def taylor_patch_register_backends():
        return [SageOnCpu]


@pytest.fixture(autouse=True)
def library(request, monkeypatch):
    found = getattr(request.cls, "library", None)
    if found:
        monkeypatch.setattr(backend, "library", lambda: found)


class TestVersion1(conformance(OnCpu, "sage", keys_multiple_of=64)):
    library = backend.Library(stand_in, 1)
    test_workspace = None  # the stand-in's memory is not the library's


class TestVersion2(conformance(OnCpu, "sage")):
    library = backend.Library(stand_in_2, 2)
    test_workspace = None


TestAsInstalled = conformance("taylor_patch_sage:Plugin", "sage", device="cuda" if torch.cuda.is_available() else "cpu", max_error=0.1,
                              keys_multiple_of=64)


def test_head_dims_by_version(monkeypatch):
    call = make_call(80, torch.float16, "cpu")
    monkeypatch.setattr(backend, "library", lambda: backend.Library(stand_in, 1))
    assert "head_dim 80: SageAttention 1.x has 64, 96, 128" in backend.Sage().reasons_against(call)
    monkeypatch.setattr(backend, "library", lambda: backend.Library(stand_in_2, 2))
    assert not any("head_dim" in reason for reason in backend.Sage().reasons_against(call))


@pytest.mark.parametrize(("keys", "refused"), [(77, True), (4096, False), (4097, True), (4608, False), (32760, False)])
def test_keys_that_would_not_be_masked(keys, refused, monkeypatch):
    call = changed(make_call(64, torch.float16, "cpu"), lambda x: x[:1, :1, :1].expand(1, 1, keys, 64))
    monkeypatch.setattr(backend, "library", lambda: backend.Library(stand_in, 1))
    missing = [reason for reason in SageOnCpu().reasons_against(call) if "that are missing" in reason]
    assert missing == ([f"{keys} keys: its Triton kernels count the {-keys % 64} that are missing to a multiple of 64"] if refused else [])
    monkeypatch.setattr(backend, "library", lambda: backend.Library(stand_in_2, 2))
    assert SageOnCpu().reasons_against(call) == ()


def test_version_2_by_triton(monkeypatch):
    """SageAttention 2.x answers with the same Triton kernels on an RTX 30, with CUDA kernels on others."""
    for capability, triton in {(8, 6): True, (8, 9): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert backend.by_triton(backend.Library(stand_in_2, 2), torch.device("cuda", 0)) == triton


def test_padding_takes_no_more_than_its_share():
    call = make_call(64, torch.float32, "cpu", grid=(1, 40, 40), text=60)  # 4 of 1664 places are padding
    call = dataclasses.replace(call, q=20 * call.q)
    out = stand_in(call.q, call.k.clone(), call.v, sm_scale=call.scale)
    kept = (out.double() * exact(call)).sum(-1) / exact(call).square().sum(-1)  # what is left of each row
    assert 1 - backend.padding_share(1660) <= float(kept.min()) and float(kept.max()) < 1


def test_missing_library_and_gpu_are_reasons(monkeypatch):
    monkeypatch.setitem(sys.modules, "sageattention", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    backend.library.cache_clear()
    first, second = backend.Sage().unavailable()
    backend.library.cache_clear()
    assert "SageAttention cannot be imported" in first and second == "no CUDA GPU"


def test_too_many_values_are_refused():
    call = changed(make_call(64, torch.float16, "cpu"), lambda x: x[:1, :1].expand(1 << 11, 1 << 8, -1, -1))
    assert any("values in a tensor" in reason for reason in backend.Sage().reasons_against(call))


def test_listing_needs_no_library():
    (declaration,) = Plugin.taylor_patch_register_backends()
    assert declaration.load() is backend.Sage


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_library_on_a_gpu(head_dim):
    pytest.importorskip("sageattention")
    call = make_call(head_dim, torch.bfloat16, "cuda", heads=4, kv_heads=2, grid=(1, 64, 64), text=64)
    before = call.k.clone()
    assert relative_error(taylor_patch.attention(call.q, call.k, call.v, backend="sage", scale=call.scale), exact(call)) < 0.05
    assert torch.equal(call.k, before)


INTERPRETED = """
import torch
from sageattention.attn_qk_int8_per_block import forward
from sageattention.quant_per_block import per_block_int8
from taylor_patch_sage.backend import padding_share
from taylor_patch.testing.cases import exact, make_call, relative_error

for text, tokens in ((48, 192), (7, 151)):
    call = make_call(64, torch.float16, "cpu", text=text)
    q, q_scale, k, k_scale = per_block_int8(call.q, call.k - call.k.mean(2, keepdim=True), sm_scale=call.scale)
    error = relative_error(forward(q, k, call.v, q_scale, k_scale, output_dtype=torch.float16), exact(call))
    assert call.k.shape[2] == tokens and abs(error - padding_share(tokens)) < 0.01, (tokens, error)
"""


def test_what_the_library_does_with_missing_keys():
    """SageAttention 1.x's kernels in Triton's interpreter: right at 192 keys, too small by the share of 41 in 192 at 151."""
    pytest.importorskip("triton")
    pytest.importorskip("sageattention.quant_per_block", reason="no SageAttention 1.x")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 0, done.stderr
