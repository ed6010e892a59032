"""S and Z of the degrees from 2 on: features of the keys times values, summed over the keys."""

from __future__ import annotations

import triton
import triton.language as tl

from taylor_patch.backends.taylor.kernels.features import coordinates, lead_monomial, state_index, tile_columns, two_leads


@triton.jit
def _block(block, last_block, pairs_ptr, leads_ptr, inverse_ptr, first_lead, PAIRS: tl.constexpr, PAIRS_PAD: tl.constexpr,
           DEGREE: tl.constexpr):
    """Block number -> its tiles a and b, its lead's place in the table, and its weight (features/tiles.py)."""
    n = tl.arange(0, PAIRS_PAD)
    starts = tl.load(pairs_ptr + 3 * n + 2, mask=n < PAIRS, other=2147483647)
    block = tl.minimum(block, last_block)
    pair = tl.sum((starts <= block).to(tl.int32), 0) - 1
    a = tl.load(pairs_ptr + 3 * pair)
    b = tl.load(pairs_ptr + 3 * pair + 1)
    lead = block - tl.load(pairs_ptr + 3 * pair + 2) - first_lead
    inside = 0
    weight = 1.0
    if DEGREE == 3:
        inside = (lead >= 8 * a).to(tl.int32)
    elif DEGREE > 3:
        weight = tl.load(inverse_ptr + lead)
        for place in tl.static_range(DEGREE - 2):
            inside += (tl.load(leads_ptr + lead * (DEGREE - 2) + place) >= 8 * a).to(tl.int32)
    weight = weight / tl.cast(inside + 1, tl.float32)
    weight = tl.where(a == b, weight / tl.cast(inside + 2, tl.float32), weight)
    return a, b, lead, weight


@triton.jit
def _key_weights(k_base, factor_ptr, weight_ptr, weight_row, factor_row, leads_ptr, lead, mean_ptr, first, t, n_keys, root, k_sn, k_sd,
                 D: tl.constexpr, DEGREE: tl.constexpr, PAIRED: tl.constexpr, CENTER: tl.constexpr, HAS_FACTOR: tl.constexpr,
                 HAS_WEIGHT: tl.constexpr):
    """Weight times lead monomial of the keys from `first` on; zero for keys that are not there or hidden. PAIRED: for the next lead too."""
    ok = first + t < n_keys
    w = ok.to(tl.float32)
    if HAS_WEIGHT:
        w = tl.load(weight_ptr + weight_row + first + t, mask=ok, other=0.0)
    w0, w1 = w, w
    if DEGREE > 2:
        scaling = tl.zeros_like(w) + root
        if HAS_FACTOR:
            scaling = tl.load(factor_ptr + factor_row + first + t, mask=ok, other=0.0) * root
        k = k_base + first * k_sn
        if PAIRED:
            w0, w1 = tl.split(two_leads(k, t, ok, lead, k_sn, k_sd, mean_ptr, scaling, D, CENTER) * w[:, None])
        else:
            w0 = w * lead_monomial(k, t, ok, leads_ptr, lead, k_sn, k_sd, mean_ptr, scaling, D, DEGREE, CENTER)
    return w0, w1


