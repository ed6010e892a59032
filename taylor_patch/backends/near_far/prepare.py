"""Preparation: tile-ordered k and v, block means, pooled within-block covariances, sub-means of query units."""

from __future__ import annotations

import triton
import triton.language as tl

from taylor_patch.backends.near_far.layout import block_tokens

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _gather_part(k_base, stride_kn, stride_kd, x_base, stride_xn, stride_xd, mask_base,
                 x_out_ptr, bias_out_ptr, mean_ptr, log_mass_ptr, trace_ptr, centre_ptr, partial_ptr, partial_mass_ptr,
                 lane, split, n_splits, column, blocks_each, n_blocks, n_image_blocks, far_stride,
                 GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
                 D: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, IS_KEY: tl.constexpr, MASKED: tl.constexpr,
                 BIASED: tl.constexpr, PRECISION: tl.constexpr):
    """One split of the blocks of one lane. x is k or v, of which the program handles the columns from `column` on."""
    place = tl.arange(0, 64)
    dim = tl.arange(0, DIM)
    part = column + tl.arange(0, COLUMNS)
    centre = tl.zeros((COLUMNS,), tl.float32)
    if IS_KEY:
        # Any centre is right: it only keeps the rounding of the block means small. So a mean of 64 keys does.
        some = (START + place.to(tl.int64) * (GRID_T * GRID_H * GRID_W) // 64)[:, None]
        keys = tl.load(k_base + some * stride_kn + part[None, :] * stride_kd, mask=part[None, :] < D, other=0.0)
        centre = tl.sum(keys.to(tl.float32), 0) / 64
        if split == 0:
            tl.store(centre_ptr + lane * DIM + part, centre)
            if column == 0:
                beyond = n_image_blocks + tl.arange(0, 128)
                tl.store(trace_ptr + lane * far_stride + beyond, tl.zeros((128,), tl.float32), mask=beyond < far_stride)
    covariance = tl.zeros((DIM, COLUMNS), tl.float32)
    total = 0.0
    total_trace = 0.0
    end = tl.minimum((split + 1) * blocks_each, n_blocks)
    for block in range(split * blocks_each, tl.minimum(end, n_image_blocks)):
        token, filled = block_tokens(block, place, n_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W)
        token = token.to(tl.int64)
        x = tl.load(x_base + token[:, None] * stride_xn + part[None, :] * stride_xd, mask=filled[:, None] & (part[None, :] < D), other=0.0)
        if IS_KEY and DIM == COLUMNS:
            k = x
        else:
            k = tl.load(k_base + token[:, None] * stride_kn + dim[None, :] * stride_kd, mask=filled[:, None] & (dim[None, :] < D), other=0.0)
        row = (lane * n_blocks + block) * 64 + place
        tl.store(x_out_ptr + row[:, None] * DIM + part[None, :], x)
        bias = tl.where(filled, 0.0, float("-inf"))
        weight = tl.where(filled, 1.0, 0.0)
        if MASKED:
            bias = tl.load(mask_base + token, mask=filled, other=float("-inf"))
            weight = tl.exp(bias)
            weighted = (k.to(tl.float32) * weight[:, None]).to(k.dtype)
            weighted_x = x.to(tl.float32) * weight[:, None]
        else:
            weighted = k
            weighted_x = x.to(tl.float32)
        mass = tl.sum(weight, 0)
        per_mass = 1.0 / tl.maximum(mass, TINY)
        mean_x = tl.sum(weighted_x, 0) * per_mass
        mean_k = tl.sum(weighted.to(tl.float32), 0) * per_mass
        # sum w (k - k_b)(x - x_b)' = sum w k x' - w_b k_b x_b'
        covariance = tl.dot(tl.trans(weighted), x, covariance, input_precision=PRECISION)
        covariance -= (mean_k * mass)[:, None] * mean_x[None, :]
        tl.store(mean_ptr + (lane * n_image_blocks + block) * DIM + part, (mean_x - centre).to(mean_ptr.dtype.element_ty))
        if IS_KEY:
            square = tl.sum(tl.sum(weighted.to(tl.float32) * k.to(tl.float32), 1), 0)
            trace = tl.maximum(square * per_mass - tl.sum(mean_k * mean_k, 0), 0.0)
            total += mass
            total_trace += mass * trace
            if column == 0:
                tl.store(log_mass_ptr + lane * far_stride + block, tl.log2(mass))
                tl.store(trace_ptr + lane * far_stride + block, trace)
                if BIASED:
                    tl.store(bias_out_ptr + row, bias * LOG2E)
    for block in range(tl.maximum(split * blocks_each, n_image_blocks), end):
        token, filled = block_tokens(block, place, n_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W)
        token = token.to(tl.int64)
        x = tl.load(x_base + token[:, None] * stride_xn + part[None, :] * stride_xd, mask=filled[:, None] & (part[None, :] < D), other=0.0)
        row = (lane * n_blocks + block) * 64 + place
        tl.store(x_out_ptr + row[:, None] * DIM + part[None, :], x)
        if IS_KEY and BIASED and column == 0:
            bias = tl.where(filled, 0.0, float("-inf"))
            if MASKED:
                bias = tl.load(mask_base + token, mask=filled, other=float("-inf"))
            tl.store(bias_out_ptr + row, bias * LOG2E)
    at = lane * n_splits + split
    row_out = at * (2 * DIM) + (0 if IS_KEY else DIM) + dim
    tl.store(partial_ptr + row_out[:, None] * DIM + part[None, :], covariance)
    if IS_KEY and column == 0:
        tl.store(partial_mass_ptr + at * 2, total)
        tl.store(partial_mass_ptr + at * 2 + 1, total_trace)


@triton.jit
def _sample_part(q_base, stride_qn, stride_qd, sample_ptr, share_ptr, histogram_ptr, lane, split, blocks_each, n_blocks, n_image_blocks,
                 GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
                 D: tl.constexpr, DIM: tl.constexpr, SAMPLES: tl.constexpr, BINS: tl.constexpr):
    """Means of the quarters of query blocks, and the quarters' shares of the blocks' tokens. lane counts query heads."""
    place = tl.arange(0, 64)
    dim = tl.arange(0, DIM)
    sample = tl.arange(0, SAMPLES)
    for block in range(split * blocks_each, tl.minimum((split + 1) * blocks_each, n_image_blocks)):
        token, filled = block_tokens(block, place, n_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W)
        q = tl.load(q_base + token.to(tl.int64)[:, None] * stride_qn + dim[None, :] * stride_qd, mask=filled[:, None] & (dim[None, :] < D),
                    other=0.0)
        count = tl.sum(tl.reshape(filled.to(tl.float32), (SAMPLES, 64 // SAMPLES)), 1)
        mean = tl.sum(tl.reshape(q.to(tl.float32), (SAMPLES, 64 // SAMPLES, DIM)), 1) / tl.maximum(count, 1.0)[:, None]
        out = sample_ptr + ((lane * SAMPLES + sample[:, None]) * n_image_blocks + block) * DIM + dim[None, :]
        tl.store(out, mean.to(sample_ptr.dtype.element_ty))
        if lane == 0:
            tl.store(share_ptr + sample * n_image_blocks + block, count / tl.maximum(tl.sum(count, 0), 1.0))
    if split == 0:
        tl.store(histogram_ptr + lane * (2 * BINS) + tl.arange(0, 2 * BINS), tl.zeros((2 * BINS,), tl.int32))


@triton.jit
def gather_kernel(q_ptr, stride_qb, stride_qh, stride_qn, stride_qd, k_ptr, stride_kb, stride_kh, stride_kn, stride_kd, v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
                  mask_ptr, stride_mb, k_out_ptr, v_out_ptr, bias_out_ptr, mean_k_ptr, mean_v_ptr, log_mass_ptr, trace_ptr, centre_ptr,
                  partial_ptr, partial_mass_ptr, sample_ptr, share_ptr, histogram_ptr,
                  first_lane, n_heads, GROUP, blocks_each, n_blocks, n_image_blocks, far_stride,
                  GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
                  D: tl.constexpr, DIM: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr, BIASED: tl.constexpr,
                  PRECISION: tl.constexpr, SAMPLES: tl.constexpr, BINS: tl.constexpr):
    """k and v [B, H_kv, N, D] -> the same in tile order, block means (of k less a centre), log2 masses, traces, and per split

        sum over blocks and keys of w (k - k_b) (k - k_b)'  and  w (k - k_b) (v - v_b)',    w = exp(bias).

    q -> means of the quarters of its blocks [heads, SAMPLES, image blocks, DIM] and their shares [SAMPLES, image blocks]; clears the
    histogram. Grid (2 DIM / COLUMNS + GROUP, splits, lanes): programs of k and v stand beside each other and share k in the L2 cache.
    """
    split = tl.program_id(1)
    lane = tl.program_id(2).to(tl.int64)
    batch, head = (first_lane + lane) // n_heads, (first_lane + lane) % n_heads
    k_base = k_ptr + batch * stride_kb + head * stride_kh
    v_base = v_ptr + batch * stride_vb + head * stride_vh
    mask_base = mask_ptr + batch * stride_mb
    column = tl.program_id(0) * COLUMNS
    if column < DIM:
        _gather_part(k_base, stride_kn, stride_kd, k_base, stride_kn, stride_kd, mask_base,
                     k_out_ptr, bias_out_ptr, mean_k_ptr, log_mass_ptr, trace_ptr, centre_ptr, partial_ptr, partial_mass_ptr,
                     lane, split, tl.num_programs(1), column, blocks_each, n_blocks, n_image_blocks, far_stride,
                     GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W,
                     D, DIM, COLUMNS, True, MASKED, BIASED, PRECISION)
    elif column < 2 * DIM:
        _gather_part(k_base, stride_kn, stride_kd, v_base, stride_vn, stride_vd, mask_base,
                     v_out_ptr, bias_out_ptr, mean_v_ptr, log_mass_ptr, trace_ptr, centre_ptr, partial_ptr, partial_mass_ptr,
                     lane, split, tl.num_programs(1), column - DIM, blocks_each, n_blocks, n_image_blocks, far_stride,
                     GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W,
                     D, DIM, COLUMNS, False, MASKED, BIASED, PRECISION)
    else:
        member = tl.program_id(0) - 2 * (DIM // COLUMNS)
        _sample_part(q_ptr + batch * stride_qb + (head * GROUP + member) * stride_qh, stride_qn, stride_qd, sample_ptr, share_ptr,
                     histogram_ptr, lane * GROUP + member, split, blocks_each, n_blocks, n_image_blocks,
                     GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W, D, DIM, SAMPLES, BINS)


@triton.jit
def pool_kernel(partial_ptr, partial_mass_ptr, covariance_ptr, column_scale_ptr, n_splits, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of the splits -> [2, DIM, DIM]: S_w / mean trace and C_w, each column divided by its largest value.

    The column scales are float32, so that half precision holds covariances of any size. Grid (DIM / COLUMNS, 2, lanes).
    """
    lane = tl.program_id(2).to(tl.int64)
    which = tl.program_id(1)
    dim = tl.arange(0, DIM)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at_row = which * DIM + dim
    pooled = tl.zeros((DIM, COLUMNS), tl.float32)
    total = 0.0
    total_trace = 0.0
    for split in range(n_splits):
        at = lane * n_splits + split
        pooled += tl.load(partial_ptr + (at * (2 * DIM) + at_row[:, None]) * DIM + column[None, :])
        total += tl.load(partial_mass_ptr + at * 2)
        total_trace += tl.load(partial_mass_ptr + at * 2 + 1)
    largest = tl.max(tl.abs(pooled), 0)
    some = largest > 1.0e-30
    largest = tl.where(some, largest, 1.0)
    unit = tl.where(which == 0, total_trace, total)
    per_unit = tl.where(unit > 1.0e-30, 1.0 / tl.maximum(unit, 1.0e-30), 0.0)
    out = covariance_ptr + (lane * (2 * DIM) + at_row[:, None]) * DIM + column[None, :]
    tl.store(out, (pooled / largest[None, :]).to(covariance_ptr.dtype.element_ty))
    tl.store(column_scale_ptr + (lane * 2 + which) * DIM + column, tl.where(some, largest * per_unit, 0.0))
