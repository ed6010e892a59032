"""The probe of aim.py in Triton: 64 rows of every head exactly and with each density, all on the device."""

from __future__ import annotations

import triton
import triton.language as tl

from taylor_patch.backends.near_far.kernel import tilt
from taylor_patch.backends.near_far.layout import SIZES, block_tokens
from taylor_patch.backends.near_far.routing import bin_of, threshold_bin


@triton.jit
def _rows(n_query_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
          FIRST: tl.constexpr, STEP: tl.constexpr):
    """Block, token and whether there is one, of the 64 rows (aim.probe_rows)."""
    i = tl.arange(0, 64)
    block = (2 * i + 1) * n_query_image_blocks // 128
    token, filled = block_tokens(block, (STEP * i + FIRST) % 64, n_query_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H,
                                 TILE_W)
    return block, token, filled


@triton.jit
def _query(q_ptr, stride_qb, stride_qh, stride_qn, stride_qd, first_head, lane, n_heads, token, filled, D: tl.constexpr, DIM: tl.constexpr):
    """[64, DIM], as they come."""
    dim = tl.arange(0, DIM)
    batch, head = (first_head + lane) // n_heads, (first_head + lane) % n_heads
    return tl.load(q_ptr + batch * stride_qb + head * stride_qh + token.to(tl.int64)[:, None] * stride_qn + dim[None, :] * stride_qd,
                   mask=filled[:, None] & (dim[None, :] < D), other=0.0)


@triton.jit
def _is_near(far_ptr, always_ptr, lane, row_block, key, n_image_blocks, n_query_image_blocks, far_stride, threshold, BINS: tl.constexpr,
             OWN: tl.constexpr):
    """Whether key blocks `key` are near to query blocks `row_block`; the two broadcast."""
    octaves = tl.load(far_ptr + (lane * n_query_image_blocks + row_block) * far_stride + key, mask=key < n_image_blocks, other=-1.0e3)
    always = tl.load(always_ptr + lane * n_image_blocks + key, mask=key < n_image_blocks, other=0)
    near = (bin_of(octaves, BINS) >= threshold) | (always != 0)
    if OWN:
        near |= key == row_block
    return near


