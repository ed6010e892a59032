"""Denominators of a few queries from their logits, before features are made."""

from __future__ import annotations

import triton
import triton.language as tl

from taylor_patch.backends.taylor.kernels.features import coordinates, hermite_coefficient, state_index
from taylor_patch.backends.taylor.kernels.statistics import store_stats


@triton.jit
def probe_kernel(q_ptr, k_ptr, q_factor_ptr, k_factor_ptr, weight_ptr, mean_ptr, out_ptr, n_queries, n_keys, per_split, samples,
                 root, scale, q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, weight_sb,
                 HEADS_KV: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                 SAMPLES: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr, BLOCK_N: tl.constexpr, HAS_Q_FACTOR: tl.constexpr,
                 HAS_K_FACTOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, CENTER: tl.constexpr, DTYPE: tl.constexpr,
                 PRECISION: tl.constexpr):
    """Power sums of the logits of evenly spaced queries: out [splits, states * GROUP, P, SAMPLES] float32 holds
    sum over a share of the keys of w (scale q.(root k - mean))^p."""
    y, split = tl.program_id(0), tl.program_id(1)
    b, head, sub = state_index(y // GROUP, HEADS_KV, SUB)
    q_head = head * GROUP + y % GROUP
    q_base = q_ptr + b * q_sb + q_head * q_sh + sub * D * q_sd
    k_base = k_ptr + b * k_sb + head * k_sh + sub * D * k_sd
    s = tl.arange(0, SAMPLES)
    rows = (2 * s.to(tl.int64) + 1) * n_queries // (2 * samples)
    d = tl.arange(0, D_PAD)
    t = tl.arange(0, BLOCK_N)
    q = coordinates(q_base, rows, d, s < samples, q_sn, q_sd, D, False)
    if HAS_Q_FACTOR:
        q *= tl.load(q_factor_ptr + (b * HEADS_KV * GROUP + q_head) * n_queries + rows, mask=s < samples, other=0.0)[:, None]
    mean = tl.zeros([D_PAD], tl.float32)
    if CENTER:
        mean = tl.load(mean_ptr + (y // GROUP) * D + d, mask=d < D, other=0.0)
    p = tl.arange(0, P_PAD)
    sums = tl.zeros([P_PAD, SAMPLES, BLOCK_N], tl.float32)
    begin, end = split * per_split, tl.minimum((split + 1) * per_split, n_keys)
    tl.assume(begin < end)
    for start in range(begin, end, BLOCK_N):
        first = tl.cast(start, tl.int64)
        ok = start + t < n_keys
        k = coordinates(k_base + first * k_sn, t, d, ok, k_sn, k_sd, D, False) * root
        w = ok.to(tl.float32)
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + b * weight_sb + first + t, mask=ok, other=0.0)
        if HAS_K_FACTOR:
            k *= tl.load(k_factor_ptr + (b * HEADS_KV + head) * n_keys + first + t, mask=ok, other=0.0)[:, None]
        x = tl.dot(q.to(DTYPE), tl.trans((k - mean[None, :]).to(DTYPE)), input_precision=PRECISION) * scale
        power = tl.zeros_like(sums) + w[None, None, :]
        for degree in tl.static_range(1, P):
            power = tl.where(p[:, None, None] >= degree, power * x[None, :, :], power)
        sums += power
    tl.store(out_ptr + (split.to(tl.int64) * tl.num_programs(0) + y) * P * SAMPLES + p[:, None] * SAMPLES + s[None, :], tl.sum(sums, 2),
             mask=(p < P)[:, None])


@triton.jit
def probe_finish_kernel(sums_ptr, stats_ptr, splits, samples, eps, SAMPLES: tl.constexpr, P: tl.constexpr, HERMITE: tl.constexpr):
    """Denominators sum_p c_p mean(x^p) / p! from the power sums of probe_kernel -> stats [rows, 4]."""
    row = tl.program_id(0)
    s = tl.arange(0, SAMPLES)
    mass = _power_sum(sums_ptr, row, 0, splits, s, SAMPLES, P)
    variance = mass
    if HERMITE:
        variance = _power_sum(sums_ptr, row, 2, splits, s, SAMPLES, P) / mass
    denominator = tl.zeros([SAMPLES], tl.float32)
    inverse_factorial = 1.0
    for p in tl.static_range(P):
        if p > 1:
            inverse_factorial = inverse_factorial / p
        term = _power_sum(sums_ptr, row, p, splits, s, SAMPLES, P) / mass * inverse_factorial
        if HERMITE:
            term *= hermite_coefficient(variance, p, P)
        denominator += term
    store_stats(stats_ptr + row * 4, denominator, s < samples, eps)


@triton.jit
def _power_sum(sums_ptr, row, POWER: tl.constexpr, splits, s, SAMPLES: tl.constexpr, P: tl.constexpr):
    total = tl.zeros([SAMPLES], tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + ((split * tl.num_programs(0) + row) * P + POWER) * SAMPLES + s)
    return total
