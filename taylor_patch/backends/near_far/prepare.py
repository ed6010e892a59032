"""Preparation: tile-ordered k and v, block means, pooled within-block covariances, sub-means of query units."""

from __future__ import annotations

import triton
import triton.language as tl

from taylor_patch.backends.near_far.layout import SIZES, block_tokens

TINY = tl.constexpr(1.1754943508222875e-38)


@triton.jit(do_not_specialize=SIZES)
def gather_kernel(q_ptr, stride_qb, stride_qh, stride_qn, stride_qd, k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
                  v_ptr, stride_vb, stride_vh, stride_vn, stride_vd, mask_ptr, stride_mb, largest_ptr, k_out_ptr, v_out_ptr, bias_ptr,
                  mean_k_ptr, mean_v_ptr, precise_k_ptr, precise_v_ptr, log_mass_ptr, trace_ptr, centre_ptr,
                  sample_ptr, share_ptr, histogram_ptr, first_lane, n_heads, GROUP, n_blocks, n_image_blocks, n_query_image_blocks,
                  far_stride, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
                  QUERY_T, QUERY_H, QUERY_W, QUERY_START, QUERY_OUTSIDE, QUERY_TILE_T: tl.constexpr, QUERY_TILE_H: tl.constexpr,
                  QUERY_TILE_W: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, SAMPLES: tl.constexpr, BINS: tl.constexpr,
                  MASKED: tl.constexpr, BIASED: tl.constexpr):
    """Everything that is known of one block alone: k and v in tile order, their weighted means (those of k less a centre in the dtype of k,
    and float32 ones), log2 masses, traces tr(S_b), biases times log2 e; means of the quarters of query blocks [heads, SAMPLES,
    image blocks of the queries, DIM] and the quarters' shares of the blocks' tokens.

    largest: of each row of the mask (blocks.largest), which is taken off it. Clears the histogram too. Grid (blocks, or image blocks of
    the queries where these are more, lanes, 2 + GROUP): k, v, then the query heads of the lane. Few warps a program: sums across warps are
    what costs time.
    """
    block = tl.program_id(0)
    lane = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    batch, head = (first_lane + lane) // n_heads, (first_lane + lane) % n_heads
    in_image = block < n_image_blocks
    place = tl.arange(0, 64)
    dim = tl.arange(0, DIM)
    if part >= 2:
        if block < n_query_image_blocks:
            token, filled = block_tokens(block, place, n_query_image_blocks, QUERY_T, QUERY_H, QUERY_W, QUERY_START, QUERY_OUTSIDE,
                                         QUERY_TILE_T, QUERY_TILE_H, QUERY_TILE_W)
            token = token.to(tl.int64)[:, None]
            inside = filled[:, None] & (dim[None, :] < D)
            member = head * GROUP + part - 2
            q = tl.load(q_ptr + batch * stride_qb + member * stride_qh + token * stride_qn + dim[None, :] * stride_qd, mask=inside, other=0.0)
            sample = tl.arange(0, SAMPLES)
            count = tl.sum(tl.reshape(filled.to(tl.float32), (SAMPLES, 64 // SAMPLES)), 1)
            mean = tl.sum(tl.reshape(q.to(tl.float32), (SAMPLES, 64 // SAMPLES, DIM)), 1) / tl.maximum(count, 1.0)[:, None]
            row = ((lane * GROUP + part - 2) * SAMPLES + sample) * n_query_image_blocks + block
            tl.store(sample_ptr + row[:, None] * DIM + dim[None, :], mean.to(sample_ptr.dtype.element_ty))
            if lane == 0:
                tl.store(share_ptr + sample * n_query_image_blocks + block, count / tl.maximum(tl.sum(count, 0), 1.0))
            if block == 0:
                counter = (lane * GROUP + part - 2) * (2 * BINS) + tl.arange(0, 2 * BINS)
                tl.store(histogram_ptr + counter, tl.zeros((2 * BINS,), tl.int32))
    elif block < n_blocks:
        token, filled = block_tokens(block, place, n_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W)
        token = token.to(tl.int64)[:, None]
        inside = filled[:, None] & (dim[None, :] < D)
        row = (lane * n_blocks + block) * 64 + place
        block_at = lane * n_image_blocks + block
        weight = tl.where(filled, 1.0, 0.0)
        if MASKED:
            bias = tl.load(mask_ptr + batch * stride_mb + token, mask=filled[:, None], other=float("-inf"))
            bias -= tl.load(largest_ptr + tl.where(stride_mb > 0, batch, 0))  # a stride of 0: one row for all
            weight = tl.exp(tl.reshape(bias, (64,)))
        mass = tl.sum(weight, 0)
        per_mass = 1.0 / tl.maximum(mass, TINY)
        if part == 0:
            k = tl.load(k_ptr + batch * stride_kb + head * stride_kh + token * stride_kn + dim[None, :] * stride_kd, mask=inside, other=0.0)
            tl.store(k_out_ptr + row[:, None] * DIM + dim[None, :], k)
            if BIASED:
                tl.store(bias_ptr + row, tl.log2(weight))
            if in_image:
                # Any centre is right: it only keeps the rounding of the block means small. So a mean of 8 keys does.
                some = (START + tl.arange(0, 8).to(tl.int64) * (GRID_T * GRID_H * GRID_W) // 8)[:, None]
                keys = tl.load(k_ptr + batch * stride_kb + head * stride_kh + some * stride_kn + dim[None, :] * stride_kd,
                               mask=dim[None, :] < D, other=0.0)
                centre = tl.sum(keys.to(tl.float32), 0) / 8
                weighted = k.to(tl.float32) * weight[:, None]
                mean = tl.sum(weighted, 0) * per_mass
                apart = k.to(tl.float32) - mean[None, :]
                tl.store(mean_k_ptr + block_at * DIM + dim, (mean - centre).to(mean_k_ptr.dtype.element_ty))
                tl.store(precise_k_ptr + block_at * DIM + dim, mean)
                tl.store(log_mass_ptr + lane * far_stride + block, tl.log2(mass))
                trace = tl.sum(tl.sum(apart * apart, 1) * weight, 0) * per_mass
                tl.store(trace_ptr + lane * far_stride + block, trace)
                if block == 0:
                    tl.store(centre_ptr + lane * DIM + dim, centre)
                    beyond = n_image_blocks + tl.arange(0, 128)
                    tl.store(trace_ptr + lane * far_stride + beyond, tl.zeros((128,), tl.float32), mask=beyond < far_stride)
        else:
            v = tl.load(v_ptr + batch * stride_vb + head * stride_vh + token * stride_vn + dim[None, :] * stride_vd, mask=inside, other=0.0)
            tl.store(v_out_ptr + row[:, None] * DIM + dim[None, :], v)
            if in_image:
                mean = tl.sum(v.to(tl.float32) * weight[:, None], 0) * per_mass
                tl.store(mean_v_ptr + block_at * DIM + dim, mean.to(mean_v_ptr.dtype.element_ty))
                tl.store(precise_v_ptr + block_at * DIM + dim, mean)


@triton.jit
def _covariance_part(k_ptr, x_ptr, bias_ptr, precise_k_ptr, precise_x_ptr, log_mass_ptr, trace_ptr, partial_ptr, partial_mass_ptr,
                     lane, split, n_splits, column, blocks_each, n_blocks, n_image_blocks, far_stride,
                     DIM: tl.constexpr, COLUMNS: tl.constexpr, IS_KEY: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Columns `column` to column + COLUMNS of the covariance of k with x, which is k or v."""
    place = tl.arange(0, 64)
    dim = tl.arange(0, DIM)
    part = column + tl.arange(0, COLUMNS)
    covariance = tl.zeros((DIM, COLUMNS), tl.float32)
    total = 0.0
    total_trace = 0.0
    for block in range(split * blocks_each, tl.minimum((split + 1) * blocks_each, n_image_blocks)):
        row = (lane * n_blocks + block) * 64 + place
        x = tl.load(x_ptr + row[:, None] * DIM + part[None, :])
        k = x if IS_KEY and DIM == COLUMNS else tl.load(k_ptr + row[:, None] * DIM + dim[None, :])
        if MASKED:
            k = (k.to(tl.float32) * tl.exp2(tl.load(bias_ptr + row))[:, None]).to(k.dtype)
        mass = tl.exp2(tl.load(log_mass_ptr + lane * far_stride + block))
        mean_k = tl.load(precise_k_ptr + (lane * n_image_blocks + block) * DIM + dim)
        mean_x = tl.load(precise_x_ptr + (lane * n_image_blocks + block) * DIM + part)
        # sum w (k - k_b)(x - x_b)' = sum w k x' - w_b k_b x_b'
        covariance = tl.dot(tl.trans(k), x, covariance, input_precision=PRECISION)
        covariance -= (mean_k * mass)[:, None] * mean_x[None, :]
        if IS_KEY:
            total += mass
            total_trace += mass * tl.load(trace_ptr + lane * far_stride + block)
    at = lane * n_splits + split
    row_out = at * (2 * DIM) + (0 if IS_KEY else DIM) + dim
    tl.store(partial_ptr + row_out[:, None] * DIM + part[None, :], covariance)
    if IS_KEY and column == 0:
        tl.store(partial_mass_ptr + at * 2, total)
        tl.store(partial_mass_ptr + at * 2 + 1, total_trace)


@triton.jit(do_not_specialize=SIZES)
def covariance_kernel(k_ptr, v_ptr, bias_ptr, precise_k_ptr, precise_v_ptr, log_mass_ptr, trace_ptr, partial_ptr, partial_mass_ptr,
                      blocks_each, n_blocks, n_image_blocks, far_stride, DIM: tl.constexpr, COLUMNS: tl.constexpr,
                      MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Per split of the image blocks: sum of w (k - k_b)(k - k_b)' and of w (k - k_b)(v - v_b)', w = exp(bias), in float32.

    k and v are in tile order. Grid (2 DIM / COLUMNS, splits, lanes): programs of k and v stand beside each other and share k in the cache.
    """
    split = tl.program_id(1)
    lane = tl.program_id(2).to(tl.int64)
    column = tl.program_id(0) * COLUMNS
    if column < DIM:
        _covariance_part(k_ptr, k_ptr, bias_ptr, precise_k_ptr, precise_k_ptr, log_mass_ptr, trace_ptr, partial_ptr, partial_mass_ptr,
                         lane, split, tl.num_programs(1), column, blocks_each, n_blocks, n_image_blocks, far_stride,
                         DIM, COLUMNS, True, MASKED, PRECISION)
    else:
        _covariance_part(k_ptr, v_ptr, bias_ptr, precise_k_ptr, precise_v_ptr, log_mass_ptr, trace_ptr, partial_ptr, partial_mass_ptr,
                         lane, split, tl.num_programs(1), column - DIM, blocks_each, n_blocks, n_image_blocks, far_stride,
                         DIM, COLUMNS, False, MASKED, PRECISION)


@triton.jit(do_not_specialize=SIZES)
def pool_kernel(partial_ptr, partial_mass_ptr, covariance_ptr, column_scale_ptr, mean_trace_ptr, n_splits, DIM: tl.constexpr,
                COLUMNS: tl.constexpr):
    """Sums of the splits -> [2, DIM, DIM]: S_w and C_w, each column divided by its largest value, and the mean trace of the blocks.

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
    per_unit = tl.where(total > 1.0e-30, 1.0 / tl.maximum(total, 1.0e-30), 0.0)
    out = covariance_ptr + (lane * (2 * DIM) + at_row[:, None]) * DIM + column[None, :]
    tl.store(out, (pooled / largest[None, :]).to(covariance_ptr.dtype.element_ty))
    tl.store(column_scale_ptr + (lane * 2 + which) * DIM + column, tl.where(some, largest * per_unit, 0.0))
    tl.store(mean_trace_ptr + lane, total_trace * per_unit, mask=tl.program_id(0) + which == 0)