@triton.jit(do_not_specialize=SIZES)
def probe_kernel(q_ptr, stride_qb, stride_qh, stride_qn, stride_qd, k_ptr, v_ptr, bias_ptr, far_ptr, histogram_ptr, always_ptr, density_ptr,
                 numerator_ptr, top_ptr, mass_ptr, block_mass_ptr, scale, first_head, n_heads, GROUP, n_blocks, n_image_blocks,
                 n_query_image_blocks, far_stride, blocks_each, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T: tl.constexpr,
                 TILE_H: tl.constexpr, TILE_W: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, PLACE_FIRST: tl.constexpr,
                 PLACE_STEP: tl.constexpr, BINS: tl.constexpr, BIASED: tl.constexpr, EXACT: tl.constexpr, OWN: tl.constexpr,
                 PRECISION: tl.constexpr):
    """Near field of the 64 rows over one share of the key blocks, for each density; with EXACT over all of them.

    Unnormalised sums [heads, densities (1 with EXACT), splits, 64, DIM], their tops (log2) and masses [..., 64]; with EXACT also
    log2 of the mass of every image block, block_mass [heads, 64, image blocks]. Grid (densities, heads, splits).
    """
    number, split = tl.program_id(0), tl.program_id(2)
    lane = tl.program_id(1).to(tl.int64)
    kv_lane = lane // GROUP
    factor = scale * 1.4426950408889634
    dim = tl.arange(0, DIM)
    place = tl.arange(0, 64)
    row_block, token, filled = _rows(n_query_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W, PLACE_FIRST,
                                     PLACE_STEP)
    q = _query(q_ptr, stride_qb, stride_qh, stride_qn, stride_qd, first_head, lane, n_heads, token, filled, D, DIM)
    threshold = 0
    if not EXACT:
        threshold = threshold_bin(histogram_ptr + lane * (2 * BINS), tl.load(density_ptr + number), BINS)
    top = tl.full((64,), -1.0e30, tl.float32)
    mass = tl.zeros((64,), tl.float32)
    total = tl.zeros((64, DIM), tl.float32)
    for block in range(split * blocks_each, tl.minimum((split + 1) * blocks_each, n_blocks)):
        row = (kv_lane * n_blocks + block) * 64 + place
        k = tl.load(k_ptr + row[:, None] * DIM + dim[None, :])
        logit = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
        if BIASED:
            logit += tl.load(bias_ptr + row)[None, :]
        if not EXACT:
            near = _is_near(far_ptr, always_ptr, lane, row_block, block + tl.zeros_like(row_block), n_image_blocks, n_query_image_blocks,
                            far_stride, threshold, BINS, OWN)
            logit = tl.where((near | (block >= n_image_blocks))[:, None], logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        weight = tl.exp2(logit - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        here = tl.sum(weight, 1)
        mass = mass * shrink + here
        v = tl.load(v_ptr + row[:, None] * DIM + dim[None, :])
        total = tl.dot(weight.to(v.dtype), v, total * shrink[:, None], input_precision=PRECISION)
        top = new_top
        if EXACT:
            tl.store(block_mass_ptr + (lane * 64 + place) * n_image_blocks + block, new_top + tl.log2(here),
                     mask=block + 0 * place < n_image_blocks)
    at = ((lane * tl.num_programs(0) + number) * tl.num_programs(2) + split) * 64 + place
    tl.store(numerator_ptr + at[:, None] * DIM + dim[None, :], total)
    tl.store(top_ptr + at, top)
    tl.store(mass_ptr + at, mass)


@triton.jit
def _merged(numerator_ptr, top_ptr, mass_ptr, first, splits, DIM: tl.constexpr):
    """(sums [64, DIM], top, mass) over the splits of a probe; `first` is the number of the first split."""
    dim = tl.arange(0, DIM)
    place = tl.arange(0, 64)
    top = tl.full((64,), -1.0e30, tl.float32)
    mass = tl.zeros((64,), tl.float32)
    total = tl.zeros((64, DIM), tl.float32)
    for split in range(splits):
        at = (first + split) * 64 + place
        part_top = tl.load(top_ptr + at)
        new_top = tl.maximum(top, part_top)
        old, new = tl.exp2(top - new_top), tl.exp2(part_top - new_top)
        mass = mass * old + tl.load(mass_ptr + at) * new
        total = total * old[:, None] + tl.load(numerator_ptr + at[:, None] * DIM + dim[None, :]) * new[:, None]
        top = new_top
    return total, top, mass


@triton.jit(do_not_specialize=SIZES)
def sink_kernel(top_ptr, mass_ptr, block_mass_ptr, always_ptr, least_share, n_image_blocks, n_query_image_blocks, n_splits, GRID_T, GRID_H,
                GRID_W, START, OUTSIDE, TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, PLACE_FIRST: tl.constexpr,
                PLACE_STEP: tl.constexpr, ROWS: tl.constexpr):
    """always [heads, image blocks] int8: 1 where a block has more than least_share of the softmax in more than ROWS of the 64 rows.

    Grid (image blocks / 64, heads).
    """
    lane = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, 64)
    key = tl.program_id(0) * 64 + tl.arange(0, 64)
    _, _, filled = _rows(n_query_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W, PLACE_FIRST, PLACE_STEP)
    top = tl.full((64,), -1.0e30, tl.float32)
    mass = tl.zeros((64,), tl.float32)
    for split in range(n_splits):
        at = (lane * n_splits + split) * 64 + place
        part_top = tl.load(top_ptr + at)
        new_top = tl.maximum(top, part_top)
        mass = mass * tl.exp2(top - new_top) + tl.load(mass_ptr + at) * tl.exp2(part_top - new_top)
        top = new_top
    octaves = tl.load(block_mass_ptr + (lane * 64 + place[:, None]) * n_image_blocks + key[None, :], mask=(key < n_image_blocks)[None, :],
                      other=float("-inf"))
    share = tl.exp2(octaves - (top + tl.log2(mass))[:, None])
    dominated = tl.sum(((share > least_share) & filled[:, None]).to(tl.float32), 0)
    always = dominated > ROWS * tl.sum(filled.to(tl.float32), 0)
    tl.store(always_ptr + lane * n_image_blocks + key, always.to(tl.int8), mask=key < n_image_blocks)


@triton.jit(do_not_specialize=SIZES)
def tail_kernel(q_ptr, stride_qb, stride_qh, stride_qn, stride_qd, mean_k_ptr, mean_v_ptr, log_mass_ptr, trace_ptr, mean_trace_ptr, centre_ptr,
                covariance_ptr, column_scale_ptr, far_ptr, histogram_ptr, always_ptr, density_ptr, factor_ptr, exact_numerator_ptr,
                exact_top_ptr, exact_mass_ptr, numerator_ptr, top_ptr, mass_ptr, sums_ptr, scale, first_head, n_heads, GROUP, n_image_blocks,
                n_query_image_blocks, far_stride, n_splits, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T: tl.constexpr, TILE_H: tl.constexpr,
                TILE_W: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, FAR: tl.constexpr, PLACE_FIRST: tl.constexpr,
                PLACE_STEP: tl.constexpr, BINS: tl.constexpr, OWN: tl.constexpr, PRECISION: tl.constexpr):
    """Far field of the 64 rows for each density and factor, put together with the near field and compared with the exact rows.

    sums [heads, densities, factors, 4] float32: r.r, r.b, b.b, exact.exact over the rows (aim.choose). Grid (factors, densities, heads).
    """
    which, number = tl.program_id(0), tl.program_id(1)
    lane = tl.program_id(2).to(tl.int64)
    kv_lane = lane // GROUP
    factor = scale * 1.4426950408889634
    dim = tl.arange(0, DIM)
    row_block, token, filled = _rows(n_query_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE, TILE_T, TILE_H, TILE_W, PLACE_FIRST,
                                     PLACE_STEP)
    q = _query(q_ptr, stride_qb, stride_qh, stride_qn, stride_qd, first_head, lane, n_heads, token, filled, D, DIM)
    threshold = threshold_bin(histogram_ptr + lane * (2 * BINS), tl.load(density_ptr + number), BINS)
    total, top, mass = _merged(numerator_ptr, top_ptr, mass_ptr, (lane * tl.num_programs(1) + number) * n_splits, n_splits, DIM)
    rows = kv_lane * (2 * DIM) + dim
    covariance = tl.load(covariance_ptr + rows[:, None] * DIM + dim[None, :])
    qs = tl.dot(q, covariance, input_precision=PRECISION) * tl.load(column_scale_ptr + kv_lane * (2 * DIM) + dim)[None, :]
    spread, counts = tilt(tl.sum(qs * q.to(tl.float32), 1) * (scale * scale))
    spread *= tl.load(factor_ptr + which) / tl.maximum(tl.load(mean_trace_ptr + kv_lane), 1.0e-30)
    # The means are those of k less a centre.
    away = tl.sum(q.to(tl.float32) * tl.load(centre_ptr + kv_lane * DIM + dim)[None, :], 1) * factor
    tail = tl.zeros((64,), tl.float32)
    for first in range(0, n_image_blocks, FAR):
        key = first + tl.arange(0, FAR)
        at = (kv_lane * n_image_blocks + key)[:, None] * DIM + dim[None, :]
        mean_k = tl.load(mean_k_ptr + at, mask=(key < n_image_blocks)[:, None], other=0.0)
        log_mass = tl.load(log_mass_ptr + kv_lane * far_stride + key, mask=key < n_image_blocks, other=float("-inf"))
        trace = tl.load(trace_ptr + kv_lane * far_stride + key, mask=key < n_image_blocks, other=0.0)
        logit = tl.dot(q, tl.trans(mean_k), input_precision=PRECISION) * factor + (away[:, None] + log_mass[None, :])
        logit += spread[:, None] * trace[None, :]
        near = _is_near(far_ptr, always_ptr, lane, row_block[:, None], key[None, :], n_image_blocks, n_query_image_blocks, far_stride,
                        threshold, BINS, OWN)
        logit = tl.where(near, float("-inf"), logit)
        new_top = tl.maximum(top, tl.max(logit, 1))
        weight = tl.exp2(logit - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        here = tl.sum(weight, 1)
        tail = tail * shrink + here
        mass = mass * shrink + here
        mean_v = tl.load(mean_v_ptr + at, mask=(key < n_image_blocks)[:, None], other=0.0)
        total = tl.dot(weight.to(mean_v.dtype), mean_v, total * shrink[:, None], input_precision=PRECISION)
        top = new_top
    rows += DIM
    covariance = tl.load(covariance_ptr + rows[:, None] * DIM + dim[None, :])
    share = tail / mass * counts * scale
    linear = tl.dot(q, covariance, input_precision=PRECISION) * tl.load(column_scale_ptr + kv_lane * (2 * DIM) + DIM + dim)[None, :]
    real = filled.to(tl.float32)[:, None]
    linear = linear * share[:, None] * real
    exact, _, exact_mass = _merged(exact_numerator_ptr, exact_top_ptr, exact_mass_ptr, lane * n_splits, n_splits, DIM)
    exact = exact / exact_mass[:, None] * real
    missing = exact - total / mass[:, None] * real
    out = sums_ptr + ((lane * tl.num_programs(1) + number) * tl.num_programs(0) + which) * 4
    tl.store(out, tl.sum(tl.sum(missing * missing, 1), 0))
    tl.store(out + 1, tl.sum(tl.sum(missing * linear, 1), 0))
    tl.store(out + 2, tl.sum(tl.sum(linear * linear, 1), 0))
    tl.store(out + 3, tl.sum(tl.sum(exact * exact, 1), 0))


@triton.jit
def choose_kernel(sums_ptr, density_ptr, factor_ptr, setting_ptr, goal, DENSITIES: tl.constexpr, FACTORS: tl.constexpr,
                  LEAST: tl.constexpr, MOST: tl.constexpr, BETWEEN: tl.constexpr):
    """aim.choose: setting [heads, 4] from sums [heads, DENSITIES, FACTORS, 4]. goal: the error to meet. BETWEEN: aim.NOT, CHORD or
    POWER. Grid (heads,)."""
    lane = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, DENSITIES)
    f = tl.arange(0, FACTORS)
    at = sums_ptr + ((lane * DENSITIES + c[:, None]) * FACTORS + f[None, :]) * 4
    missing, both, linear, exact = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    scale = tl.minimum(tl.maximum(both / tl.maximum(linear, 1.1754943508222875e-38), LEAST), MOST)
    square = tl.maximum(missing - 2 * scale * both + scale * scale * linear, 0.0) / tl.maximum(exact, 1.1754943508222875e-38)
    # A maximum may drop a NaN: one in any of the sums must end as no density at all.
    sound = (missing + both + linear + exact == missing + both + linear + exact)
    errors = tl.where(sound, tl.sqrt(square), float("inf"))
    error, best = tl.min(errors, 1, return_indices=True)
    chosen = f[None, :] == best[:, None]
    scale = tl.sum(tl.where(chosen, scale, 0.0), 1)
    factor = tl.load(factor_ptr + best)
    first = tl.min(tl.where(error <= goal, c, DENSITIES), 0)
    here = tl.sum(tl.where(c == first, error, 0.0), 0)
    previous = tl.sum(tl.where(c == first - 1, error, 0.0), 0)
    found = first < DENSITIES
    high = tl.load(density_ptr + tl.minimum(first, DENSITIES - 1))
    low = tl.load(density_ptr + tl.maximum(first - 1, 0))
    inner = (first > 0) & (BETWEEN != 0)
    if BETWEEN == 2:
        part = tl.log2(previous / goal) / tl.log2(previous / tl.maximum(here, 1e-3 * goal))
        middle = tl.exp2(tl.log2(low) + part * (tl.log2(high) - tl.log2(low)))
    else:
        middle = low + (previous - goal) / tl.maximum(previous - here, 1.1754943508222875e-38) * (high - low)
    density = tl.where(inner & (previous < float("inf")), middle, high)
    out = setting_ptr + lane * 4
    tl.store(out, tl.where(found, density, 1.0))
    tl.store(out + 1, tl.where(found, tl.sum(tl.where(c == first, factor, 0.0), 0), 1.0))
    tl.store(out + 2, tl.where(found, tl.sum(tl.where(c == first, scale, 0.0), 0), 1.0))
    tl.store(out + 3, tl.where(found, tl.where(inner, goal, here), 0.0))
