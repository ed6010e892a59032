"""`sage` with a stand-in for the library on the CPU, and, marked gpu, with the library."""

from __future__ import annotations

import dataclasses
import sys

import pytest
import torch
from taylor_patch_sage import Plugin, backend

import taylor_patch
from taylor_patch.testing import conformance
from taylor_patch.testing.cases import changed, exact, make_call, relative_error


def stand_in(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, smooth_k=True, **kwargs):
    """What sageattn of 1.x asks for and does, exactly: it subtracts the mean from the caller's own k."""
    assert tensor_layout == "HND" and not is_causal and not kwargs and sm_scale is not None
    assert q.shape[-1] in (64, 96, 128) and all(x.stride(-1) == 1 and x.data_ptr() % 16 == 0 for x in (q, k, v))
    if smooth_k:
        k -= k.mean(2, keepdim=True)
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


class TestVersion1(conformance(OnCpu, "sage")):
    library = backend.Library(stand_in, 1)
    test_workspace = None  # the stand-in's memory is not the library's


class TestVersion2(conformance(OnCpu, "sage")):
    library = backend.Library(stand_in_2, 2)
    test_workspace = None


TestAsInstalled = conformance("taylor_patch_sage:Plugin", "sage", device="cuda" if torch.cuda.is_available() else "cpu", max_error=0.1)


def test_head_dims_by_version(monkeypatch):
    call = make_call(80, torch.float16, "cpu")
    monkeypatch.setattr(backend, "library", lambda: backend.Library(stand_in, 1))
    assert "head_dim 80: SageAttention 1.x has 64, 96, 128" in backend.Sage().reasons_against(call)
    monkeypatch.setattr(backend, "library", lambda: backend.Library(stand_in_2, 2))
    assert not any("head_dim" in reason for reason in backend.Sage().reasons_against(call))


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
    call = make_call(head_dim, torch.bfloat16, "cuda", heads=4, kv_heads=2, grid=(1, 64, 64))
    before = call.k.clone()
    assert relative_error(taylor_patch.attention(call.q, call.k, call.v, backend="sage", scale=call.scale), exact(call)) < 0.05
    assert torch.equal(call.k, before)
