"""Routing: predicted softmax mass of every (query unit, key block), and the lists of blocks that are worth exact attention."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _running_softmax(q, mean, log_mass, factor, top, mass, PRECISION: tl.constexpr):
    """Maximum and sum of the log2 logits of one more tile of block means. q [UNITS, DIM]; mean [BLOCKS, DIM]."""
    logit = tl.dot(q, tl.trans(mean), input_precision=PRECISION) * factor + log_mass[None, :]
    new_top = tl.maximum(top, tl.max(logit, 1))
    return new_top, mass * tl.exp2(top - new_top) + tl.sum(tl.exp2(logit - new_top[:, None]), 1)


@triton.jit
def _probability(q, mean, log_mass, factor, log_total, share, PRECISION: tl.constexpr):
    """Softmax over all block means, times the share of the unit's tokens that q stands for. [UNITS, BLOCKS]"""
    logit = tl.dot(q, tl.trans(mean), input_precision=PRECISION) * factor + log_mass[None, :]
    return tl.exp2(logit - log_total[:, None]) * share[:, None]


@triton.jit
def score_kernel(sample_ptr, share_ptr, mean_k_ptr, log_mass_ptr, code_ptr, best_ptr, histogram_ptr, factor,
                 n_units, n_blocks, far_stride, GROUP, DIM: tl.constexpr, UNITS: tl.constexpr, BLOCKS: tl.constexpr, BINS: tl.constexpr,
                 PRECISION: tl.constexpr):
    """Code [heads, units, blocks] of the mean softmax mass over the four samples of a unit.

    For a mass of 2^x times that of a flat softmax the code is proportional to x / (1 + |x|): fine steps where heads are flat, and 2 to 4%
    of the mass where thresholds of peaked heads lie. Writes each unit's best block and counts the codes of each head. factor: scale * log2 e. Grid (units / UNITS, heads).
    """
    lane = tl.program_id(1).to(tl.int64)
    kv_lane = lane // GROUP
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    dim = tl.arange(0, DIM)
    real = unit < n_units
    sample = sample_ptr + (lane * 4 * n_units + unit[:, None]) * DIM + dim[None, :]
    step = n_units * DIM
    q0 = tl.load(sample, mask=real[:, None], other=0.0)
    q1 = tl.load(sample + step, mask=real[:, None], other=0.0)
    q2 = tl.load(sample + 2 * step, mask=real[:, None], other=0.0)
    q3 = tl.load(sample + 3 * step, mask=real[:, None], other=0.0)
    top0 = tl.full((UNITS,), -1.0e30, tl.float32)
    top1, top2, top3 = top0, top0, top0
    mass0 = tl.zeros((UNITS,), tl.float32)
    mass1, mass2, mass3 = mass0, mass0, mass0
    mean_base = mean_k_ptr + kv_lane * n_blocks * DIM
    for first in range(0, n_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        mean = tl.load(mean_base + block[:, None] * DIM + dim[None, :], mask=(block < n_blocks)[:, None], other=0.0)
        log_mass = tl.load(log_mass_ptr + kv_lane * far_stride + block, mask=block < n_blocks, other=float("-inf"))
        top0, mass0 = _running_softmax(q0, mean, log_mass, factor, top0, mass0, PRECISION)
        top1, mass1 = _running_softmax(q1, mean, log_mass, factor, top1, mass1, PRECISION)
        top2, mass2 = _running_softmax(q2, mean, log_mass, factor, top2, mass2, PRECISION)
        top3, mass3 = _running_softmax(q3, mean, log_mass, factor, top3, mass3, PRECISION)
    total0 = top0 + tl.log2(mass0)
    total1 = top1 + tl.log2(mass1)
    total2 = top2 + tl.log2(mass2)
    total3 = top3 + tl.log2(mass3)
    share0 = tl.load(share_ptr + unit, mask=real, other=0.0)
    share1 = tl.load(share_ptr + n_units + unit, mask=real, other=0.0)
    share2 = tl.load(share_ptr + 2 * n_units + unit, mask=real, other=0.0)
    share3 = tl.load(share_ptr + 3 * n_units + unit, mask=real, other=0.0)
    counts = tl.zeros((BINS,), tl.int32)
    best_mass = tl.full((UNITS,), -1.0, tl.float32)
    best = tl.zeros((UNITS,), tl.int32)
    for first in range(0, n_blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        mean = tl.load(mean_base + block[:, None] * DIM + dim[None, :], mask=(block < n_blocks)[:, None], other=0.0)
        log_mass = tl.load(log_mass_ptr + kv_lane * far_stride + block, mask=block < n_blocks, other=float("-inf"))
        mass = _probability(q0, mean, log_mass, factor, total0, share0, PRECISION)
        mass += _probability(q1, mean, log_mass, factor, total1, share1, PRECISION)
        mass += _probability(q2, mean, log_mass, factor, total2, share2, PRECISION)
        mass += _probability(q3, mean, log_mass, factor, total3, share3, PRECISION)
        tile_best, tile_at = tl.max(mass, 1, return_indices=True)
        best = tl.where(tile_best > best_mass, first + tile_at, best)
        best_mass = tl.maximum(best_mass, tile_best)
        octaves = tl.maximum(tl.log2(mass * n_blocks), -1.0e3)
        code = (BINS // 2 + (BINS // 2 - 1) * octaves / (1.0 + tl.abs(octaves))).to(tl.int32)
        valid = real[:, None] & (block < n_blocks)[None, :]
        tl.store(code_ptr + (lane * n_units + unit[:, None]) * far_stride + block[None, :], code.to(tl.int16), mask=valid)
        # What lies outside is counted in bin 0, where nothing depends on it.
        counts += tl.histogram(tl.reshape(tl.where(valid, code, 0), (UNITS * BLOCKS,)), BINS)
    tl.store(best_ptr + lane * n_units + unit, best, mask=real)
    tl.atomic_add(histogram_ptr + lane * BINS + tl.arange(0, BINS), counts)


@triton.jit
def select_kernel(code_ptr, best_ptr, histogram_ptr, log_mass_ptr, list_ptr, count_ptr, wanted,
                  n_units, n_image_units, n_image_blocks, n_key_blocks, far_stride, GROUP,
                  UNIT_BLOCKS: tl.constexpr, UNITS: tl.constexpr, BLOCKS: tl.constexpr, BINS: tl.constexpr):
    """Codes -> 1 where a block is near, else 0, in place, and 1 in the padding of a row; and each unit's near blocks as a
    list, blocks outside the image last.

    Near are the most massive bins of the head that hold at most `wanted` pairs, the unit's own blocks and its best one, and one more
    block where that makes the length even. Units of tokens outside the image see every block. Grid (units / UNITS, heads).
    """
    lane = tl.program_id(1).to(tl.int64)
    kv_lane = lane // GROUP
    unit = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    real = unit < n_units
    in_image = unit < n_image_units
    counts = tl.load(histogram_ptr + lane * BINS + tl.arange(0, BINS))
    from_here_up = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    threshold = tl.sum((from_here_up > wanted).to(tl.int32), 0)
    best = tl.load(best_ptr + lane * n_image_units + unit, mask=in_image, other=0)
    out = list_ptr + (lane * n_units + unit[:, None]) * n_key_blocks
    length = tl.zeros((UNITS,), tl.int32)
    last_far = tl.full((UNITS,), -1, tl.int32)
    for first in range(0, tl.maximum(n_key_blocks, far_stride), BLOCKS):
        block = (first + tl.arange(0, BLOCKS))[None, :]
        code_at = code_ptr + (lane * n_image_units + unit[:, None]) * far_stride + block
        code = tl.load(code_at, mask=in_image[:, None] & (block < n_image_blocks), other=0).to(tl.int32)
        log_mass = tl.load(log_mass_ptr + kv_lane * far_stride + block, mask=block < n_image_blocks, other=0.0)
        near = (code >= threshold) | (block // UNIT_BLOCKS == unit[:, None]) | (block == best[:, None])
        near = (near & (log_mass > float("-inf"))) | (block >= n_image_blocks) | ~in_image[:, None]
        tl.store(code_at, near.to(tl.int16), mask=in_image[:, None] & (block < far_stride))
        near = (near & (block < n_key_blocks)).to(tl.int32)
        place = length[:, None] + tl.cumsum(near, 1) - 1
        tl.store(out + place, tl.broadcast_to(block, (UNITS, BLOCKS)), mask=(near > 0) & real[:, None])
        length += tl.sum(near, 1)
        last_far = tl.maximum(last_far, tl.max(tl.where((near == 0) & (block < n_image_blocks), block, -1), 1))
    # n_key_blocks is even, so that a list of odd length leaves a block out.
    odd = (length % 2 == 1) & (last_far >= 0)
    last_far = tl.maximum(last_far, 0)
    tl.store(code_ptr + (lane * n_image_units + unit) * far_stride + last_far, tl.full((UNITS,), 1, tl.int16), mask=odd & real)
    tl.store(list_ptr + (lane * n_units + unit) * n_key_blocks + length, last_far, mask=odd & real)
    length += odd.to(tl.int32)
    tl.store(count_ptr + lane * n_units + unit, length, mask=real)
