"""Launches of the Taylor kernels, as operators that torch.compile takes as they are. Imports Triton."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from taylor_patch.backends.base import launching_on
from taylor_patch.backends.taylor import tuned
from taylor_patch.backends.taylor.kernels.accumulate import accumulate_kernel
from taylor_patch.backends.taylor.kernels.evaluate import evaluate_kernel
from taylor_patch.backends.taylor.kernels.moments import moments_finish_kernel, moments_kernel
from taylor_patch.backends.taylor.kernels.probe import probe_finish_kernel, probe_kernel
from taylor_patch.backends.taylor.kernels.statistics import stats_kernel
from taylor_patch.backends.taylor.plan import Z_COLUMNS, Chunk, Plan, compute_dtype, item_nbytes, make_plan
from taylor_patch.features import symmetric
from taylor_patch.features.tiles import BLOCK, layout, pair_table

MOMENT_KEYS = 64
PROBE_KEYS = 64


def _ceil_power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def split_scale(scale: float, queries: bool) -> tuple[float, float]:
    """(root, ratio): keys are multiplied by root, a power of two near sqrt(scale) that does not round them; queries too where
    `queries` is set. Weights of degree p get the rest, ratio^p. float16 needs both, for its range; elsewhere queries stay as they are.
    """
    if scale == 0:
        return 1.0, 0.0
    root = 2.0 ** round(math.log2(abs(scale)) / 2)
    return root, scale / root**2 if queries else scale / root


def _precision(dtype: torch.dtype) -> dict[str, Any]:
    """Constants of a kernel that makes products in `dtype`."""
    if dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1":
        dtype = torch.float32  # Triton's interpreter multiplies the bit patterns of bfloat16 as integers
    names = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return {"DTYPE": names[dtype], "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32"}


def _stages(dtype: torch.dtype) -> int:
    """Pipeline stages of the kernels that read whole rows: two of float32 at 256 columns exceed the shared memory of a multiprocessor."""
    return 1 if dtype == torch.float32 else 2


def _arch(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _geometry(plan: Plan) -> dict[str, int]:
    return {"HEADS_KV": plan.heads_kv, "SUB": plan.sub_head_blocks, "D": plan.dim}


class _Probe(NamedTuple):
    """Where the statistics of the probe's denominators lie on the device, None without a probe, and how many may be bad."""

    stats: Tensor | None
    most_bad: float


