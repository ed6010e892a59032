"""Features of the queries times S and Z, then the division: the attention."""

from __future__ import annotations

import triton
import triton.language as tl

from taylor_patch.backends.taylor.kernels.features import coordinates, hermite_coefficient, lead_monomial, state_index, tile_columns, two_leads
from taylor_patch.backends.taylor.kernels.statistics import store_stats


@triton.jit
def _outer(x, spread, PRECISION: tl.constexpr):
    """Outer product of the two halves of x [rows, 16], row by row: [rows, 64] float32. spread: [16, 128] zeros and ones."""
    both = tl.dot(x, spread, input_precision=PRECISION)
    left, right = tl.split(tl.permute(tl.reshape(both, [x.shape[0], 2, 64]), (0, 2, 1)))
    return left * right


@triton.jit
def evaluate_kernel(q_ptr, factor_ptr, s_ptr, z_ptr, linear_ptr, constant_ptr, z_linear_ptr, pairs_ptr, leads_ptr,
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
    b, head, sub = state_index(first_state + local // GROUP, HEADS_KV, SUB)
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
            x = coordinates(q, m, tile_columns(a, right), ok, q_sn, q_sd, D, EVEN)
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
            lead_scaling = hermite_coefficient(tl.load(variance_ptr + partial + m, mask=ok, other=0.0), DEGREE, P)
        for pair in range(first_pair, last_pair):
            start = tl.load(pairs_ptr + 3 * pair + 2)
            end = last_block
            if pair + 1 < last_pair:
                end = tl.load(pairs_ptr + 3 * pair + 5)
            x = coordinates(q, m, tile_columns(tl.load(pairs_ptr + 3 * pair), tl.load(pairs_ptr + 3 * pair + 1)), ok, q_sn, q_sd, D, EVEN)
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
                    x = coordinates(q, m, lead, ok, q_sn, q_sd, D, False) * scaling[:, None]
                    total += tl.sum(part * x, 1)
            if BLOCKS == 2 and DEGREE == 3:
                ahead, beyond = tl.split(two_leads(q, m, ok, begin - start, q_sn, q_sd, q_ptr, scaling, D, False))
                for block in range(begin, end, 2):
                    done = tl.sum(acc, 1) * 0.0  # as below
                    psi = (both * (ahead + done)[:, None]).to(DTYPE)
                    following = (both * (beyond + done)[:, None]).to(DTYPE)
                    next_lead = tl.minimum(block + 2, end - 2) - start
                    ahead, beyond = tl.split(two_leads(q, m, ok, next_lead, q_sn, q_sd, q_ptr, scaling, D, False))
                    here = s + (block - first_block) * 64 * ROW + dv[None, :]
                    acc = tl.dot(psi, tl.load(here, mask=dv_ok, other=0.0).to(DTYPE), acc, input_precision=PRECISION)
                    acc = tl.dot(following, tl.load(here + 64 * ROW, mask=dv_ok, other=0.0).to(DTYPE), acc, input_precision=PRECISION)
            else:
                ahead = lead_monomial(q, m, ok, leads_ptr, begin - start - first_lead, q_sn, q_sd, q_ptr, scaling, D, DEGREE, False)
                for block in range(begin, end):
                    # Zero, but not known before the products of the last step are done. Without it the next features overwrite
                    # registers that those products still read: the compiler (Triton 3.6) leaves seven of them in flight.
                    done = tl.sum(acc, 1) * 0.0
                    psi = (both * (ahead + done)[:, None]).to(DTYPE)
                    next_lead = tl.minimum(block + 1, end - 1) - start - first_lead
                    ahead = lead_monomial(q, m, ok, leads_ptr, next_lead, q_sn, q_sd, q_ptr, scaling, D, DEGREE, False)
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
            c0, c1 = hermite_coefficient(variance, 0, P), hermite_coefficient(variance, 1, P)
            if P > 2:
                c2 = hermite_coefficient(variance, 2, P)
                acc *= c2[:, None]
                total *= c2
            if not LAST:
                tl.store(variance_ptr + partial + m, variance, mask=ok)
        if P > 1:
            step = tl.arange(0, LINEAR_STEP)
            linear = linear_ptr + state * D * DV
            for first in tl.range(0, D, LINEAR_STEP, num_stages=1):
                i = first + step
                x = coordinates(q, m, i, ok, q_sn, q_sd, D, False) * (scaling * c1)[:, None]
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
        store_stats(stats, total, ok, eps)
    else:
        tl.store(numerator_ptr + partial * DV + m[:, None] * DV + dv[None, :], acc, mask=value_ok)
        tl.store(denominator_ptr + partial + m, total, mask=ok)
