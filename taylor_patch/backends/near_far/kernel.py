"""The attention kernel: far field over block means and near field over exact blocks, in one pass with one running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from taylor_patch.backends.near_far.blocks import TILT_LIMIT
from taylor_patch.backends.near_far.layout import SIZES, block_tokens

CUMULANT = tl.constexpr(2)
ZEROTH = tl.constexpr(1)
LIMIT = tl.constexpr(TILT_LIMIT)


@triton.jit
def tilt(variance):
    """blocks.tilt of variances q' S_w q [rows] -> (log mean exp in units of log2, what the linear term counts), float32."""
    variance = tl.maximum(variance, 0.0)
    deviation = tl.sqrt(variance)
    straight = (deviation - 0.5 * LIMIT) * LIMIT
    return tl.where(deviation < LIMIT, 0.5 * variance, straight) * 1.4426950408889634, 1.0 / tl.maximum(deviation / LIMIT, 1.0)


@triton.jit
def _rows(x, base, first, n, DIM: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr, FULL: tl.constexpr):
    """Rows base + first on of x [*, DIM], ROWS of them; n is the number of rows after base. x: a pointer, or a descriptor with TMA."""
    if TMA:
        rows = x.load([(base + first).to(tl.int32), 0])
    else:
        row = first + tl.arange(0, ROWS)
        at = x + base * DIM + row[:, None] * DIM + tl.arange(0, DIM)[None, :]
        rows = tl.load(at) if FULL else tl.load(at, mask=(row < n)[:, None], other=0.0)
    return rows