@triton.jit
def _store_sums(s_ptr, z_ptr, block, state, rows_of_state, acc, z_acc, weight, stored, dv, DV: tl.constexpr, DV_ROW: tl.constexpr,
                DEGREE: tl.constexpr, LOW: tl.constexpr):
    """The sums of a block's features, times weight, as rows of S and Z. block: from the chunk's first on. LOW: Z in two parts."""
    f = tl.arange(0, acc.shape[0])
    row = state * rows_of_state + block.to(tl.int64) * 64
    z_sum = tl.sum(z_acc, 1) * weight
    dtype = s_ptr.dtype.element_ty
    if DEGREE == 3:
        out = s_ptr + row * DV_ROW + f[:, None] * DV_ROW
        z_at = state * rows_of_state + (block // 8).to(tl.int64) * 512 + block % 8 + f * 8
        tl.store(z_ptr + z_at, z_sum, mask=stored)
    else:
        out = s_ptr + row * (DV_ROW + 16) + f[:, None] * (DV_ROW + 16)
        z = tl.arange(0, 16)
        low = tl.zeros_like(z_sum)
        if LOW:
            low = z_sum - z_sum.to(dtype).to(tl.float32)
        tail = tl.where(z[None, :] == 0, z_sum[:, None], tl.where(z[None, :] == 1, low[:, None], 0.0))
        tl.store(out + DV_ROW + z[None, :], tail.to(dtype), mask=stored[:, None])
    tl.store(out + dv[None, :], (acc * weight[:, None]).to(dtype), mask=stored[:, None] & (dv < DV)[None, :])


@triton.jit
def accumulate_kernel(k_ptr, v_ptr, factor_ptr, weight_ptr, mean_ptr, norm_ptr, pairs_ptr, leads_ptr, inverse_ptr, probe_ptr, s_ptr, z_ptr,
                      n_keys, per_split, root, ratio, most_bad, states, first_state, first_block, last_block, first_lead,
                      k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, weight_sb,
                      HEADS_KV: tl.constexpr, SUB: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DV_ROW: tl.constexpr, DV_PAD: tl.constexpr,
                      V_FIRST: tl.constexpr, DEGREE: tl.constexpr, PAIRS: tl.constexpr,
                      PAIRS_PAD: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, CENTER: tl.constexpr,
                      HAS_FACTOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, PROBED: tl.constexpr, PARTIAL: tl.constexpr,
                      SPLIT_Z: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """BLOCKS (1 or 2) blocks of 64 features against the values, over one share of the keys.

    Two blocks of degree 2 have two pairs of tiles each and are one product of 128 features. Two of degree 3 are neighbouring leads of one
    pair (first_block and last_block are even), whose outer product is made once. s [splits, states, 64 * blocks, DV_ROW + 16]: with
    PARTIAL float32 sums, Z in the first of the 16 columns; otherwise the finished S and Z in s's dtype. In degree 3 the 16 columns are
    missing and Z goes to z [splits, states, blocks / 8, 64, 8] (first_block is a multiple of 8). Keys enter as
    root * factor * k - mean. Every sum is in float32, in a fixed order. PROBED: as in evaluate_kernel.
    """
    if PROBED:  # noqa: SIM102 (only compiled where there is a probe)
        if tl.load(probe_ptr) > most_bad:
            return
    PAIRED: tl.constexpr = BLOCKS == 2 and DEGREE == 3
    TWIN: tl.constexpr = BLOCKS == 2 and DEGREE == 2
    FEATURES: tl.constexpr = 128 if TWIN else 64
    local, split = tl.program_id(1), tl.program_id(2)
    b, head, sub = state_index(first_state + local, HEADS_KV, SUB)
    k_base = k_ptr + b * k_sb + head * k_sh + sub * D * k_sd
    v_base = v_ptr + b * v_sb + head * v_sh + (sub * D + V_FIRST) * v_sd
    block = first_block + BLOCKS * tl.program_id(0)
    a0, b0, lead, weight0 = _block(block, last_block - 1, pairs_ptr, leads_ptr, inverse_ptr, first_lead, PAIRS, PAIRS_PAD, DEGREE)
    a1, b1, _, weight1 = _block(block + 1, last_block - 1, pairs_ptr, leads_ptr, inverse_ptr, first_lead, PAIRS, PAIRS_PAD, DEGREE)
    # 16 coordinates a tile of x: tiles a and b; of twins both tiles a in x, both tiles b in y.
    c = tl.arange(0, 16)
    f = tl.arange(0, FEATURES)
    z = tl.arange(0, 16)
    t = tl.arange(0, BLOCK_N)
    dv = tl.arange(0, DV_PAD)
    mean = mean_ptr + local * D
    if TWIN:
        columns, right = tile_columns(a0, a1), tile_columns(b0, b1)
        right_mean = tl.load(mean + right, mask=right < D, other=0.0)
        spread = (c[None, :] == f[:, None] // 8).to(DTYPE)
        spread_right = (c[None, :] == (f[:, None] // 64) * 8 + f[:, None] % 8).to(DTYPE)
    else:
        r = tl.arange(0, 128)
        columns = tile_columns(a0, b0)
        spread = (c[None, :] == tl.where(r < 64, r // 8, 8 + r % 8)[:, None]).to(DTYPE)
    column_mean = tl.load(mean + columns, mask=columns < D, other=0.0)
    ones = tl.where(z[None, :] == 0, 1.0, 0.0).to(DTYPE) + tl.zeros([BLOCK_N, 16], DTYPE)
    acc = tl.zeros([FEATURES, DV_PAD], tl.float32)
    z_acc = tl.zeros([FEATURES, 16], tl.float32)
    if PAIRED:
        next_acc = tl.zeros([FEATURES, DV_PAD], tl.float32)
        next_z = tl.zeros([FEATURES, 16], tl.float32)
    begin, end = split * per_split, tl.minimum((split + 1) * per_split, n_keys)
    tl.assume(begin < end)
    # Weights are fetched a step ahead: single columns of k are no loads that the pipeliner takes.
    w0, w1 = _key_weights(k_base, factor_ptr, weight_ptr, b * weight_sb, (b * HEADS_KV + head) * n_keys, leads_ptr, lead, mean,
                          tl.cast(begin, tl.int64), t, n_keys, root, k_sn, k_sd, D, DEGREE, PAIRED, CENTER, HAS_FACTOR, HAS_WEIGHT)
    for start in range(begin, end, BLOCK_N):
        first = tl.cast(start, tl.int64)
        ok = start + t < n_keys
        k = k_base + first * k_sn
        scaling = tl.zeros([BLOCK_N], tl.float32) + root
        if HAS_FACTOR:
            scaling = tl.load(factor_ptr + (b * HEADS_KV + head) * n_keys + first + t, mask=ok, other=0.0) * root
        x = coordinates(k, t, columns, ok, k_sn, k_sd, D, EVEN) * scaling[:, None]
        if CENTER:
            x -= column_mean[None, :]
        if TWIN:
            x *= w0[:, None]
            y = coordinates(k, t, right, ok, k_sn, k_sd, D, EVEN) * scaling[:, None]
            if CENTER:
                y -= right_mean[None, :]
        elif not PAIRED:
            x *= tl.where((c < 8)[None, :], w0[:, None], 1.0)
        here0, here1 = w0, w1
        w0, w1 = _key_weights(k_base, factor_ptr, weight_ptr, b * weight_sb, (b * HEADS_KV + head) * n_keys, leads_ptr, lead, mean,
                              tl.cast(start + BLOCK_N, tl.int64), t, n_keys, root, k_sn, k_sd, D, DEGREE, PAIRED, CENTER, HAS_FACTOR,
                              HAS_WEIGHT)
        v = tl.load(v_base + first * v_sn + t[:, None] * v_sn + dv[None, :] * v_sd, mask=ok[:, None] & (dv < DV)[None, :], other=0.0)
        # [128, 16] @ [16, BLOCK_N], then [FEATURES, BLOCK_N] @ [BLOCK_N, DV]
        psi = tl.dot(spread, tl.trans(x.to(DTYPE)), input_precision=PRECISION)
        if TWIN:
            psi *= tl.dot(spread_right, tl.trans(y.to(DTYPE)), input_precision=PRECISION)
        else:
            upper, lower = tl.split(tl.permute(tl.reshape(psi, [2, 64, BLOCK_N]), (1, 2, 0)))
            psi = upper * lower
        if PAIRED:
            following = (psi * here1[None, :]).to(DTYPE)
            psi *= here0[None, :]
            next_acc = tl.dot(following, v.to(DTYPE), next_acc, input_precision=PRECISION)
            next_z = tl.dot(following, ones, next_z, input_precision=PRECISION)
        psi = psi.to(DTYPE)
        acc = tl.dot(psi, v.to(DTYPE), acc, input_precision=PRECISION)
        z_acc = tl.dot(psi, ones, z_acc, input_precision=PRECISION)
    power = tl.load(norm_ptr + local)
    for _ in tl.static_range(DEGREE):
        power *= ratio
    n_rows = (last_block - first_block).to(tl.int64) * 64
    state = split.to(tl.int64) * states + local
    LOW: tl.constexpr = SPLIT_Z and not PARTIAL
    _store_sums(s_ptr, z_ptr, block - first_block, state, n_rows, acc, z_acc, tl.where(f < 64, weight0, weight1) * power,
                block + f // 64 < last_block, dv, DV, DV_ROW, DEGREE, LOW)
    if PAIRED:
        _store_sums(s_ptr, z_ptr, block - first_block + 1, state, n_rows, next_acc, next_z, tl.zeros([FEATURES], tl.float32) + weight1 * power,
                    f < 64, dv, DV, DV_ROW, DEGREE, LOW)
