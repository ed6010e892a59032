"""What several kernels share: where a state's rows lie, coordinates of tokens, lead monomials, coefficients of the series."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def state_index(state, HEADS_KV: tl.constexpr, SUB: tl.constexpr):
    """State number -> batch entry, key head and sub-head block, int64."""
    state = state.to(tl.int64)
    return state // (HEADS_KV * SUB), (state // SUB) % HEADS_KV, state % SUB


@triton.jit
def coordinates(base, tokens, columns, token_ok, stride_n, stride_d, D: tl.constexpr, EVEN: tl.constexpr):
    """x [tokens, columns] in float32; zeros for tokens that are not there and coordinates of D and above."""
    ok = token_ok[:, None]
    if not EVEN:
        ok = ok & (columns < D)[None, :]
    return tl.load(base + tokens[:, None] * stride_n + columns[None, :] * stride_d, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def tile_columns(first, second):
    """16 coordinates: tile `first`, then tile `second`."""
    c = tl.arange(0, 16)
    return tl.max_contiguous(tl.multiple_of(tl.where(c < 8, first * 8 + c, second * 8 + c - 8), 8), 8)


@triton.jit
def hermite_coefficient(variance, POWER: tl.constexpr, P: tl.constexpr):
    """Hermite coefficient of x^POWER / POWER!: sum over m with POWER + 2m < P of (-variance / 2)^m / m!."""
    total = tl.full(variance.shape, 1.0, tl.float32)
    term = total
    for m in tl.static_range(1, (P - 1 - POWER) // 2 + 1):
        term = term * variance * (-0.5 / m)
        total += term
    return total


@triton.jit
def lead_monomial(base, tokens, ok, leads_ptr, lead, stride_n, stride_d, shift_ptr, root, D: tl.constexpr, DEGREE: tl.constexpr,
                  SHIFT: tl.constexpr):
    """Product over the lead monomial's coordinates of root * x - shift, [tokens] float32; root and shift as the caller has them.

    In degree 3 the lead is one coordinate and its rank; above, the table holds DEGREE - 2 coordinates a lead.
    """
    product = ok.to(tl.float32)
    for place in tl.static_range(DEGREE - 2):
        i = tl.cast(lead, tl.int32)
        if DEGREE > 3:
            i = tl.load(leads_ptr + lead * (DEGREE - 2) + place)
        column = tl.zeros_like(tokens) + i
        x = tl.load(base + tokens * stride_n + column * stride_d, mask=ok & (column < D), other=0.0).to(tl.float32) * root
        if SHIFT:
            x -= tl.load(shift_ptr + i, mask=i < D, other=0.0)
        product *= x
    return product


@triton.jit
def two_leads(base, tokens, ok, lead, stride_n, stride_d, shift_ptr, scaling, D: tl.constexpr, SHIFT: tl.constexpr):
    """Leads `lead` (even) and lead + 1 of degree 3 as [tokens, 2], each as lead_monomial has it; one load, so half the addresses."""
    two = tl.multiple_of(lead, 2) + tl.arange(0, 2)
    x = coordinates(base, tokens, two, ok, stride_n, stride_d, D, False) * scaling[:, None]
    if SHIFT:
        x -= tl.load(shift_ptr + two, mask=two < D, other=0.0)[None, :]
    return x
