"""Triton kernels of the global Taylor backends. Imported only where Triton is (see taylor_launch.py).

Both passes are matrix products with a factor that is made on the fly. A block of 64 features is the outer product of two
tiles of 8 coordinates times a lead monomial (features/tiles.py):

    accumulate   S[f, :] = sum_j psi_f(k_j) v_j          psi' [128, tokens] @ v [tokens, D]
    evaluate     out[i, :] = sum_f psi_f(q_i) S[f, :]    psi [queries, 64] @ S [64, D]

Tiles are spread to 64 columns by a product with a constant matrix of zeros and ones: exact, and its result lies in the
registers in the layout that the next product wants, so features never pass through shared memory. Accumulation is in
float32. A row of S ends in 16 columns for Z: its rounding to S's dtype, the rest of it, and zeros. The denominator is thus
one more product of the same features, exact to two roundings of Z. In degree 3 such a product took a quarter of evaluate's time, so
there Z lies apart, in float32, as [blocks / 8, 64, 8 leads], and denominators are made from 16 leads at a time.

Loops are said to run at least once (tl.assume): with a path around one, on which ordinary instructions set the sums to zero,
ptxas makes every tensor-core product wait for the one before it (its message C7515), which costs about half the speed.
"""

from __future__ import annotations

import triton
import triton.language as tl

Z_COLUMNS = 16


@triton.jit
def _state_index(state, HEADS_KV: tl.constexpr, SUB: tl.constexpr):
    """State number -> batch entry, key head and sub-head block, int64."""
    state = state.to(tl.int64)
    return state // (HEADS_KV * SUB), (state // SUB) % HEADS_KV, state % SUB


