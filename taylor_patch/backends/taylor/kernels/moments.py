"""Degrees 0 and 1: sums of keys, of values and of their products over the keys."""

from __future__ import annotations

import triton
import triton.language as tl

from taylor_patch.backends.taylor.kernels.features import coordinates, state_index


@triton.jit
def moments_kernel(k_ptr, v_ptr, factor_ptr, weight_ptr, out_ptr, n_keys, per_split, root, states, first_state,
                   k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, weight_sb,
                   HEADS_KV: tl.constexpr, SUB: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
                   V_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
                   HAS_FACTOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over one share of the keys, x = root * factor * k: out [splits, states, D + 1, DV + 1] float32 holds
    sum w x v', sum w x (last column), sum w v (last row) and sum w (corner)."""
    rows_id, local, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, head, sub = state_index(first_state + local, HEADS_KV, SUB)
    k_base = k_ptr + b * k_sb + head * k_sh + sub * D * k_sd
    v_base = v_ptr + b * v_sb + head * v_sh + (sub * D + V_FIRST) * v_sd
    r = rows_id * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, DV_PAD)
    t = tl.arange(0, BLOCK_N)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    sum_x = tl.zeros([ROWS], tl.float32)
    sum_v = tl.zeros([DV_PAD], tl.float32)
    mass = tl.zeros([BLOCK_N], tl.float32)
    begin, end = split * per_split, tl.minimum((split + 1) * per_split, n_keys)
    tl.assume(begin < end)
    for start in range(begin, end, BLOCK_N):
        first = tl.cast(start, tl.int64)
        ok = start + t < n_keys
        x = coordinates(k_base + first * k_sn, t, r, ok, k_sn, k_sd, D, False) * root
        v = tl.load(v_base + first * v_sn + t[:, None] * v_sn + c[None, :] * v_sd, mask=ok[:, None] & (c < DV)[None, :], other=0.0)
        w = ok.to(tl.float32)
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + b * weight_sb + first + t, mask=ok, other=0.0)
        if HAS_FACTOR:
            x *= tl.load(factor_ptr + (b * HEADS_KV + head) * n_keys + first + t, mask=ok, other=0.0)[:, None]
        x *= w[:, None]
        sum_x += tl.sum(x, 0)
        sum_v += tl.sum(v.to(tl.float32) * w[:, None], 0)
        mass += w
        acc = tl.dot(tl.trans(x.to(DTYPE)), v.to(DTYPE), acc, input_precision=PRECISION)
    out = out_ptr + (split.to(tl.int64) * states + local) * (D + 1) * (DV + 1)
    tl.store(out + r[:, None] * (DV + 1) + c[None, :], acc, mask=(r < D)[:, None] & (c < DV)[None, :])
    tl.store(out + r * (DV + 1) + DV, sum_x, mask=r < D)
    if rows_id == 0:
        tl.store(out + D * (DV + 1) + c, sum_v, mask=c < DV)
        tl.store(out + D * (DV + 1) + DV, tl.sum(mass, 0))


@triton.jit
def moments_finish_kernel(sums_ptr, norm_ptr, mean_ptr, constant_ptr, linear_ptr, z_linear_ptr, splits, ratio,
                          D: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr, CENTER: tl.constexpr):
    """Shares of moments_kernel added and divided by the sum of weights: norm [states] = 1 / sum w, mean [states, D] of x,
    constant [states, DV] = mean of v, linear [states, D, DV] = ratio * mean of x v' (x centred with CENTER), z_linear = ratio * mean."""
    rows_id, state = tl.program_id(0), tl.program_id(1)
    r = rows_id * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, DV_PAD)
    linear = tl.zeros([ROWS, DV_PAD], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    constant = tl.zeros([DV_PAD], tl.float32)
    mass = tl.sum(mean, 0)
    for split in range(splits):
        part = sums_ptr + (tl.cast(split, tl.int64) * tl.num_programs(1) + state) * (D + 1) * (DV + 1)
        linear += tl.load(part + r[:, None] * (DV + 1) + c[None, :], mask=(r < D)[:, None] & (c < DV)[None, :], other=0.0)
        mean += tl.load(part + r * (DV + 1) + DV, mask=r < D, other=0.0)
        constant += tl.load(part + D * (DV + 1) + c, mask=c < DV, other=0.0)
        mass += tl.load(part + D * (DV + 1) + DV)
    norm = 1.0 / mass
    linear, mean, constant = linear * norm, mean * norm, constant * norm
    if CENTER:
        linear -= mean[:, None] * constant[None, :]
    tl.store(linear_ptr + state * D * DV + r[:, None] * DV + c[None, :], (linear * ratio).to(linear_ptr.dtype.element_ty),
             mask=(r < D)[:, None] & (c < DV)[None, :])
    tl.store(mean_ptr + state * D + r, mean, mask=r < D)
    tl.store(z_linear_ptr + state * D + r, mean * ratio, mask=r < D)
    if rows_id == 0:
        tl.store(constant_ptr + state * DV + c, constant, mask=c < DV)
        tl.store(norm_ptr + state, norm)
