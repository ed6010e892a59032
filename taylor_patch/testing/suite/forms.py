"""The forms in which calls come: dtypes, sizes, strides, heads, grids."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from taylor_patch.backends.base import FLOATS, Backend
from taylor_patch.call import TokenGrid
from taylor_patch.testing.cases import GRID, LAYOUTS, LONG_GRID, changed
from taylor_patch.testing.pytest_plugin import measured
from taylor_patch.testing.suite.attempt import ROUNDING
from taylor_patch.testing.suite.checks import Checks
from taylor_patch.testing.suite.subject import HEAD_DIMS, named, plain_head_dim

RAGGED = {"one token": ((1, 1, 1), 0), "63 tokens": ((1, 7, 9), 0), "100 tokens": ((1, 10, 10), 0), "a video with a text": ((3, 5, 9), 4),
          "edge tiles": ((1, 9, 17), 0)}
"""What it is -> (grid, tokens before it)."""
KEY_GRID = (1, 9, 12)
FEW_KEYS, MORE_KEYS, MANY_KEYS = 117, 261, 1101
OTHER_LAYOUTS = [layout for layout in LAYOUTS if layout != "heads first"]


class Forms(Checks):
    """Every form that is declared is right."""

    @pytest.mark.parametrize("dtype", sorted(FLOATS, key=str), ids=named)
    def test_dtypes(self, backend: Backend, dtype: torch.dtype) -> None:
        """Declared dtypes are done right, others refused; the error against exact attention is reported."""
        call = self.call(backend, dtype=dtype)
        self.both_ways(backend, call, dtype in backend.dtypes, named(dtype))
        if dtype in backend.dtypes:
            measured.setdefault(backend.name, {})[f"error {named(dtype)}"] = f"{self.check(backend, call, named(dtype)):.1e}"

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_head_dims(self, backend: Backend, head_dim: int) -> None:
        """Head dims outside head_dims are refused, those inside are right or refused with a reason."""
        call, what = self.call(backend, head_dim=head_dim), f"head_dim {head_dim}"
        self.both_ways(backend, call, head_dim in backend.head_dims and not self.refusal(backend, call, what), what)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layouts(self, backend: Backend, layout: str) -> None:
        """Any strides give the same result."""
        self.right_or_refused(backend, changed(self.call(backend), LAYOUTS[layout]), f"q, k and v {layout}")

    @pytest.mark.parametrize("layout", OTHER_LAYOUTS)
    @pytest.mark.parametrize("tensor", ("q", "k", "v"))
    def test_unlike_layouts(self, backend: Backend, tensor: str, layout: str) -> None:
        """One tensor with other strides than the other two; the declared dtypes take turns, so that each meets every layout."""
        dtypes = [dtype for dtype in ROUNDING if dtype in backend.dtypes]
        dtype = dtypes[(OTHER_LAYOUTS.index(layout) + "qkv".index(tensor)) % len(dtypes)]
        call = self.call(backend, dtype=dtype)
        other: dict[str, Any] = {tensor: LAYOUTS[layout](getattr(call, tensor))}
        self.right_or_refused(backend, dataclasses.replace(call, **other), f"{tensor} alone {layout}, {named(dtype)}")

    def test_batch_without_memory(self, backend: Backend) -> None:
        """A batch that is one entry expanded (stride 0)."""
        call = self.call(backend, batch=1)
        self.check(backend, changed(call, lambda x: x.expand(2, -1, -1, -1)), "an expanded batch")

    def test_batches_and_heads(self, backend: Backend) -> None:
        """Odd numbers of batch entries and of heads."""
        self.check(backend, self.call(backend, batch=3), "three batch entries")
        self.check(backend, self.call(backend, heads=3), "three heads")

    @pytest.mark.parametrize("size", RAGGED)
    def test_ragged_sizes(self, backend: Backend, size: str) -> None:
        """Any number of tokens is right or refused with a reason."""
        grid, text = RAGGED[size]
        self.right_or_refused(backend, self.call(backend, grid=grid, text=text), size)

    def test_long_sequences(self, backend: Backend) -> None:
        """About 1,100 queries and keys, odd numbers: more than are worked on at once."""
        call = self.call(backend, batch=1, heads=1, grid=LONG_GRID)
        self.check(backend, call, f"{call.q.shape[2]} queries and keys")
        if backend.cross_attention:
            for grid, keys in ((LONG_GRID, FEW_KEYS), (GRID, MANY_KEYS)):
                call = self.call(backend, batch=1, heads=1, grid=grid, n_kv=self.subject.keys(keys))
                self.check(backend, call, f"{call.q.shape[2]} queries and {call.k.shape[2]} keys")

    def test_scale(self, backend: Backend) -> None:
        """call.scale is used, not 1/sqrt(D)."""
        call = self.call(backend, scale=4 * plain_head_dim(backend) ** -0.5)
        self.check(backend, dataclasses.replace(call, q=call.q / 2), "a scale that is not 1/sqrt(D)")

    def test_gqa(self, backend: Backend) -> None:
        """More query heads than key heads, heads first and tokens first: right, or refused where gqa is False."""
        for heads, kv_heads in ((4, 2), (6, 2), (3, 1)):
            call = self.call(backend, heads=heads, kv_heads=kv_heads)
            for layout in ("heads first", "tokens first, [B, N, H, D]"):
                self.both_ways(backend, changed(call, LAYOUTS[layout]), backend.gqa,
                               f"grouped-query attention, {heads} heads on {kv_heads}, {layout}")

    def test_cross_attention(self, backend: Backend) -> None:
        """Fewer and more keys than queries, no grid: right, or refused where cross_attention is False; one key may be refused too."""
        for n_kv in (FEW_KEYS, MORE_KEYS):
            call = self.call(backend, n_kv=self.subject.keys(n_kv))
            self.both_ways(backend, call, backend.cross_attention, "cross-attention")
        self.right_or_refused(backend, self.call(backend, n_kv=1), "cross-attention to one key")

    @pytest.mark.parametrize("of", ("queries", "keys", "queries and keys"))
    def test_cross_attention_with_a_grid(self, backend: Backend, of: str) -> None:
        """In cross-attention grid is that of the queries, key_grid that of the keys; either may be known."""
        if not backend.cross_attention:
            pytest.skip("cross_attention is False")
        n_kv = self.subject.keys(FEW_KEYS)
        call = self.call(backend, n_kv=n_kv)
        grids = {"queries": TokenGrid(*GRID, start=call.q.shape[2] - math.prod(GRID)),
                 "keys": TokenGrid(*KEY_GRID, start=n_kv - math.prod(KEY_GRID))}
        call = dataclasses.replace(call, grid=grids["queries"] if "queries" in of else None, key_grid=grids["keys"] if "keys" in of else None)
        self.both_ways(backend, call, True, f"cross-attention with the grid of {of}")

    def test_text_after_the_grid(self, backend: Backend) -> None:
        """Other tokens behind the image's: right or refused with a reason."""
        call = self.call(backend, text=0, after=self.subject.text())
        self.right_or_refused(backend, call, f"{self.subject.text()} tokens after the grid")

    def test_without_a_grid(self, backend: Backend) -> None:
        """Where the token grid is not known: right, or refused where needs_grid is True."""
        self.both_ways(backend, dataclasses.replace(self.call(backend), grid=None), not backend.needs_grid, "no token grid")