@triton.jit(do_not_specialize=SIZES)
def attend_kernel(q_ptr, stride_qb, stride_qh, stride_qn, stride_qd, out_ptr, stride_ob, stride_oh, stride_on, stride_od,
                  k, v, bias_ptr, mean_k, mean_v, trace_ptr, mean_trace_ptr, centre_ptr, covariance, column_scale_ptr, far_ptr, list_ptr,
                  count_ptr, order_ptr, setting_ptr, not_finite_ptr, scale, first_head, n_heads, GROUP, n_blocks, n_image_blocks,
                  n_query_blocks, n_query_image_blocks, far_stride, GRID_T, GRID_H, GRID_W, START, OUTSIDE,
                  TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, FAR: tl.constexpr,
                  BIASED: tl.constexpr, TAIL: tl.constexpr, AIMED: tl.constexpr, TMA: tl.constexpr, STAGES: tl.constexpr,
                  FAR_STAGES: tl.constexpr, PRECISION: tl.constexpr):
    """softmax(scale q k' + bias) v, with the keys of far block b replaced by

        weight n_b exp(scale q.k_b + 1/2 t_b scale^2 q' S_w q)  and  value v_b + scale C_w' q    (limited as blocks.tilt says).

    k, v [lanes * blocks * 64, DIM], mean_k, mean_v [lanes * image blocks, DIM], covariance [lanes * 2 DIM, DIM]: pointers or descriptors.
    far [heads, image blocks of the queries, far_stride]: log2 of n_b, or -inf where a block is exact or does not exist; list [heads, query
    blocks, blocks] and count [heads, query blocks] say which are exact. GRID and TILE are those of the queries. AIMED: setting [heads, 4]
    holds factors of the second-order term and of the linear one at places 1 and 2 (aim.py). Logits are in units of log2; sums are float32.
    not_finite [1] becomes 1 where a result has a value that is not finite.
    Grid (query blocks, query heads of the round). Queries outside the image of all heads come first, because they take longest, then
    the others of a head in its order [heads, image blocks of the queries].
    """
    number = tl.program_id(1) * n_query_blocks + tl.program_id(0)
    n_outside = n_query_blocks - n_query_image_blocks
    rank = number - n_outside * tl.num_programs(1)
    lane = tl.where(rank < 0, number // tl.maximum(n_outside, 1), rank // n_query_image_blocks).to(tl.int64)
    query = tl.load(order_ptr + lane * n_query_image_blocks + rank % n_query_image_blocks, mask=rank >= 0,
                    other=n_query_image_blocks + number % tl.maximum(n_outside, 1))
    kv_lane = lane // GROUP
    batch, head = (first_head + lane) // n_heads, (first_head + lane) % n_heads
    factor = scale * 1.4426950408889634
    dim = tl.arange(0, DIM)
    place = tl.arange(0, 64)
    token, filled = block_tokens(query, place, n_query_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W)
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + token.to(tl.int64)[:, None] * stride_qn + dim[None, :] * stride_qd,
                mask=filled[:, None] & (dim[None, :] < D), other=0.0)
    top = tl.full((64,), -1.0e30, tl.float32)
    mass = tl.zeros((64,), tl.float32)
    total = tl.zeros((64, DIM), tl.float32)
    if TAIL >= ZEROTH:
        spread, counts = tl.zeros((64,), tl.float32), tl.zeros((64,), tl.float32)
        if TAIL == CUMULANT:
            qs = tl.dot(q, _rows(covariance, kv_lane * (2 * DIM), 0, DIM, DIM, DIM, TMA, True), input_precision=PRECISION)
            qs *= tl.load(column_scale_ptr + kv_lane * (2 * DIM) + dim)[None, :]
            spread, counts = tilt(tl.sum(qs * q.to(tl.float32), 1) * (scale * scale))
            spread /= tl.maximum(tl.load(mean_trace_ptr + kv_lane), 1.0e-30)
            if AIMED:
                spread *= tl.load(setting_ptr + lane * 4 + 1)
        far_row = far_ptr + (lane * n_query_image_blocks + query) * far_stride
        for first in tl.range(0, tl.where(query < n_query_image_blocks, n_image_blocks, 0), FAR, num_stages=FAR_STAGES):
            block = first + tl.arange(0, FAR)
            mean = _rows(mean_k, kv_lane * n_image_blocks, first, n_image_blocks, DIM, FAR, TMA, False)
            logit = tl.dot(q, tl.trans(mean), input_precision=PRECISION) * factor + tl.load(far_row + block)[None, :]
            if TAIL == CUMULANT:
                logit += spread[:, None] * tl.load(trace_ptr + kv_lane * far_stride + block)[None, :]
            new_top = tl.maximum(top, tl.max(logit, 1))
            weight = tl.exp2(logit - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            mass = mass * shrink + tl.sum(weight, 1)
            value = _rows(mean_v, kv_lane * n_image_blocks, first, n_image_blocks, DIM, FAR, TMA, False)
            total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None], input_precision=PRECISION)
            top = new_top
        # The means are those of k less a centre; from here on logits are those of k itself.
        centre = tl.load(centre_ptr + kv_lane * DIM + dim)
        top += tl.sum(q.to(tl.float32) * centre[None, :], 1) * factor
    tail_top, tail_mass = top, mass
    if TAIL == CUMULANT:
        tail_mass = mass * counts
    blocks = list_ptr + (lane * n_query_blocks + query) * n_blocks
    block = 0
    for j in tl.range(0, tl.load(count_ptr + lane * n_query_blocks + query), num_stages=STAGES):
        block = tl.load(blocks + j).to(tl.int32)
        first_row = (kv_lane * n_blocks + block) * 64
        logit = tl.dot(q, tl.trans(_rows(k, first_row, 0, 64, DIM, 64, TMA, True)), input_precision=PRECISION)
        if BIASED:
            logit = logit * factor + tl.load(bias_ptr + first_row + place)[None, :]
            new_top = tl.maximum(top, tl.max(logit, 1))
            weight = tl.exp2(logit - new_top[:, None])
        else:
            new_top = tl.maximum(top, tl.max(logit, 1) * factor)
            weight = tl.exp2(logit * factor - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        mass = mass * shrink + tl.sum(weight, 1)
        value = _rows(v, first_row, 0, 64, DIM, 64, TMA, True)
        total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None], input_precision=PRECISION)
        top = new_top
    # 0, but only known after the loop: addresses that depend on it take no registers during the loop.
    late = tl.where(block < 0, 1, 0)
    norm = tl.where(mass > 0, 1.0 / mass, 0.0)
    total *= norm[:, None]
    if TAIL == CUMULANT:
        # total + share of the tail * C_w' q, in one accumulator: the share is multiplied into q, the columns' scale divided out before.
        share = tail_mass * tl.exp2(tail_top - top) * norm
        if AIMED:
            share *= tl.load(setting_ptr + lane * 4 + 2 + late)
        column_scale = tl.load(column_scale_ptr + kv_lane * (2 * DIM) + DIM + late + dim)
        total *= tl.where(column_scale > 0, 1.0 / column_scale, 1.0)[None, :]
        linear = _rows(covariance, kv_lane * (2 * DIM) + DIM + late, 0, DIM, DIM, DIM, TMA, True)
        total = tl.dot((q.to(tl.float32) * (share * scale)[:, None]).to(q.dtype), linear, total, input_precision=PRECISION)
        total *= tl.where(column_scale > 0, column_scale, 1.0)[None, :]
    token, filled = block_tokens(query + late, place, n_query_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W)
    out = out_ptr + batch * stride_ob + head * stride_oh + token.to(tl.int64)[:, None] * stride_on + dim[None, :] * stride_od
    result = total.to(out_ptr.dtype.element_ty)
    inside = filled[:, None] & (dim[None, :] < D)
    tl.store(out, result, mask=inside)
    strange = inside & ~(tl.abs(result.to(tl.float32)) < float("inf"))
    tl.store(not_finite_ptr + late, 1.0, mask=tl.sum(tl.sum(strange.to(tl.int32), 1), 0) > 0)
