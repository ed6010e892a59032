"""near_far on the GPU: the kernels in their order, as a custom operator of torch."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor

from taylor_patch import long_lived
from taylor_patch.backends.base import launching_on, note_not_finite
from taylor_patch.backends.near_far import aim
from taylor_patch.backends.near_far import plan as plans
from taylor_patch.backends.near_far.aim import Settled
from taylor_patch.backends.near_far.blocks import ROUTING_SAMPLES, largest
from taylor_patch.backends.near_far.kernel import attend_kernel
from taylor_patch.backends.near_far.prepare import covariance_kernel, gather_kernel, pool_kernel
from taylor_patch.backends.near_far.probing import choose_kernel, probe_kernel, sink_kernel, tail_kernel
from taylor_patch.backends.near_far.routing import order_kernel, score_kernel, select_kernel, total_kernel
from taylor_patch.backends.targets import MARGIN
from taylor_patch.backends.tiles import grids
from taylor_patch.call import AttentionCall, TokenGrid

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None
LOG2_E = 1.4426950408889634
TAILS = {"none": 0, "zeroth": 1, "cumulant": 2}


def attend(call: AttentionCall, density: float, tail: str = "cumulant") -> Tensor:
    """near_far attention of a call -> [B, H, N, D] in q's dtype, stored [B, N, H, D] as ComfyUI's models want it.

    torch.compile sees one operator; outside it the kernels are launched directly, which costs the host less.
    """
    if torch.compiler.is_compiling():
        return near_far(call.q, call.k, call.v, call.key_mask, *_sides(call), call.scale, density, tail, 0.0)
    return run(plans.of_call(call), call.q, call.k, call.v, call.key_mask, call.scale, density, tail)


def attend_aimed(call: AttentionCall, settled: Settled | None) -> tuple[Tensor, Settled | None]:
    """The same with the density and factors that meet call.target_error; found by a probe where `settled` is None.

    In a graph of torch.compile every call is probed and nothing comes back but the attention.
    """
    if torch.compiler.is_compiling():
        return near_far(call.q, call.k, call.v, call.key_mask, *_sides(call), call.scale, 1.0, "cumulant", call.target_error), None
    plan, goal = plans.of_call(call, aimed=True), None
    if settled is None:
        settled, goal = unsettled(plan, call.q.device), MARGIN * call.target_error
    return run(plan, call.q, call.k, call.v, call.key_mask, call.scale, 1.0, "cumulant", settled, goal), settled


def unsettled(plan: plans.Plan, device: torch.device) -> Settled:
    """Room for what a probe finds."""
    heads = plan.batch * plan.heads
    return Settled(torch.empty(heads, 4, dtype=torch.float32, device=device),
                   torch.empty(heads, plan.keys.image_blocks, dtype=torch.int8, device=device))


def _sides(call: AttentionCall) -> tuple[list[int], list[int]]:
    """The grids of queries and keys as the operator takes them."""
    grid, key_grid = ([grid.t, grid.h, grid.w, grid.start] for grid in grids(call))
    return grid, key_grid


@torch.library.custom_op("taylor_patch::near_far", mutates_args=())
def near_far(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, grid: list[int], key_grid: list[int], scale: float, density: float,
             tail: str, target: float) -> Tensor:
    """q [B, H, N_q, D]; k, v [B, H_kv, N_kv, D]; key_mask [B or 1, N_kv] additive float32 -> [B, H, N_q, D].

    grid, key_grid: (t, h, w, start) of the queries and of the keys. target: relative L2 error to aim at, or 0 for the density given.
    """
    call = AttentionCall(q, k, v, scale, key_mask, grid=TokenGrid(*grid), key_grid=TokenGrid(*key_grid))
    plan = plans.of_call(call, target > 0)
    if target > 0:
        return run(plan, q, k, v, key_mask, scale, density, tail, unsettled(plan, q.device), MARGIN * target)
    return run(plan, q, k, v, key_mask, scale, density, tail)


@near_far.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, grid: list[int], key_grid: list[int], scale: float, density: float, tail: str,
      target: float) -> Tensor:
    return empty_output(q)


def empty_output(q: Tensor) -> Tensor:
    """[B, H, N, D], stored [B, N, H, D]."""
    batch, heads, tokens, head_dim = q.shape
    return torch.empty(batch, tokens, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)


def run(plan: plans.Plan, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, density: float, tail: str,
        settled: Settled | None = None, goal: float | None = None) -> Tensor:
    """The call in rounds of `plan.round_lanes` key heads that share one workspace.

    settled takes the place of `density`; with a goal (relative L2 error) a probe fills it first.
    """
    out = empty_output(q)
    space, not_finite = plan.allocate(q.device), torch.zeros(1, device=q.device)
    if key_mask is not None and key_mask.stride(1) != 1:
        key_mask = key_mask.contiguous()
    with launching_on(q.device):
        for first in range(0, plan.lanes, plan.round_lanes):
            lanes = min(plan.round_lanes, plan.lanes - first)
            heads = slice(first * plan.group, (first + lanes) * plan.group)
            own = None if settled is None else Settled(settled.setting[heads], settled.always[heads])
            prepare(plan, space, q, k, v, key_mask, first, lanes)
            score(plan, space, lanes, scale)
            if own is not None and goal is not None:
                probe(plan, space, q, first, lanes, scale, goal, own)
            select(plan, space, lanes, density, own)
            attend_round(plan, space, q, out, not_finite, first, lanes, scale, tail, own)
    note_not_finite(out, not_finite)
    return out


def _precision(plan: plans.Plan) -> str:
    """float32 products need three TF32 products for float32 accuracy; 16-bit ones are exact as they are."""
    return "tf32x3" if plan.dtype == torch.float32 else "tf32"


def prepare(plan: plans.Plan, space: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, first: int,
            lanes: int) -> None:
    """Fill k, v, means, covariances and query samples of the lanes from `first` on."""
    wide = plan.dim * plan.dtype.itemsize > 256
    mask, stride_mb, top = (k, 0, k) if key_mask is None else \
        (key_mask, key_mask.stride(0) if key_mask.shape[0] > 1 else 0, largest(key_mask))
    queries, keys = plan.queries, plan.keys
    gather_kernel[(max(keys.blocks, queries.image_blocks), lanes, 2 + plan.group)](
        q, *q.stride(), k, *k.stride(), v, *v.stride(), mask, stride_mb, top, space["k"], space["v"], space["bias"], space["mean_k"],
        space["mean_v"], space["precise_k"], space["precise_v"], space["log_mass"], space["trace"], space["centre"], space["sample"],
        space["sample_share"], space["histogram"], first, plan.heads_kv, plan.group, keys.blocks, keys.image_blocks,
        queries.image_blocks, plan.far_stride, *keys.geometry, *queries.geometry, plan.head_dim, plan.dim, ROUTING_SAMPLES,
        plans.BINS, key_mask is not None, plan.biased, num_warps=4 if wide else 2)
    columns = plan.column_tile
    covariance_kernel[(2 * plan.dim // columns, plan.splits, lanes)](
        space["k"], space["v"], space["bias"], space["precise_k"], space["precise_v"], space["log_mass"], space["trace"],
        space["partial_covariance"], space["partial_mass"], -(-keys.image_blocks // plan.splits), keys.blocks, keys.image_blocks,
        plan.far_stride, plan.dim, columns, key_mask is not None, _precision(plan), num_warps=8 if wide else 4,
        num_stages=1 if wide else 3 if plan.tiles.tma else 2)
    pool_kernel[(plan.dim // 16, 2, lanes)](space["partial_covariance"], space["partial_mass"], space["covariance"], space["column_scale"],
                                            space["mean_trace"], plan.splits, plan.dim, 16)


def score(plan: plans.Plan, space: dict[str, Tensor], lanes: int, scale: float) -> None:
    """Predicted masses of all pairs of blocks of a round, from the samples and block means."""
    heads = lanes * plan.group
    # Two stages need more shared memory than GPUs without a tensor memory accelerator have.
    stages = 2 if plan.tiles.tma else 1
    factor = scale * LOG2_E
    n_queries, n_keys = plan.queries.image_blocks, plan.keys.image_blocks
    total_kernel[(triton.cdiv(n_queries, 16), heads)](
        space["sample"], space["sample_share"], space["mean_k"], space["log_mass"], space["log_total"], factor, n_keys, n_queries,
        plan.far_stride, plan.group, plan.dim, 16, 64, ROUTING_SAMPLES, "tf32", num_warps=4, num_stages=stages)
    score_kernel[(triton.cdiv(n_queries, 64), triton.cdiv(n_keys, 64 * plan.score_steps), heads)](
        space["sample"], space["log_total"], space["mean_k"], space["log_mass"], space["far"], space["histogram"], factor,
        n_keys, n_queries, plan.far_stride, plan.across, plan.group, plan.neighbours, plan.dim, 64, 64, plan.score_steps, plans.BINS,
        ROUTING_SAMPLES, "tf32", num_warps=4, num_stages=stages)


@lru_cache(maxsize=16)
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """Densities and factors of the probe on a device."""
    with long_lived.allocation():
        return torch.tensor(aim.DENSITIES, device=device), torch.tensor(aim.FACTORS, device=device)


def probe(plan: plans.Plan, space: dict[str, Tensor], q: Tensor, first: int, lanes: int, scale: float, goal: float, settled: Settled) -> None:
    """Fill `settled` for the heads of a round, from a workspace with scores. goal: relative L2 error to meet."""
    heads, splits, (densities, factors) = lanes * plan.group, plan.probe_splits, _constants(q.device)
    wide = plan.dim * plan.dtype.itemsize > 256
    stages = 2 if plan.tiles.tma else 1
    queries, keys = plan.queries, plan.keys
    where = (plan.head_dim, plan.dim)
    places = (aim.PLACE_FIRST, aim.PLACE_STEP)
    for name, exact in (("exact", True), ("near", False)):
        probe_kernel[(1 if exact else len(aim.DENSITIES), heads, splits)](
            q, *q.stride(), space["k"], space["v"], space["bias"], space["far"], space["histogram"], settled.always, densities,
            space[f"{name}_numerator"], space[f"{name}_top"], space[f"{name}_mass"], space["block_mass"], scale, first * plan.group,
            plan.heads, plan.group, keys.blocks, keys.image_blocks, queries.image_blocks, plan.far_stride, -(-keys.blocks // splits),
            *queries.geometry, *where, *places, plans.BINS, plan.biased, exact, plan.own, _precision(plan), num_warps=8 if wide else 4,
            num_stages=1 if wide else stages)
        if exact:
            sink_kernel[(triton.cdiv(keys.image_blocks, 64), heads)](
                space["exact_top"], space["exact_mass"], space["block_mass"], settled.always, aim.sink_share(keys.image_blocks),
                keys.image_blocks, queries.image_blocks, splits, *queries.geometry, *places, aim.SINK_ROWS)
    tail_kernel[(len(aim.FACTORS), len(aim.DENSITIES), heads)](
        q, *q.stride(), space["mean_k"], space["mean_v"], space["log_mass"], space["trace"], space["mean_trace"], space["centre"],
        space["covariance"], space["column_scale"], space["far"], space["histogram"], settled.always, densities, factors,
        space["exact_numerator"], space["exact_top"], space["exact_mass"], space["near_numerator"], space["near_top"], space["near_mass"],
        space["sums"], scale, first * plan.group, plan.heads, plan.group, keys.image_blocks, queries.image_blocks, plan.far_stride, splits,
        *queries.geometry, *where, 32, *places, plans.BINS, plan.own, _precision(plan), num_warps=8, num_stages=1)
    choose_kernel[(heads,)](space["sums"], densities, factors, settled.setting, goal, len(aim.DENSITIES), len(aim.FACTORS), *aim.LINEAR,
                            plan.between, num_warps=1)


def select(plan: plans.Plan, space: dict[str, Tensor], lanes: int, density: float, settled: Settled | None = None) -> None:
    """Near blocks of every query block of a round, from the scores, and the order in which query blocks are worked on."""
    setting, always = (space["histogram"], space["histogram"]) if settled is None else (settled.setting, settled.always)
    queries, keys = plan.queries, plan.keys
    select_kernel[(triton.cdiv(queries.blocks, 8), lanes * plan.group)](
        space["far"], space["histogram"], space["log_mass"], space["list"], space["count"], density, setting, always,
        keys.blocks, keys.image_blocks, queries.blocks, queries.image_blocks, plan.far_stride, plan.group, 8, 128, plans.BINS,
        settled is not None, plan.own)
    order_kernel[(triton.cdiv(queries.image_blocks, 32), lanes * plan.group)](
        space["count"], space["order"], queries.blocks, queries.image_blocks, 32, 128)


def attend_round(plan: plans.Plan, space: dict[str, Tensor], q: Tensor, out: Tensor, not_finite: Tensor, first: int, lanes: int, scale: float,
                 tail: str, settled: Settled | None = None) -> None:
    """Attention of the lanes from `first` on, from a filled workspace into `out`."""
    tiles, queries, keys = plan.tiles, plan.queries, plan.keys
    k, v, mean_k, mean_v, covariance = (space[name].view(-1, plan.dim) for name in ("k", "v", "mean_k", "mean_v", "covariance"))
    tma = tiles.tma and TensorDescriptor is not None
    if tma:
        k, v = (TensorDescriptor.from_tensor(x, [64, plan.dim]) for x in (k, v))
        mean_k, mean_v = (TensorDescriptor.from_tensor(x, [tiles.far, plan.dim]) for x in (mean_k, mean_v))
        covariance = TensorDescriptor.from_tensor(covariance, [plan.dim, plan.dim])
    attend_kernel[(queries.blocks, lanes * plan.group)](
        q, *q.stride(), out, *out.stride(), k, v, space["bias"], mean_k, mean_v, space["trace"], space["mean_trace"], space["centre"],
        covariance, space["column_scale"], space["far"], space["list"], space["count"], space["order"],
        space["column_scale"] if settled is None else settled.setting, not_finite, scale, first * plan.group, plan.heads, plan.group,
        keys.blocks, keys.image_blocks, queries.blocks, queries.image_blocks, plan.far_stride, *queries.geometry, plan.head_dim, plan.dim,
        tiles.far, plan.biased, TAILS[tail], settled is not None, tma, tiles.stages, tiles.far_stages, _precision(plan), num_warps=tiles.warps)