@triton.jit
def _coordinates(base, tokens, columns, token_ok, stride_n, stride_d, D: tl.constexpr, EVEN: tl.constexpr):
    """x [tokens, columns] in float32; zeros for tokens that are not there and coordinates of D and above."""
    ok = token_ok[:, None]
    if not EVEN:
        ok = ok & (columns < D)[None, :]
    return tl.load(base + tokens[:, None] * stride_n + columns[None, :] * stride_d, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _columns(first, second):
    """16 coordinates: tile `first`, then tile `second`."""
    c = tl.arange(0, 16)
    return tl.max_contiguous(tl.multiple_of(tl.where(c < 8, first * 8 + c, second * 8 + c - 8), 8), 8)


@triton.jit
def _coefficient(variance, POWER: tl.constexpr, P: tl.constexpr):
    """Hermite coefficient of x^POWER / POWER!: sum over m with POWER + 2m < P of (-variance / 2)^m / m!."""
    total = tl.full(variance.shape, 1.0, tl.float32)
    term = total
    for m in tl.static_range(1, (P - 1 - POWER) // 2 + 1):
        term = term * variance * (-0.5 / m)
        total += term
    return total


@triton.jit
def _moments_kernel(k_ptr, v_ptr, factor_ptr, weight_ptr, out_ptr, n_keys, per_split, root, states, first_state,
                    k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, weight_sb,
                    HEADS_KV: tl.constexpr, SUB: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
                    V_FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
                    HAS_FACTOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over one share of the keys, x = root * factor * k: out [splits, states, D + 1, DV + 1] float32 holds
    sum w x v', sum w x (last column), sum w v (last row) and sum w (corner)."""
    rows_id, local, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, head, sub = _state_index(first_state + local, HEADS_KV, SUB)
    k_base = k_ptr + b * k_sb + head * k_sh + sub * D * k_sd
    v_base = v_ptr + b * v_sb + head * v_sh + (sub * D + V_FIRST) * v_sd
    r = rows_id * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, DV_PAD)
    t = tl.arange(0, BLOCK_N)
    acc = tl.zeros([ROWS, DV_PAD], tl.float32)
    sum_x = tl.zeros([ROWS], tl.float32)
    sum_v = tl.zeros([DV_PAD], tl.float32)
    mass = tl.zeros([BLOCK_N], tl.float32)
    begin, end = split * per_split, tl.minimum((split + 1) * per_split, n_keys)
    tl.assume(begin < end)
    for start in range(begin, end, BLOCK_N):
        first = tl.cast(start, tl.int64)
        ok = start + t < n_keys
        x = _coordinates(k_base + first * k_sn, t, r, ok, k_sn, k_sd, D, False) * root
        v = tl.load(v_base + first * v_sn + t[:, None] * v_sn + c[None, :] * v_sd, mask=ok[:, None] & (c < DV)[None, :], other=0.0)
        w = ok.to(tl.float32)
        if HAS_WEIGHT:
            w = tl.load(weight_ptr + b * weight_sb + first + t, mask=ok, other=0.0)
        if HAS_FACTOR:
            x *= tl.load(factor_ptr + (b * HEADS_KV + head) * n_keys + first + t, mask=ok, other=0.0)[:, None]
        x *= w[:, None]
        sum_x += tl.sum(x, 0)
        sum_v += tl.sum(v.to(tl.float32) * w[:, None], 0)
        mass += w
        acc = tl.dot(tl.trans(x.to(DTYPE)), v.to(DTYPE), acc, input_precision=PRECISION)
    out = out_ptr + (split.to(tl.int64) * states + local) * (D + 1) * (DV + 1)
    tl.store(out + r[:, None] * (DV + 1) + c[None, :], acc, mask=(r < D)[:, None] & (c < DV)[None, :])
    tl.store(out + r * (DV + 1) + DV, sum_x, mask=r < D)
    if rows_id == 0:
        tl.store(out + D * (DV + 1) + c, sum_v, mask=c < DV)
        tl.store(out + D * (DV + 1) + DV, tl.sum(mass, 0))


@triton.jit
def _moments_finish_kernel(sums_ptr, norm_ptr, mean_ptr, constant_ptr, linear_ptr, z_linear_ptr, splits, ratio,
                           D: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, ROWS: tl.constexpr, CENTER: tl.constexpr):
    """Shares of _moments_kernel added and divided by the sum of weights: norm [states] = 1 / sum w, mean [states, D] of x,
    constant [states, DV] = mean of v, linear [states, D, DV] = ratio * mean of x v' (x centred with CENTER), z_linear = ratio * mean."""
    rows_id, state = tl.program_id(0), tl.program_id(1)
    r = rows_id * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, DV_PAD)
    linear = tl.zeros([ROWS, DV_PAD], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    constant = tl.zeros([DV_PAD], tl.float32)
    mass = tl.sum(mean, 0)
    for split in range(splits):
        part = sums_ptr + (tl.cast(split, tl.int64) * tl.num_programs(1) + state) * (D + 1) * (DV + 1)
        linear += tl.load(part + r[:, None] * (DV + 1) + c[None, :], mask=(r < D)[:, None] & (c < DV)[None, :], other=0.0)
        mean += tl.load(part + r * (DV + 1) + DV, mask=r < D, other=0.0)
        constant += tl.load(part + D * (DV + 1) + c, mask=c < DV, other=0.0)
        mass += tl.load(part + D * (DV + 1) + DV)
    norm = 1.0 / mass
    linear, mean, constant = linear * norm, mean * norm, constant * norm
    if CENTER:
        linear -= mean[:, None] * constant[None, :]
    tl.store(linear_ptr + state * D * DV + r[:, None] * DV + c[None, :], (linear * ratio).to(linear_ptr.dtype.element_ty),
             mask=(r < D)[:, None] & (c < DV)[None, :])
    tl.store(mean_ptr + state * D + r, mean, mask=r < D)
    tl.store(z_linear_ptr + state * D + r, mean * ratio, mask=r < D)
    if rows_id == 0:
        tl.store(constant_ptr + state * DV + c, constant, mask=c < DV)
        tl.store(norm_ptr + state, norm)


@triton.jit
def _store_stats(stats, denominator, ok, eps):
    """How many of the denominators are not above eps, the least, the greatest, the sum."""
    tl.store(stats, tl.sum((ok & ~(denominator > eps)).to(tl.float32), 0))
    tl.store(stats + 1, tl.min(tl.where(ok, denominator, float("inf")), 0))
    tl.store(stats + 2, tl.max(tl.where(ok, denominator, float("-inf")), 0))
    tl.store(stats + 3, tl.sum(tl.where(ok, denominator, 0.0), 0))


@triton.jit
def _stats_kernel(stats_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """stats [n, 4] of parts -> out [4], in one program."""
    i = tl.arange(0, BLOCK)
    bad, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    least, greatest = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, n, BLOCK):
        ok = start + i < n
        row = stats_ptr + (start + i) * 4
        bad += tl.load(row, mask=ok, other=0.0)
        least = tl.minimum(least, tl.load(row + 1, mask=ok, other=float("inf")))
        greatest = tl.maximum(greatest, tl.load(row + 2, mask=ok, other=float("-inf")))
        total += tl.load(row + 3, mask=ok, other=0.0)
    tl.store(out_ptr, tl.sum(bad, 0))
    tl.store(out_ptr + 1, tl.min(least, 0))
    tl.store(out_ptr + 2, tl.max(greatest, 0))
    tl.store(out_ptr + 3, tl.sum(total, 0))


@triton.jit
def _probe_finish_kernel(sums_ptr, stats_ptr, splits, samples, eps, SAMPLES: tl.constexpr, P: tl.constexpr, HERMITE: tl.constexpr):
    """Denominators sum_p c_p mean(x^p) / p! from the power sums of _probe_kernel -> stats [rows, 4]."""
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
            term *= _coefficient(variance, p, P)
        denominator += term
    _store_stats(stats_ptr + row * 4, denominator, s < samples, eps)


@triton.jit
def _power_sum(sums_ptr, row, POWER: tl.constexpr, splits, s, SAMPLES: tl.constexpr, P: tl.constexpr):
    total = tl.zeros([SAMPLES], tl.float32)
    for split in range(splits):
        total += tl.load(sums_ptr + ((split * tl.num_programs(0) + row) * P + POWER) * SAMPLES + s)
    return total


@triton.jit
def _probe_kernel(q_ptr, k_ptr, q_factor_ptr, k_factor_ptr, weight_ptr, mean_ptr, out_ptr, n_queries, n_keys, per_split, samples,
                  root, scale, q_sb, q_sh, q_sn, q_sd, k_sb, k_sh, k_sn, k_sd, weight_sb,
                  HEADS_KV: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
                  SAMPLES: tl.constexpr, P: tl.constexpr, P_PAD: tl.constexpr, BLOCK_N: tl.constexpr, HAS_Q_FACTOR: tl.constexpr,
                  HAS_K_FACTOR: tl.constexpr, HAS_WEIGHT: tl.constexpr, CENTER: tl.constexpr, DTYPE: tl.constexpr,
                  PRECISION: tl.constexpr):
    """Power sums of the logits of evenly spaced queries: out [splits, states * GROUP, P, SAMPLES] float32 holds
    sum over a share of the keys of w (scale q.(root k - mean))^p."""
    y, split = tl.program_id(0), tl.program_id(1)
    b, head, sub = _state_index(y // GROUP, HEADS_KV, SUB)
    q_head = head * GROUP + y % GROUP
    q_base = q_ptr + b * q_sb + q_head * q_sh + sub * D * q_sd
    k_base = k_ptr + b * k_sb + head * k_sh + sub * D * k_sd
    s = tl.arange(0, SAMPLES)
    rows = (2 * s.to(tl.int64) + 1) * n_queries // (2 * samples)
    d = tl.arange(0, D_PAD)
    t = tl.arange(0, BLOCK_N)
    q = _coordinates(q_base, rows, d, s < samples, q_sn, q_sd, D, False)
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
        k = _coordinates(k_base + first * k_sn, t, d, ok, k_sn, k_sd, D, False) * root
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
def _lead(base, tokens, ok, leads_ptr, lead, stride_n, stride_d, shift_ptr, root, D: tl.constexpr, DEGREE: tl.constexpr,
          SHIFT: tl.constexpr):
    """Product over the lead monomial's coordinates of root * x - shift, [tokens] float32; root and shift as the caller has them.

    In degree 3 the lead is one coordinate and its rank; above, the table holds DEGREE - 2 coordinates a lead.
    """
    product = ok.to(tl.float32)
    for place in tl.static_range(DEGREE - 2):
        i = tl.cast(lead, tl.int32)
        if DEGREE > 3:
            i = tl.load(leads_ptr + lead * (DEGREE - 2) + place)
        column = tl.zeros_like(tokens) + i
        x = tl.load(base + tokens * stride_n + column * stride_d, mask=ok & (column < D), other=0.0).to(tl.float32) * root
        if SHIFT:
            x -= tl.load(shift_ptr + i, mask=i < D, other=0.0)
        product *= x
    return product


@triton.jit
def _two_leads(base, tokens, ok, lead, stride_n, stride_d, shift_ptr, scaling, D: tl.constexpr, SHIFT: tl.constexpr):
    """Leads `lead` (even) and lead + 1 of degree 3 as [tokens, 2], each as _lead has it; one load, so half the addresses."""
    two = tl.multiple_of(lead, 2) + tl.arange(0, 2)
    x = _coordinates(base, tokens, two, ok, stride_n, stride_d, D, False) * scaling[:, None]
    if SHIFT:
        x -= tl.load(shift_ptr + two, mask=two < D, other=0.0)[None, :]
    return x


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
            w0, w1 = tl.split(_two_leads(k, t, ok, lead, k_sn, k_sd, mean_ptr, scaling, D, CENTER) * w[:, None])
        else:
            w0 = w * _lead(k, t, ok, leads_ptr, lead, k_sn, k_sd, mean_ptr, scaling, D, DEGREE, CENTER)
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
def _accumulate_kernel(k_ptr, v_ptr, factor_ptr, weight_ptr, mean_ptr, norm_ptr, pairs_ptr, leads_ptr, inverse_ptr, probe_ptr, s_ptr, z_ptr,
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
    root * factor * k - mean. Every sum is in float32, in a fixed order. PROBED: as in _evaluate_kernel.
    """
    if PROBED:  # noqa: SIM102 (only compiled where there is a probe)
        if tl.load(probe_ptr) > most_bad:
            return
    PAIRED: tl.constexpr = BLOCKS == 2 and DEGREE == 3
    TWIN: tl.constexpr = BLOCKS == 2 and DEGREE == 2
    FEATURES: tl.constexpr = 128 if TWIN else 64
    local, split = tl.program_id(1), tl.program_id(2)
    b, head, sub = _state_index(first_state + local, HEADS_KV, SUB)
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
        columns, right = _columns(a0, a1), _columns(b0, b1)
        right_mean = tl.load(mean + right, mask=right < D, other=0.0)
        spread = (c[None, :] == f[:, None] // 8).to(DTYPE)
        spread_right = (c[None, :] == (f[:, None] // 64) * 8 + f[:, None] % 8).to(DTYPE)
    else:
        r = tl.arange(0, 128)
        columns = _columns(a0, b0)
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
        x = _coordinates(k, t, columns, ok, k_sn, k_sd, D, EVEN) * scaling[:, None]
        if CENTER:
            x -= column_mean[None, :]
        if TWIN:
            x *= w0[:, None]
            y = _coordinates(k, t, right, ok, k_sn, k_sd, D, EVEN) * scaling[:, None]
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


@triton.jit
def _outer(x, spread, PRECISION: tl.constexpr):
    """Outer product of the two halves of x [rows, 16], row by row: [rows, 64] float32. spread: [16, 128] zeros and ones."""
    both = tl.dot(x, spread, input_precision=PRECISION)
    left, right = tl.split(tl.permute(tl.reshape(both, [x.shape[0], 2, 64]), (0, 2, 1)))
    return left * right


@triton.jit
def _evaluate_kernel(q_ptr, factor_ptr, s_ptr, z_ptr, linear_ptr, constant_ptr, z_linear_ptr, pairs_ptr, leads_ptr,
                     numerator_ptr, denominator_ptr, variance_ptr, probe_ptr, out_ptr, stats_ptr,
                     n_queries, root, eps, most_bad, first_state, first_block, last_block, first_pair, last_pair, first_lead,
                     q_sb, q_sh, q_sn, q_sd, o_sb, o_sh, o_sn, o_sd,
                     HEADS_KV: tl.constexpr, GROUP: tl.constexpr, SUB: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
                     DV_ROW: tl.constexpr, DV_PAD: tl.constexpr, V_FIRST: tl.constexpr,
                     P: tl.constexpr, DEGREE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, LINEAR_STEP: tl.constexpr,
                     EVEN: tl.constexpr, HERMITE: tl.constexpr, CENTER: tl.constexpr, HAS_FACTOR: tl.constexpr, SCALED: tl.constexpr,
                     PROBED: tl.constexpr, FIRST: tl.constexpr, FOLD: tl.constexpr, LAST: tl.constexpr, SPLIT_Z: tl.constexpr,
                     DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """What the blocks first_block <= i < last_block of one degree add to BLOCK_M queries; of degree 3 BLOCKS (1 or 2) a step.

    FIRST: sums start at zero, otherwise they are read from numerator [y, N_q, DV] and denominator [y, N_q] (float32). FOLD: this
    is the end of degree 2, so the variance of the query's logits (twice the sum of weights of degree 2) is known and the
    coefficients with it; degrees 0 and 1 are added. LAST: divide, store, and put the number of denominators that are not above
    eps, the least, the greatest and the sum into stats [y, tiles, 4]. DEGREE 0 stands for P <= 2: only degrees 0 and 1.
    PROBED: nothing is done where more than most_bad of the probe's denominators, whose statistics begin at probe, are not above eps.
    """
    if PROBED:  # noqa: SIM102 (only compiled where there is a probe)
        if tl.load(probe_ptr) > most_bad:
            return
    tile, local = tl.program_id(0), tl.program_id(1)
    b, head, sub = _state_index(first_state + local // GROUP, HEADS_KV, SUB)
    q_head = head * GROUP + local % GROUP
    state = (local // GROUP).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    row0 = tile.to(tl.int64) * BLOCK_M
    ok = row0 + m < n_queries
    q = q_ptr + b * q_sb + q_head * q_sh + row0 * q_sn + sub * D * q_sd
    scaling = tl.full([BLOCK_M], 1.0, tl.float32)
    if SCALED:
        scaling *= root
    if HAS_FACTOR:
        scaling *= tl.load(factor_ptr + (b * HEADS_KV * GROUP + q_head) * n_queries + row0 + m, mask=ok, other=0.0)
    c = tl.arange(0, 16)
    f = tl.arange(0, 64)
    z = tl.arange(0, 16)
    dv = tl.arange(0, DV_PAD)
    partial = local.to(tl.int64) * n_queries + row0
    acc = tl.zeros([BLOCK_M, DV_PAD], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    value_ok = ok[:, None] & (dv < DV)[None, :]
    if not FIRST:
        acc += tl.load(numerator_ptr + partial * DV + m[:, None] * DV + dv[None, :], mask=value_ok, other=0.0)
    if DEGREE >= 2:
        g = tl.arange(0, 128)
        spread = (c[:, None] == tl.where(g < 64, g // 8, 8 + g % 8)[None, :]).to(DTYPE)
        ROW: tl.constexpr = DV_ROW if DEGREE == 3 else DV_ROW + 16
        s = s_ptr + state * (last_block - first_block) * 64 * ROW + f[:, None] * ROW
        dv_ok = (dv < DV)[None, :]
    if DEGREE == 2:
        # The pair is counted along, not read from the table: a load that another load waits for costs the pipeline a stage.
        z_acc = tl.zeros([BLOCK_M, 16], tl.float32)
        a = tl.load(pairs_ptr + 3 * first_pair)
        right = tl.load(pairs_ptr + 3 * first_pair + 1)
        tl.assume(first_pair < last_pair)
        for pair in range(first_pair, last_pair):
            x = _coordinates(q, m, _columns(a, right), ok, q_sn, q_sd, D, EVEN)
            if SCALED:
                x *= scaling[:, None]
            right += 1
            row_done = right == (D + 7) // 8
            a = tl.where(row_done, a + 1, a)
            right = tl.where(row_done, a, right)
            # [BLOCK_M, 16] @ [16, 128], then [BLOCK_M, 64] @ [64, DV]
            psi = _outer(x.to(DTYPE), spread, PRECISION).to(DTYPE)
            here = s + (pair - first_block) * 64 * (DV_ROW + 16)
            acc = tl.dot(psi, tl.load(here + dv[None, :], mask=dv_ok, other=0.0).to(DTYPE), acc, input_precision=PRECISION)
            z_acc = tl.dot(psi, tl.load(here + DV_ROW + z[None, :]).to(DTYPE), z_acc, input_precision=PRECISION)
        total += tl.sum(z_acc, 1)
    elif DEGREE > 2:
        if DEGREE > 3:
            z_acc = tl.zeros([BLOCK_M, 16], tl.float32)
        lead_scaling = tl.zeros([BLOCK_M], tl.float32) + 1.0
        if HERMITE:
            lead_scaling = _coefficient(tl.load(variance_ptr + partial + m, mask=ok, other=0.0), DEGREE, P)
        for pair in range(first_pair, last_pair):
            start = tl.load(pairs_ptr + 3 * pair + 2)
            end = last_block
            if pair + 1 < last_pair:
                end = tl.load(pairs_ptr + 3 * pair + 5)
            x = _coordinates(q, m, _columns(tl.load(pairs_ptr + 3 * pair), tl.load(pairs_ptr + 3 * pair + 1)), ok, q_sn, q_sd, D, EVEN)
            if SCALED:
                x *= scaling[:, None]
            both = _outer(x.to(DTYPE), spread, PRECISION) * lead_scaling[:, None]
            begin = tl.maximum(start, first_block)
            tl.assume(begin < end)
            if DEGREE == 3:
                outer = both.to(DTYPE)
                for group in tl.range(begin - start, end - start, 16, num_stages=1):
                    lead = tl.multiple_of(group, 8) + z
                    place = (lead + tl.multiple_of(start - first_block, 8))[None, :]
                    at = z_ptr + state * (last_block - first_block) * 64 + place // 8 * 512 + f[:, None] * 8 + place % 8
                    sums = tl.load(at, mask=(lead < end - start)[None, :], other=0.0)
                    high = sums.to(DTYPE)
                    part = tl.dot(outer, high, input_precision=PRECISION)
                    if SPLIT_Z:
                        part = tl.dot(outer, (sums - high.to(tl.float32)).to(DTYPE), part, input_precision=PRECISION)
                    x = _coordinates(q, m, lead, ok, q_sn, q_sd, D, False) * scaling[:, None]
                    total += tl.sum(part * x, 1)
            if BLOCKS == 2 and DEGREE == 3:
                ahead, beyond = tl.split(_two_leads(q, m, ok, begin - start, q_sn, q_sd, q_ptr, scaling, D, False))
                for block in range(begin, end, 2):
                    done = tl.sum(acc, 1) * 0.0  # as below
                    psi = (both * (ahead + done)[:, None]).to(DTYPE)
                    following = (both * (beyond + done)[:, None]).to(DTYPE)
                    next_lead = tl.minimum(block + 2, end - 2) - start
                    ahead, beyond = tl.split(_two_leads(q, m, ok, next_lead, q_sn, q_sd, q_ptr, scaling, D, False))
                    here = s + (block - first_block) * 64 * ROW + dv[None, :]
                    acc = tl.dot(psi, tl.load(here, mask=dv_ok, other=0.0).to(DTYPE), acc, input_precision=PRECISION)
                    acc = tl.dot(following, tl.load(here + 64 * ROW, mask=dv_ok, other=0.0).to(DTYPE), acc, input_precision=PRECISION)
            else:
                ahead = _lead(q, m, ok, leads_ptr, begin - start - first_lead, q_sn, q_sd, q_ptr, scaling, D, DEGREE, False)
                for block in range(begin, end):
                    # Zero, but not known before the products of the last step are done. Without it the next features overwrite
                    # registers that those products still read: the compiler (Triton 3.6) leaves seven of them in flight.
                    done = tl.sum(acc, 1) * 0.0
                    psi = (both * (ahead + done)[:, None]).to(DTYPE)
                    next_lead = tl.minimum(block + 1, end - 1) - start - first_lead
                    ahead = _lead(q, m, ok, leads_ptr, next_lead, q_sn, q_sd, q_ptr, scaling, D, DEGREE, False)
                    here = s + (block - first_block) * 64 * ROW
                    acc = tl.dot(psi, tl.load(here + dv[None, :], mask=dv_ok, other=0.0).to(DTYPE), acc, input_precision=PRECISION)
                    if DEGREE > 3:
                        z_acc = tl.dot(psi, tl.load(here + DV_ROW + z[None, :]).to(DTYPE), z_acc, input_precision=PRECISION)
        if DEGREE > 3:
            total += tl.sum(z_acc, 1)
    if not FIRST:
        total += tl.load(denominator_ptr + partial + m, mask=ok, other=0.0)
    if FOLD:
        c0 = tl.full([BLOCK_M], 1.0, tl.float32)
        c1 = c0
        if HERMITE:
            variance = 2.0 * total
            c0, c1 = _coefficient(variance, 0, P), _coefficient(variance, 1, P)
            if P > 2:
                c2 = _coefficient(variance, 2, P)
                acc *= c2[:, None]
                total *= c2
            if not LAST:
                tl.store(variance_ptr + partial + m, variance, mask=ok)
        if P > 1:
            step = tl.arange(0, LINEAR_STEP)
            linear = linear_ptr + state * D * DV
            for first in tl.range(0, D, LINEAR_STEP, num_stages=1):
                i = first + step
                x = _coordinates(q, m, i, ok, q_sn, q_sd, D, False) * (scaling * c1)[:, None]
                s1 = tl.load(linear + i[:, None] * DV + dv[None, :], mask=(i < D)[:, None] & (dv < DV)[None, :], other=0.0)
                acc = tl.dot(x.to(DTYPE), s1.to(DTYPE), acc, input_precision=PRECISION)
                if not CENTER:
                    total += tl.sum(x * tl.load(z_linear_ptr + state * D + i, mask=i < D, other=0.0)[None, :], 1)
        acc += c0[:, None] * tl.load(constant_ptr + state * DV + dv, mask=dv < DV, other=0.0)[None, :]
        total += c0
    if LAST:
        out = out_ptr + b * o_sb + q_head * o_sh + row0 * o_sn + (sub * D + V_FIRST) * o_sd
        tl.store(out + m[:, None] * o_sn + dv[None, :] * o_sd, (acc / total[:, None]).to(out_ptr.dtype.element_ty),
                 mask=ok[:, None] & (dv < DV)[None, :])
        stats = stats_ptr + ((first_state * GROUP + local).to(tl.int64) * tl.num_programs(0) + tile) * 4
        _store_stats(stats, total, ok, eps)
    else:
        tl.store(numerator_ptr + partial * DV + m[:, None] * DV + dv[None, :], acc, mask=value_ok)
        tl.store(denominator_ptr + partial + m, total, mask=ok)
