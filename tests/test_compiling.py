"""The line that says when kernels are compiled."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from taylor_patch.backends import compiling, near_far
from taylor_patch.backends.near_far import NearFar, NearFarOptions, plan
from taylor_patch.backends.taylor.gpu import TritonFull, TritonFused
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.call import AttentionCall, TokenGrid


@pytest.fixture
def lines(monkeypatch, caplog):
    """The lines so far; those that were there are gone."""
    monkeypatch.setattr(compiling, "_announced", set())
    monkeypatch.setattr(near_far, "runs_kernels", lambda device: True)
    caplog.set_level(logging.INFO, "taylor_patch")

    def found():
        shown = [record.getMessage() for record in caplog.records if "compiling" in record.getMessage()]
        caplog.clear()
        return shown

    return found


def call_of(dtype=torch.float32, heads=2, head_dim=16, grid=(1, 8, 8), masked=False):
    tokens = grid[0] * grid[1] * grid[2]
    q = torch.randn(1, heads, tokens, head_dim).to(dtype)
    return AttentionCall(q, q, q, 0.25, torch.zeros(1, tokens) if masked else None, grid=TokenGrid(*grid))


OTHERS = {"dtype": {"dtype": torch.float16}, "head_dim": {"head_dim": 32}, "mask": {"masked": True}}


LOW = TaylorOptions(P=2, fallback_on_negative=False)


@pytest.mark.parametrize("backend", [NearFar(NearFarOptions(density=0.5)), TritonFull(LOW), TritonFused(LOW)], ids=lambda backend: backend.name)
def test_one_line_for_each_kind(lines, monkeypatch, backend):
    for changed in ({}, *OTHERS.values()):
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, "is_compiling", lambda: True)
            compiling.announce(backend.name, "a graph", ())
        assert lines() == [], "while torch.compile traces"
        for _ in range(2):
            backend.run(call_of(**changed))
        (line,) = lines()
        assert line.startswith(f"taylor_patch: {backend.name}: compiling kernels for head_dim {changed.get('head_dim', 16)}, ")
        assert str(changed.get("dtype", torch.float32)).removeprefix("torch.") in line


def test_backends_are_told_apart(lines):
    compiling.announce("a", "x", 1)
    compiling.announce("b", "x", 1)
    compiling.announce("b", "x", 1)
    assert len(lines()) == 2


def test_what_makes_near_far_compile_anew():
    """Not another size of picture, nor another number of heads; but other tiles, blocks that are not full, a probe, a mask, heads in groups."""
    def kernels(aimed=False, **changed):
        return plan.of_call(call_of(**changed), aimed).kernels

    usual = kernels(grid=(1, 16, 16))
    assert usual == kernels(grid=(1, 24, 8)) == kernels(grid=(1, 16, 16), heads=5)
    others = [kernels(grid=(4, 8, 8)), kernels(grid=(1, 15, 16)), kernels(grid=(1, 16, 16), aimed=True), kernels(grid=(1, 16, 16), masked=True),
              dataclasses.replace(plan.of_call(call_of(grid=(1, 16, 16), heads=4)), heads_kv=2).kernels]
    assert len({usual, *others}) == 6
