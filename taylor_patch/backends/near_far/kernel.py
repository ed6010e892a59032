"""The attention kernel: far field over block means and near field over exact blocks, in one pass with one running softmax."""

from __future__ import annotations

import triton
import triton.language as tl

from taylor_patch.backends.near_far.layout import unit_tokens

CUMULANT = tl.constexpr(2)
ZEROTH = tl.constexpr(1)


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


@triton.jit
def attend_kernel(q_ptr, stride_qb, stride_qh, stride_qn, stride_qd, out_ptr, stride_ob, stride_oh, stride_on, stride_od,
                  k, v, bias_ptr, mean_k, mean_v, log_mass_ptr, trace_ptr, centre_ptr, covariance, column_scale_ptr,
                  near_ptr, list_ptr, count_ptr, scale, first_head, n_heads, GROUP,
                  n_units, n_image_units, n_image_blocks, n_key_blocks, far_stride,
                  GRID_T, GRID_H, GRID_W, START, OUTSIDE,
                  TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, UNIT_BLOCKS: tl.constexpr,
                  D: tl.constexpr, DIM: tl.constexpr, FAR: tl.constexpr, PAIR: tl.constexpr, BIASED: tl.constexpr,
                  TAIL: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr):
    """softmax(scale q k' + bias) v, with the keys of far block b replaced by

        weight n_b exp(scale q.k_b + 1/2 t_b scale^2 q' S_w q)  and  value v_b + scale C_w' q.

    k, v, mean_k, mean_v: [lanes * blocks (* 64), DIM], covariance [lanes * 2 DIM, DIM], pointers or descriptors. near: [heads, image units, far_stride], 1 where a block is exact
    or does not exist; list and count hold the same by unit. Logits are in units of log2; sums are float32. Grid (units, query heads of the round);
    units outside the image come first, because they are the longest.
    """
    unit = n_units - 1 - tl.program_id(0)
    lane = tl.program_id(1).to(tl.int64)
    kv_lane = lane // GROUP
    batch, head = (first_head + lane) // n_heads, (first_head + lane) % n_heads
    ROWS: tl.constexpr = UNIT_BLOCKS * 64
    factor = scale * 1.4426950408889634
    dim = tl.arange(0, DIM)
    token, filled = unit_tokens(unit, tl.arange(0, ROWS), n_image_units, n_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE,
                                TILE_T, TILE_H, TILE_W, UNIT_BLOCKS)
    q = tl.load(q_ptr + batch * stride_qb + head * stride_qh + token.to(tl.int64)[:, None] * stride_qn + dim[None, :] * stride_qd,
                mask=filled[:, None] & (dim[None, :] < D), other=0.0)
    top = tl.full((ROWS,), -1.0e30, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, DIM), tl.float32)
    if TAIL >= ZEROTH:
        spread = tl.zeros((ROWS,), tl.float32)
        if TAIL == CUMULANT:
            qs = tl.dot(q, _rows(covariance, kv_lane * (2 * DIM), 0, DIM, DIM, DIM, TMA, True), input_precision=PRECISION)
            qs *= tl.load(column_scale_ptr + kv_lane * (2 * DIM) + dim)[None, :]
            spread = tl.sum(qs * q.to(tl.float32), 1) * (0.5 * scale * factor)
        near_row = near_ptr + (lane * n_image_units + unit) * far_stride
        far_blocks = tl.where(unit < n_image_units, n_image_blocks, 0)
        for first in range(0, far_blocks, FAR):
            block = first + tl.arange(0, FAR)
            mean = _rows(mean_k, kv_lane * n_image_blocks, first, n_image_blocks, DIM, FAR, TMA, False)
            log_mass = tl.where(tl.load(near_row + block) == 0, tl.load(log_mass_ptr + kv_lane * far_stride + block), float("-inf"))
            logit = tl.dot(q, tl.trans(mean), input_precision=PRECISION) * factor + log_mass[None, :]
            if TAIL == CUMULANT:
                trace = tl.load(trace_ptr + kv_lane * far_stride + block)
                logit += spread[:, None] * trace[None, :]
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
    blocks = list_ptr + (lane * n_units + unit) * n_key_blocks
    n_blocks = tl.load(count_ptr + lane * n_units + unit)
    base = kv_lane * n_key_blocks * 64
    block = 0
    for j in range(0, n_blocks, PAIR):
        block = tl.load(blocks + j)
        if PAIR == 1 or TMA:
            key = _rows(k, base + block * 64, 0, 64, DIM, 64, TMA, True)
        else:
            key_row = tl.arange(0, 128)
            key_row = base + tl.load(blocks + j + key_row // 64) * 64 + key_row % 64
            key = tl.load(k + key_row[:, None] * DIM + dim[None, :])
        logit = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if BIASED:
            bias_row = base + block * 64 + tl.arange(0, 64) if PAIR == 1 or TMA else key_row
            logit = logit * factor + tl.load(bias_ptr + bias_row)[None, :]
            highest = tl.max(logit, 1)
        else:
            highest = tl.max(logit, 1) * factor
        if PAIR == 2 and TMA:
            other = tl.load(blocks + j + 1)
            other_logit = tl.dot(q, tl.trans(_rows(k, base + other * 64, 0, 64, DIM, 64, TMA, True)), input_precision=PRECISION)
            if BIASED:
                other_logit = other_logit * factor + tl.load(bias_ptr + base + other * 64 + tl.arange(0, 64))[None, :]
                highest = tl.maximum(highest, tl.max(other_logit, 1))
            else:
                highest = tl.maximum(highest, tl.max(other_logit, 1) * factor)
        new_top = tl.maximum(top, highest)
        shrink = tl.exp2(top - new_top)
        slope = 1.0 if BIASED else factor
        weight = tl.exp2(logit * slope - new_top[:, None])
        mass = mass * shrink + tl.sum(weight, 1)
        if PAIR == 1 or TMA:
            value = _rows(v, base + block * 64, 0, 64, DIM, 64, TMA, True)
        else:
            value = tl.load(v + key_row[:, None] * DIM + dim[None, :])
        total = tl.dot(weight.to(value.dtype), value, total * shrink[:, None], input_precision=PRECISION)
        if PAIR == 2 and TMA:
            other_weight = tl.exp2(other_logit * slope - new_top[:, None])
            mass += tl.sum(other_weight, 1)
            other_value = _rows(v, base + other * 64, 0, 64, DIM, 64, TMA, True)
            total = tl.dot(other_weight.to(other_value.dtype), other_value, total, input_precision=PRECISION)
        top = new_top
    # 0, but only known after the loop: addresses that depend on it take no registers during the loop.
    late = tl.where(block < 0, 1, 0)
    norm = tl.where(mass > 0, 1.0 / mass, 0.0)
    total *= norm[:, None]
    if TAIL == CUMULANT:
        # total + share of the tail * C_w' q, in one accumulator: the share is multiplied into q, the columns' scale divided out before.
        share = tail_mass * tl.exp2(tail_top - top) * norm
        column_scale = tl.load(column_scale_ptr + kv_lane * (2 * DIM) + DIM + late + dim)
        total *= tl.where(column_scale > 0, 1.0 / column_scale, 1.0)[None, :]
        linear = _rows(covariance, kv_lane * (2 * DIM) + DIM + late, 0, DIM, DIM, DIM, TMA, True)
        total = tl.dot((q.to(tl.float32) * (share * scale)[:, None]).to(q.dtype), linear, total, input_precision=PRECISION)
        total *= tl.where(column_scale > 0, column_scale, 1.0)[None, :]
    token, filled = unit_tokens(unit + late, tl.arange(0, ROWS), n_image_units, n_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE,
                                TILE_T, TILE_H, TILE_W, UNIT_BLOCKS)
    out = out_ptr + batch * stride_ob + head * stride_oh + token.to(tl.int64)[:, None] * stride_on + dim[None, :] * stride_od
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=filled[:, None] & (dim[None, :] < D))
