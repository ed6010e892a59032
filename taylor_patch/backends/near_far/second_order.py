"""The second-order term of the far field's value in Triton: 1/2 (U'q)' T (U'q), on the device from the pooled covariance on.

U [D, 8] are the leading directions of S_w (blocks.leading_directions), T [8, 8, D] the within-block third moments of U'k, U'k and v, pooled
over blocks. Both symmetric halves of T are kept: 64 features are a tile of a product, and 36 would be padded to it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from taylor_patch.backends.near_far.layout import SIZES


@triton.jit
def squares(w, PRECISION: tl.constexpr):
    """w [rows, 16], of which 8 count -> all products of two of a row [rows, 64], float32."""
    component = tl.arange(0, 16)[:, None]
    pair = tl.arange(0, 64)[None, :]
    left = tl.dot(w, (component == pair // 8).to(w.dtype), input_precision=PRECISION)
    return left * tl.dot(w, (component == pair % 8).to(w.dtype), input_precision=PRECISION)


@triton.jit
def query_squares(q, directions_ptr, scale, DIM: tl.constexpr, PRECISION: tl.constexpr):
    """Products of scale U'q [rows, 64] float32, of q [rows, DIM] as it comes; directions_ptr: of the lane."""
    dim = tl.arange(0, DIM)
    u = tl.load(directions_ptr + tl.arange(0, 16)[None, :] * DIM + dim[:, None])
    w = tl.dot(q, u, input_precision=PRECISION) * scale
    # Half precision holds squares of up to 240; so far from the mean the expansion means nothing.
    return squares(tl.minimum(tl.maximum(w, -240.0), 240.0).to(q.dtype), PRECISION)


@triton.jit
def directions_kernel(covariance_ptr, column_scale_ptr, directions_ptr, DIM: tl.constexpr, ROUNDS: tl.constexpr, LEAST: tl.constexpr,
                      PRECISION: tl.constexpr):
    """U' [lanes, 16, DIM] by orthogonal iteration, as blocks.leading_directions; rows from 8 on, and those beyond S_w's rank, are 0.

    Grid (lanes,).
    """
    lane = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, DIM)
    number = tl.arange(0, 16)[:, None]
    covariance = tl.load(covariance_ptr + lane * (2 * DIM * DIM) + dim[:, None] * DIM + dim[None, :])
    column_scale = tl.load(column_scale_ptr + lane * (2 * DIM) + dim)
    place = dim[None, :] + 1
    rows = ((place * place * (2 * number + 1) + place * (5 * number + 13)) % 61 - 30).to(tl.float32) / 61
    for _ in range(ROUNDS):
        rows = tl.dot(rows.to(covariance.dtype), covariance, input_precision=PRECISION) * column_scale[None, :]
        for i in range(8):
            row = tl.sum(tl.where(number == i, rows, 0.0), 0)
            square = tl.sum(row * row, 0)
            row *= tl.where(square > LEAST, tl.rsqrt(tl.maximum(square, LEAST)), 0.0)
            along = tl.sum(rows * row[None, :], 1)
            rows = tl.where(number > i, rows - along[:, None] * row[None, :], tl.where(number == i, row[None, :], rows))
    tl.store(directions_ptr + (lane * 16 + number) * DIM + dim[None, :], tl.where(number < 8, rows, 0.0).to(directions_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=SIZES)
def third_kernel(k_ptr, v_ptr, bias_ptr, precise_k_ptr, precise_v_ptr, log_mass_ptr, trace_ptr, directions_ptr, partial_ptr,
                 blocks_each, n_blocks, n_image_blocks, far_stride, DIM: tl.constexpr, COLUMNS: tl.constexpr, BIASED: tl.constexpr,
                 PRECISION: tl.constexpr):
    """Per split of the image blocks: sum of w (U'(k - k_b)) (U'(k - k_b))' (v - v_b), w = exp(bias) [lanes, splits, 64, DIM] float32.

    A constant taken from the products would change nothing: w (v - v_b) adds up to 0 in a block. Grid (DIM / COLUMNS, splits, lanes).
    """
    split = tl.program_id(1)
    lane = tl.program_id(2).to(tl.int64)
    place = tl.arange(0, 64)
    dim = tl.arange(0, DIM)
    part = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    pair = tl.arange(0, 64)
    weight = tl.full((64,), 1.0, tl.float32)
    u = tl.load(directions_ptr + (lane * 16 + tl.arange(0, 16)[None, :]) * DIM + dim[:, None])
    third = tl.zeros((64, COLUMNS), tl.float32)
    for block in range(split * blocks_each, tl.minimum((split + 1) * blocks_each, n_image_blocks)):
        row = (lane * n_blocks + block) * 64 + place
        block_at = lane * n_image_blocks + block
        k = tl.load(k_ptr + row[:, None] * DIM + dim[None, :])
        v = tl.load(v_ptr + row[:, None] * DIM + part[None, :])
        if BIASED:
            weight = tl.exp2(tl.load(bias_ptr + row))
        mean_k = tl.load(precise_k_ptr + block_at * DIM + dim)
        mean_v = tl.load(precise_v_ptr + block_at * DIM + part)
        unit = tl.exp2(tl.load(log_mass_ptr + lane * far_stride + block)) * tl.load(trace_ptr + lane * far_stride + block)
        # In units of the block's summed squares nothing is above 1, whatever the keys: fit for half precision.
        per_unit = tl.where(unit > 1.0e-30, 1.0 / tl.maximum(unit, 1.0e-30), 0.0)
        w = tl.dot(k, u, input_precision=PRECISION) - tl.sum(mean_k[:, None] * u.to(tl.float32), 0)[None, :]
        w *= tl.sqrt(weight * per_unit)[:, None]
        feature = squares(tl.minimum(tl.maximum(w, -1.0), 1.0).to(k.dtype), PRECISION).to(v.dtype)
        product = tl.dot(tl.trans(feature), v, input_precision=PRECISION)
        third += (product - tl.sum(feature.to(tl.float32), 0)[:, None] * mean_v[None, :]) * unit
    out = partial_ptr + ((lane * tl.num_programs(1) + split) * 64 + pair[:, None]) * DIM + part[None, :]
    tl.store(out, third)


@triton.jit(do_not_specialize=SIZES)
def third_pool_kernel(partial_ptr, partial_mass_ptr, third_ptr, third_scale_ptr, n_splits, DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums of the splits -> T [lanes, 64, DIM], each column divided by its largest value, and the columns' scales [lanes, DIM] float32.

    Grid (DIM / COLUMNS, lanes).
    """
    lane = tl.program_id(1).to(tl.int64)
    pair = tl.arange(0, 64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    third = tl.zeros((64, COLUMNS), tl.float32)
    total = 0.0
    for split in range(n_splits):
        at = lane * n_splits + split
        third += tl.load(partial_ptr + (at * 64 + pair[:, None]) * DIM + column[None, :])
        total += tl.load(partial_mass_ptr + at * 2)
    largest = tl.max(tl.abs(third), 0)
    some = largest > 1.0e-30
    largest = tl.where(some, largest, 1.0)
    tl.store(third_ptr + (lane * 64 + pair[:, None]) * DIM + column[None, :], (third / largest[None, :]).to(third_ptr.dtype.element_ty))
    per_total = tl.where(total > 1.0e-30, 1.0 / tl.maximum(total, 1.0e-30), 0.0)
    tl.store(third_scale_ptr + lane * DIM + column, tl.where(some, largest * per_total, 0.0))
