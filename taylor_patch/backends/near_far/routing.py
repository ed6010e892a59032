"""Routing: predicted softmax mass of every (query unit, key block), and the lists of blocks that are worth exact attention."""

from __future__ import annotations

import triton
import triton.language as tl

from taylor_patch.backends.near_far.layout import SIZES


@triton.jit
def bin_of(octaves, BINS: tl.constexpr):
    """Histogram bin of 2^octaves times the mean mass, proportional to x / (1 + |x|).

    Steps are fine where heads are flat, and 2 to 4% of the mass where the thresholds of peaked heads lie.
    """
    return (BINS // 2 + (BINS // 2 - 1) * octaves / (1.0 + tl.abs(octaves))).to(tl.int32)


@triton.jit
def raised(octaves):
    """The score of a block that is near whatever its mass: above all others, and in bin BINS - 2 as all of its kind."""
    return octaves + 2.0e3


@triton.jit
def lowered(octaves):
    """A score as the mass gives it, raised or not; masses are between -1000 and log2 of the number of blocks."""
    return tl.where(octaves > 5.0e2, octaves - 2.0e3, octaves)


@triton.jit(do_not_specialize=SIZES)
def total_kernel(sample_ptr, share_ptr, mean_k_ptr, log_mass_ptr, log_total_ptr, factor, n_keys, n_queries, far_stride, GROUP,
                 DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SAMPLES: tl.constexpr, PRECISION: tl.constexpr):
    """log2 of the sum over all block means of n_b exp(scale q.k_b), less log2 of the share that a sample has in its block.

    [heads, SAMPLES, n_queries]. n_keys, n_queries: image blocks of keys and queries. factor: scale * log2 e. Grid (n_queries / QUERIES, heads).
    """
    lane = tl.program_id(1).to(tl.int64)
    kv_lane = lane // GROUP
    dim = tl.arange(0, DIM)
    row = tl.arange(0, SAMPLES * QUERIES)
    query = tl.program_id(0) * QUERIES + row % QUERIES
    at = row // QUERIES * n_queries + query
    q = tl.load(sample_ptr + (lane * SAMPLES * n_queries + at[:, None]) * DIM + dim[None, :], mask=(query < n_queries)[:, None], other=0.0)
    top = tl.full((SAMPLES * QUERIES,), -1.0e30, tl.float32)
    total = tl.zeros((SAMPLES * QUERIES,), tl.float32)
    for first in range(0, n_keys, KEYS):
        key = first + tl.arange(0, KEYS)
        mean = tl.load(mean_k_ptr + (kv_lane * n_keys + key[:, None]) * DIM + dim[None, :], mask=(key < n_keys)[:, None], other=0.0)
        log_mass = tl.load(log_mass_ptr + kv_lane * far_stride + key, mask=key < n_keys, other=float("-inf"))
        logit = tl.dot(q, tl.trans(mean), input_precision=PRECISION) * factor + log_mass[None, :]
        new_top = tl.maximum(top, tl.max(logit, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(logit - new_top[:, None]), 1)
        top = new_top
    share = tl.load(share_ptr + at, mask=query < n_queries, other=0.0)
    tl.store(log_total_ptr + lane * SAMPLES * n_queries + at, top + tl.log2(total) - tl.log2(share), mask=query < n_queries)


@triton.jit
def _mass(q, log_total, mean, log_mass, factor, PRECISION: tl.constexpr):
    """Share of the softmax mass of query blocks that one of their samples q [QUERIES, DIM] gives to block means [KEYS, DIM]."""
    return tl.exp2(tl.dot(q, tl.trans(mean), input_precision=PRECISION) * factor + log_mass[None, :] - log_total[:, None])


@triton.jit(do_not_specialize=SIZES)
def score_kernel(sample_ptr, log_total_ptr, mean_k_ptr, log_mass_ptr, far_ptr, histogram_ptr, factor, n_keys, n_queries, far_stride, across,
                 GROUP, NEIGHBOURS: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STEPS: tl.constexpr,
                 BINS: tl.constexpr, SAMPLES: tl.constexpr, PRECISION: tl.constexpr):
    """log2 of the mean softmax mass over the four samples of a query block, over that of a flat softmax [heads, n_queries, far_stride].

    Counts one tile of scores in STEPS in the head's histogram, whose last entry is the number of scores counted. NEIGHBOURS: blocks that
    share an edge or a corner, `across` of them side by side, are raised above all others.
    Grid (n_queries / QUERIES, n_keys / (KEYS STEPS), heads).
    """
    lane = tl.program_id(2).to(tl.int64)
    kv_lane = lane // GROUP
    dim = tl.arange(0, DIM)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    real = query < n_queries
    tl.static_assert(SAMPLES == 4)
    row = lane * SAMPLES * n_queries + query
    sample = sample_ptr + row[:, None] * DIM + dim[None, :]
    q0 = tl.load(sample, mask=real[:, None], other=0.0)
    q1 = tl.load(sample + n_queries * DIM, mask=real[:, None], other=0.0)
    q2 = tl.load(sample + 2 * n_queries * DIM, mask=real[:, None], other=0.0)
    q3 = tl.load(sample + 3 * n_queries * DIM, mask=real[:, None], other=0.0)
    total0 = tl.load(log_total_ptr + row, mask=real, other=0.0)
    total1 = tl.load(log_total_ptr + row + n_queries, mask=real, other=0.0)
    total2 = tl.load(log_total_ptr + row + 2 * n_queries, mask=real, other=0.0)
    total3 = tl.load(log_total_ptr + row + 3 * n_queries, mask=real, other=0.0)
    start = tl.program_id(1) * (KEYS * STEPS)
    for first in range(start, tl.minimum(start + KEYS * STEPS, n_keys), KEYS):
        key = first + tl.arange(0, KEYS)
        mean = tl.load(mean_k_ptr + (kv_lane * n_keys + key[:, None]) * DIM + dim[None, :], mask=(key < n_keys)[:, None], other=0.0)
        log_mass = tl.load(log_mass_ptr + kv_lane * far_stride + key, mask=key < n_keys, other=float("-inf"))
        mass = _mass(q0, total0, mean, log_mass, factor, PRECISION)
        mass += _mass(q1, total1, mean, log_mass, factor, PRECISION)
        mass += _mass(q2, total2, mean, log_mass, factor, PRECISION)
        mass += _mass(q3, total3, mean, log_mass, factor, PRECISION)
        octaves = tl.maximum(tl.log2(mass * n_keys), -1.0e3)
        if NEIGHBOURS:
            down = tl.abs((query // across)[:, None] - (key // across)[None, :])
            right = tl.abs((query % across)[:, None] - (key % across)[None, :])
            octaves = tl.where(tl.maximum(down, right) == 1, raised(octaves), octaves)
        valid = real[:, None] & (key < n_keys)[None, :]
        tl.store(far_ptr + (lane * n_queries + query[:, None]) * far_stride + key[None, :], octaves, mask=valid)
        if first == start:
            # What lies outside is counted in bin 0, where nothing depends on it.
            counts = tl.histogram(tl.reshape(tl.where(valid, bin_of(octaves, BINS), 0), (QUERIES * KEYS,)), BINS)
            tl.atomic_add(histogram_ptr + lane * (2 * BINS) + tl.arange(0, BINS), counts)
            tl.atomic_add(histogram_ptr + lane * (2 * BINS) + BINS, tl.sum(tl.sum(valid.to(tl.int32), 1), 0))


@triton.jit
def threshold_bin(histogram, density, BINS: tl.constexpr):
    """Least bin of the most massive ones that hold at most the share `density` of the scores counted, but not above that of raised scores; 0
    for a density of 1."""
    counts = tl.load(histogram + tl.arange(0, BINS))
    wanted = density * tl.load(histogram + BINS).to(tl.float32)
    from_here_up = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    found = tl.where(density < 1.0, tl.sum((from_here_up.to(tl.float32) > wanted).to(tl.int32), 0), 0)
    return tl.minimum(found, BINS - 2)


@triton.jit(do_not_specialize=SIZES)
def select_kernel(far_ptr, histogram_ptr, log_mass_ptr, list_ptr, count_ptr, density, setting_ptr, always_ptr, n_blocks,
                  n_image_blocks, n_query_blocks, n_query_image_blocks, far_stride, GROUP, QUERIES: tl.constexpr, KEYS: tl.constexpr,
                  BINS: tl.constexpr, AIMED: tl.constexpr, OWN: tl.constexpr):
    """Scores -> log2 masses of the far blocks of each query block, in place, -inf where a block is near or does not exist; and the near
    blocks of each query block as a list.

    Near are the most massive bins of the head that hold at most the share `density` of the pairs that were counted (raised scores first),
    its best block and, with OWN, the query block itself. AIMED: the density is that of the head's setting, and key blocks with `always`
    are near for every query (aim.py). Queries outside the image see every block. Grid (query blocks / QUERIES, heads).
    """
    lane = tl.program_id(1).to(tl.int64)
    kv_lane = lane // GROUP
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    in_image = query < n_query_image_blocks
    if AIMED:
        density = tl.load(setting_ptr + lane * 4)
    threshold = threshold_bin(histogram_ptr + lane * (2 * BINS), density, BINS)
    best_score = tl.full((QUERIES,), -1.0e4, tl.float32)
    best = tl.zeros((QUERIES,), tl.int32)
    best_near = tl.zeros((QUERIES,), tl.int32)
    out = list_ptr + (lane * n_query_blocks + query[:, None]) * n_blocks
    length = tl.zeros((QUERIES,), tl.int32)
    for first in range(0, tl.maximum(n_blocks, far_stride), KEYS):
        key = (first + tl.arange(0, KEYS))[None, :]
        far_at = far_ptr + (lane * n_query_image_blocks + query[:, None]) * far_stride + key
        octaves = tl.load(far_at, mask=in_image[:, None] & (key < n_image_blocks), other=-1.0e3)
        log_mass = tl.load(log_mass_ptr + kv_lane * far_stride + key, mask=key < n_image_blocks, other=float("-inf"))
        tile_best, tile_at = tl.max(lowered(octaves), 1, return_indices=True)
        near = bin_of(octaves, BINS) >= threshold
        if OWN:
            near |= key == query[:, None]
        if AIMED:
            near |= tl.load(always_ptr + lane * n_image_blocks + key, mask=key < n_image_blocks, other=0) != 0
        better = tile_best > best_score
        tile_near = tl.sum((near & (key == first + tile_at[:, None])).to(tl.int32), 1)
        best, best_near = tl.where(better, first + tile_at, best), tl.where(better, tile_near, best_near)
        best_score = tl.maximum(best_score, tile_best)
        near = (near & (log_mass > float("-inf"))) | (key >= n_image_blocks) | ~in_image[:, None]
        tl.store(far_at, tl.where(near, float("-inf"), log_mass), mask=in_image[:, None] & (key < far_stride))
        near = (near & (key < n_blocks)).to(tl.int32)
        place = length[:, None] + tl.cumsum(near, 1) - 1
        entry = tl.broadcast_to(key, (QUERIES, KEYS)).to(list_ptr.dtype.element_ty)
        tl.store(out + place, entry, mask=(near > 0) & (query < n_query_blocks)[:, None])
        length += tl.sum(near, 1)
    missed = in_image & (best_near == 0)
    tl.debug_barrier()  # the loop has stored this block's mass from another thread
    tl.store(far_ptr + (lane * n_query_image_blocks + query) * far_stride + best, tl.full((QUERIES,), float("-inf"), tl.float32), mask=missed)
    tl.store(list_ptr + (lane * n_query_blocks + query) * n_blocks + length, best.to(list_ptr.dtype.element_ty), mask=missed)
    length += missed.to(tl.int32)
    tl.store(count_ptr + lane * n_query_blocks + query, length, mask=query < n_query_blocks)


@triton.jit(do_not_specialize=SIZES)
def order_kernel(count_ptr, order_ptr, n_query_blocks, n_query_image_blocks, QUERIES: tl.constexpr, OTHERS: tl.constexpr):
    """order [heads, image blocks of the queries]: the query blocks of a head, the longest lists first, so that programs that run side by
    side end together. Grid (image blocks of the queries / QUERIES, heads)."""
    lane = tl.program_id(1).to(tl.int64)
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    count = tl.load(count_ptr + lane * n_query_blocks + query, mask=query < n_query_image_blocks, other=0)
    rank = tl.zeros((QUERIES,), tl.int32)
    for first in range(0, n_query_image_blocks, OTHERS):
        other = first + tl.arange(0, OTHERS)
        length = tl.load(count_ptr + lane * n_query_blocks + other, mask=other < n_query_image_blocks, other=-1)
        before = (length[None, :] > count[:, None]) | ((length[None, :] == count[:, None]) & (other[None, :] < query[:, None]))
        rank += tl.sum(before.to(tl.int32), 1)
    tl.store(order_ptr + lane * n_query_image_blocks + rank, query, mask=query < n_query_image_blocks)