class _Moments:
    """Sums of degrees 0 and 1 of a group of states, divided by the sum of weights; root * k in place of k.

    norm [states] = 1 / sum of weights; mean [states, dim] of the keys; constant [states, width]; linear [states, dim, width] in the
    features' dtype; z_linear [states, dim] for keys that are not centred. All but linear float32.
    """

    def __init__(self, plan: Plan, first_state: int, states: int, columns: tuple[int, int], k: Tensor, v: Tensor,
                 factor: Tensor | None, weight: Tensor | None, root: float, ratio: float, center: bool, dtype: torch.dtype) -> None:
        width, dim = columns[1] - columns[0], plan.dim
        share, splits = _shares(plan.n_keys, plan.moment_splits(states), MOMENT_KEYS)
        rows = min(64, _ceil_power_of_two(dim))
        sums = torch.empty(splits, states, dim + 1, width + 1, dtype=torch.float32, device=k.device)
        moments_kernel[(-(-dim // rows), states, splits)](
            k, v, factor, weight, sums, plan.n_keys, share, root, states, first_state,
            *k.stride(), *v.stride(), _weight_stride(weight), **_geometry(plan), DV=width, DV_PAD=_ceil_power_of_two(width),
            V_FIRST=columns[0], ROWS=rows, BLOCK_N=MOMENT_KEYS, HAS_FACTOR=factor is not None, HAS_WEIGHT=weight is not None,
            **_precision(dtype), num_warps=4, num_stages=_stages(dtype))
        def empty(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(states, *shape, dtype=kind, device=k.device)

        self.norm, self.mean, self.constant, self.z_linear = empty(), empty(dim), empty(width), empty(dim)
        self.linear = empty(dim, width, kind=dtype)
        moments_finish_kernel[(-(-dim // rows), states)](
            sums, self.norm, self.mean, self.constant, self.linear, self.z_linear, splits, ratio, D=dim, DV=width,
            DV_PAD=_ceil_power_of_two(width), ROWS=rows, CENTER=center, num_warps=4)


def _shares(n: int, splits: int, step: int) -> tuple[int, int]:
    """(keys of a split, a multiple of the kernel's step; splits, none of them empty) for at most `splits`."""
    share = -(-n // (splits * step)) * step
    return share, -(-n // share)


def _weight_stride(weight: Tensor | None) -> int:
    return 0 if weight is None or weight.shape[0] == 1 else weight.stride(0)


def _lead_tables(plan: Plan, chunk: Chunk, device: torch.device) -> tuple[Tensor | None, Tensor | None, int]:
    """(leads [n, degree - 2] int32, 1 / prod(multiplicity!) [n] float32, rank of the first); none is needed up to degree 3."""
    if chunk.degree <= 3:
        return None, None, 0
    first, last = layout(plan.dim, chunk.degree).lead_range(chunk.first, chunk.last)
    dim = layout(plan.dim, chunk.degree).tiles * 8
    indices, inverse = symmetric.tables.get(dim, chunk.degree - 2, first, last, device)
    return indices.int().contiguous(), inverse.float(), first


def _accumulate(plan: Plan, chunk: Chunk, first_state: int, states: int, columns: tuple[int, int], moments: _Moments, k: Tensor,
                v: Tensor, factor: Tensor | None, weight: Tensor | None, probe: _Probe, root: float, ratio: float, center: bool,
                dtype: torch.dtype, store: torch.dtype, denom_fp32: bool, block_k: int,
                leads: tuple[Tensor | None, Tensor | None, int]) -> tuple[Tensor, Tensor | None]:
    """S and Z [states, 64 * blocks, row] of a chunk, in `store`; in degree 3 S alone, and Z [states, 64 * blocks] in float32."""
    width = columns[1] - columns[0]
    padded = _ceil_power_of_two(width)
    tile = tuned.choose("accumulate", _arch(k.device), chunk.degree, padded, item_nbytes(dtype), block_k)
    programs = -(-chunk.blocks // tile.blocks)
    share, splits = _shares(plan.n_keys, plan.splits(states * -(-chunk.blocks // 2)), tile.rows)
    row, apart = -(-width // 16) * 16, chunk.degree == 3
    shape = (states, chunk.blocks * BLOCK, row if apart else row + Z_COLUMNS)
    out = torch.empty(shape, dtype=store, device=k.device)
    target = out if splits == 1 else torch.empty(splits, *shape, dtype=torch.float32, device=k.device)
    z = torch.empty(splits, *shape[:2], dtype=torch.float32, device=k.device) if apart else None
    pairs = pair_table(plan.dim, chunk.degree, k.device)
    accumulate_kernel[(programs, states, splits)](
        k, v, factor, weight, moments.mean, moments.norm, pairs, leads[0], leads[1], probe.stats, target, z,
        plan.n_keys, share, root, ratio, probe.most_bad, states, first_state, chunk.first, chunk.last, leads[2], *k.stride(), *v.stride(),
        _weight_stride(weight), **_geometry(plan), DV=width, DV_ROW=row, DV_PAD=padded, V_FIRST=columns[0],
        DEGREE=chunk.degree, PAIRS=len(pairs), PAIRS_PAD=_ceil_power_of_two(len(pairs)), BLOCKS=tile.blocks, BLOCK_N=tile.rows,
        EVEN=plan.dim % 8 == 0, CENTER=center, HAS_FACTOR=factor is not None, HAS_WEIGHT=weight is not None,
        PROBED=probe.stats is not None, PARTIAL=splits > 1, SPLIT_Z=denom_fp32, **_precision(dtype), num_warps=tile.warps,
        num_stages=tile.stages)
    if splits > 1:
        total = target.sum(0)
        out.copy_(total)
        if denom_fp32 and not apart:
            out[..., row + 1] = total[..., row] - out[..., row].float()
    return out, None if z is None else z.sum(0) if splits > 1 else z[0]


def _evaluate(plan: Plan, chunk: Chunk, number: int, first_state: int, states: int, columns: tuple[int, int], moments: _Moments,
              s: Tensor | None, z: Tensor | None, q: Tensor, factor: Tensor | None, partial: tuple[Tensor | None, Tensor | None, Tensor | None],
              probe: _Probe, out: Tensor, stats: Tensor, root: float, center: bool, denom_fp32: bool, eps: float, dtype: torch.dtype,
              tile: tuned.Tile,
              leads: tuple[Tensor | None, Tensor | None, int]) -> None:
    """Add a chunk's part to every query of the group; the first chunk starts and the last one finishes them."""
    width = columns[1] - columns[0]
    chunks = plan.chunks
    last = number == len(chunks) - 1
    shape = layout(plan.dim, chunk.degree) if chunk.degree else None
    first_pair, last_pair = (shape.pair_of(chunk.first), shape.pair_of(chunk.last - 1) + 1) if shape else (0, 0)
    pairs = pair_table(plan.dim, chunk.degree, q.device) if chunk.degree else None
    evaluate_kernel[(-(-plan.n_queries // tile.rows), states * plan.group)](
        q, factor, s, z, moments.linear, moments.constant, moments.z_linear, pairs, leads[0], *partial, probe.stats, out, stats,
        plan.n_queries, root, eps, probe.most_bad, first_state, chunk.first, chunk.last, first_pair, last_pair, leads[2],
        *q.stride(), *out.stride(), **_geometry(plan), GROUP=plan.group, DV=width, DV_ROW=-(-width // 16) * 16,
        DV_PAD=_ceil_power_of_two(width), V_FIRST=columns[0], P=plan.terms, DEGREE=chunk.degree, BLOCKS=tile.blocks, BLOCK_M=tile.rows,
        LINEAR_STEP=min(64, _ceil_power_of_two(plan.dim)), EVEN=plan.dim % 8 == 0, HERMITE=plan.hermite, CENTER=center,
        HAS_FACTOR=factor is not None, SCALED=dtype == torch.float16 or factor is not None, PROBED=probe.stats is not None,
        FIRST=number == 0, FOLD=chunk.degree <= 2 and (last or chunks[number + 1].degree > 2), LAST=last,
        SPLIT_Z=denom_fp32 and dtype != torch.float32, **_precision(dtype), num_warps=tile.warps, num_stages=tile.stages)


def _output(q: Tensor) -> Tensor:
    """Uninitialised [B, H, N_q, D] that lies in memory as [B, N_q, H, D], the layout that ComfyUI's models ask for."""
    batch, heads, n_queries, dim = q.shape
    return torch.empty(batch, n_queries, heads, dim, dtype=q.dtype, device=q.device).transpose(1, 2)


@torch.library.custom_op("taylor_patch::taylor_attention", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor? q_factor, Tensor? k_factor, Tensor? key_weight, float scale, int terms, bool hermite, "
    "bool center, int sub_head_blocks, int feature_chunk, int value_chunk, bool s_store_bf16, bool force_fp32, bool denom_fp32, "
    "int block_q, int block_k, int samples, int most_bad, float eps, int workspace_limit) -> (Tensor, Tensor)"))
def taylor_attention(*arguments):  # type: ignore[no-untyped-def]
    """`attend` as an operator, for graphs of torch.compile; outside them a direct call costs the host less."""
    return attend(*arguments)


@taylor_attention.register_fake
def _(q, k, v, q_factor, k_factor, key_weight, scale, terms, *options):  # type: ignore[no-untyped-def]
    return _output(q), q.new_empty(2, 4, dtype=torch.float32)


def attend(q: Tensor, k: Tensor, v: Tensor, q_factor: Tensor | None, k_factor: Tensor | None, key_weight: Tensor | None, scale: float,
           terms: int, hermite: bool, center: bool, sub_head_blocks: int, feature_chunk: int, value_chunk: int, s_store_bf16: bool,
           force_fp32: bool, denom_fp32: bool, block_q: int, block_k: int, samples: int, most_bad: int, eps: float,
           workspace_limit: int) -> tuple[Tensor, Tensor]:
    """Global Taylor attention.

    q: [B, H, N_q, D]; k, v: [B, H_kv, N_kv, D], fp16, bf16 or fp32, any strides; q_factor [B, H, N_q], k_factor [B, H_kv, N_kv]:
    float32 factors of rows, or None; key_weight: [B or 1, N_kv] float32 weights in 0 to 1, or None.
    samples: queries a head that are probed first, 0 for none; where more than most_bad of their denominators are not above eps, the rest of
    the work is left out, which the device decides without the host, and the result is not to be used.
    Returns out [B, H, N_q, D] in q's dtype, and [2, 4] float32, of the probe and of all queries: how many denominators are not above
    eps, least, greatest, sum. Without keys of positive weight, the result is NaN and every denominator counts as bad.
    """
    plan = make_plan(q.shape, k.shape, q.dtype, terms, hermite, sub_head_blocks, feature_chunk, value_chunk, s_store_bf16, force_fp32,
                     workspace_limit)
    dtype = compute_dtype(q.dtype, force_fp32)
    scaled = dtype == torch.float16 or q_factor is not None
    root, ratio = split_scale(scale, scaled)
    store = torch.bfloat16 if s_store_bf16 else dtype
    out = _output(q)
    summary = torch.empty(2, 4, dtype=torch.float32, device=q.device)
    tile = tuned.choose("evaluate", _arch(q.device), 0, _ceil_power_of_two(plan.width), item_nbytes(dtype), block_q)
    stats = torch.empty(plan.states * plan.group, -(-plan.n_queries // tile.rows), 4, dtype=torch.float32, device=q.device)

    def moments_of(first_state: int, states: int, columns: tuple[int, int]) -> _Moments:
        return _Moments(plan, first_state, states, columns, k, v, k_factor, key_weight, root, ratio, center, dtype)

    def probed(mean: Tensor) -> _Probe:
        _probe(plan, mean, q, k, q_factor, k_factor, key_weight, scale, root, center, min(samples, plan.n_queries), eps, dtype, summary[0])
        return _Probe(summary, float(most_bad))

    # A small first chunk goes before the probe: it keeps the device busy while the host launches the probe's kernels.
    late = samples > 0 and plan.states_at_once == plan.states and plan.chunks[0].blocks * 10 <= sum(chunk.blocks for chunk in plan.chunks)
    kept, probe = None, _Probe(None, 0.0)
    with launching_on(q.device):
        if samples and not late:
            shared = plan.states_at_once == plan.states
            first = moments_of(0, plan.states, plan.value_columns[0] if shared else (0, min(16, plan.width)))
            kept, probe = first if shared else None, probed(first.mean)
            del first
        for columns in plan.value_columns:
            for first_state in range(0, plan.states, plan.states_at_once):
                states = min(plan.states_at_once, plan.states - first_state)
                moments = kept or moments_of(first_state, states, columns)
                kept = None
                partial = _partial_sums(plan, states, columns[1] - columns[0], q.device)
                for number, chunk in enumerate(plan.chunks):
                    leads = _lead_tables(plan, chunk, q.device)
                    s = z = None
                    if chunk.blocks:
                        s, z = _accumulate(plan, chunk, first_state, states, columns, moments, k, v, k_factor, key_weight, probe, root, ratio,
                                           center, dtype, store, denom_fp32, block_k, leads)
                    if late:
                        probe, late = probed(moments.mean), False
                    _evaluate(plan, chunk, number, first_state, states, columns, moments, s, z, q, q_factor, partial, probe, out, stats, root,
                              center, denom_fp32, eps, dtype, tile, leads)
                    del s, z
        _summarise(stats, summary[1])
    return out, summary


def _partial_sums(plan: Plan, states: int, width: int, device: torch.device) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Numerators, denominators and logit variances of a group between chunks; none where one chunk does it all."""
    if len(plan.chunks) == 1:
        return None, None, None
    rows = (states * plan.group, plan.n_queries)
    return (torch.empty(*rows, width, dtype=torch.float32, device=device), torch.empty(rows, dtype=torch.float32, device=device),
            torch.empty(rows, dtype=torch.float32, device=device) if plan.hermite else None)


def _summarise(stats: Tensor, out: Tensor) -> None:
    """[..., 4] of parts -> out [4]: number of bad ones, least, greatest, sum."""
    stats_kernel[(1,)](stats, out, stats.numel() // 4, BLOCK=1024, num_warps=8)


def _probe(plan: Plan, mean: Tensor, q: Tensor, k: Tensor, q_factor: Tensor | None, k_factor: Tensor | None, key_weight: Tensor | None,
           scale: float, root: float, center: bool, samples: int, eps: float, dtype: torch.dtype, out: Tensor) -> None:
    """Denominators of `samples` evenly spaced queries a head, from the logits themselves: no features, one pass over the keys.

    mean [states, dim] of root * k. out [4]: how many are not above eps, least, greatest, sum.
    """
    rows = plan.states * plan.group
    share, splits = _shares(plan.n_keys, plan.splits(rows), PROBE_KEYS)
    padded = _ceil_power_of_two(samples)
    sums = torch.empty(splits, rows, plan.terms, padded, dtype=torch.float32, device=q.device)
    probe_kernel[(rows, splits)](
        q, k, q_factor, k_factor, key_weight, mean, sums, plan.n_queries, plan.n_keys, share, samples,
        root, scale / root, *q.stride(), *k.stride(), _weight_stride(key_weight), **_geometry(plan), GROUP=plan.group,
        D_PAD=_ceil_power_of_two(plan.dim), SAMPLES=padded, P=plan.terms, P_PAD=1 << (plan.terms - 1).bit_length(), BLOCK_N=PROBE_KEYS,
        HAS_Q_FACTOR=q_factor is not None, HAS_K_FACTOR=k_factor is not None, HAS_WEIGHT=key_weight is not None, CENTER=center,
        **_precision(dtype), num_warps=4, num_stages=_stages(dtype))
    stats = torch.empty(rows, 4, dtype=torch.float32, device=q.device)
    probe_finish_kernel[(rows,)](sums, stats, splits, samples, eps, SAMPLES=padded, P=plan.terms, HERMITE=plan.hermite, num_warps=1)
    _summarise(stats, out)
