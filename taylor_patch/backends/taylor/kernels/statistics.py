"""Statistics of denominators: how many are not above eps, the least, the greatest, the sum."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_stats(stats, denominator, ok, eps):
    """How many of the denominators are not above eps, the least, the greatest, the sum."""
    tl.store(stats, tl.sum((ok & ~(denominator > eps)).to(tl.float32), 0))
    tl.store(stats + 1, tl.min(tl.where(ok, denominator, float("inf")), 0))
    tl.store(stats + 2, tl.max(tl.where(ok, denominator, float("-inf")), 0))
    tl.store(stats + 3, tl.sum(tl.where(ok, denominator, 0.0), 0))


@triton.jit
def stats_kernel(stats_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """stats [n, 4] of parts -> out [4], in one program."""
    i = tl.arange(0, BLOCK)
    bad, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    least, greatest = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        ok = start + i < n
        row = stats_ptr + (start + i) * 4
        bad += tl.load(row, mask=ok, other=0.0)
        least = tl.minimum(least, tl.load(row + 1, mask=ok, other=float("inf")))
        greatest = tl.maximum(greatest, tl.load(row + 2, mask=ok, other=float("-inf")))
        total += tl.load(row + 3, mask=ok, other=0.0)
    tl.store(out_ptr, tl.sum(bad, 0))
    tl.store(out_ptr + 1, tl.min(least, 0))
    tl.store(out_ptr + 2, tl.max(greatest, 0))
    tl.store(out_ptr + 3, tl.sum(total, 0))
