"""near_far on the GPU: the kernels in their order, as a custom operator of torch."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from taylor_patch.backends.near_far import plan as plans
from taylor_patch.backends.near_far.kernel import attend_kernel
from taylor_patch.backends.near_far.prepare import covariance_kernel, gather_kernel, pool_kernel
from taylor_patch.backends.near_far.routing import score_kernel, select_kernel, total_kernel
from taylor_patch.call import AttentionCall, TokenGrid

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # before Triton 3.4
    TensorDescriptor = None
TAILS = {"none": 0, "zeroth": 1, "cumulant": 2}


def attend(call: AttentionCall, density: float, tail: str = "cumulant") -> Tensor:
    """near_far attention of a call -> [B, H, N, D] in q's dtype, stored [B, N, H, D] as ComfyUI's models want it.

    torch.compile sees one operator; outside it the kernels are launched directly, which costs the host less.
    """
    grid = call.grid
    assert grid is not None  # NearFar.reasons_against refuses a call without one
    if torch.compiler.is_compiling():
        return near_far(call.q, call.k, call.v, call.key_mask, [grid.t, grid.h, grid.w, grid.start], call.scale, density, tail)
    return run(plans.of_call(call), call.q, call.k, call.v, call.key_mask, call.scale, density, tail)


@torch.library.custom_op("taylor_patch::near_far", mutates_args=())
def near_far(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, grid: list[int], scale: float, density: float,
             tail: str) -> Tensor:
    """q [B, H, N, D]; k, v [B, H_kv, N, D]; key_mask [B or 1, N] additive float32; grid (t, h, w, start) -> [B, H, N, D]."""
    call = AttentionCall(q, k, v, scale, key_mask, grid=TokenGrid(*grid))
    return run(plans.of_call(call), q, k, v, key_mask, scale, density, tail)


@near_far.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, grid: list[int], scale: float, density: float, tail: str) -> Tensor:
    return empty_output(q)


def empty_output(q: Tensor) -> Tensor:
    """[B, H, N, D], stored [B, N, H, D]."""
    batch, heads, tokens, head_dim = q.shape
    return torch.empty(batch, tokens, heads, head_dim, dtype=q.dtype, device=q.device).transpose(1, 2)


def run(plan: plans.Plan, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, density: float, tail: str) -> Tensor:
    """The call in rounds of `plan.round_lanes` key heads that share one workspace."""
    out = empty_output(q)
    space = plan.allocate(q.device)
    if key_mask is not None and key_mask.stride(1) != 1:
        key_mask = key_mask.contiguous()
    # Triton launches on the current device, which need not be that of q.
    with torch.cuda.device(q.device) if q.device.type == "cuda" else nullcontext():
        for first in range(0, plan.lanes, plan.round_lanes):
            lanes = min(plan.round_lanes, plan.lanes - first)
            prepare(plan, space, q, k, v, key_mask, first, lanes)
            select(plan, space, lanes, scale, density)
            attend_round(plan, space, q, out, first, lanes, scale, tail)
    return out


def _geometry(plan: plans.Plan) -> tuple[int, ...]:
    """Arguments of the tile order: grid, start, tokens outside, tile."""
    grid = plan.grid
    return (grid.t, grid.h, grid.w, grid.start, plan.outside, *plan.tile)


def _precision(plan: plans.Plan) -> str:
    """float32 products need three TF32 products for float32 accuracy; 16-bit ones are exact as they are."""
    return "tf32x3" if plan.dtype == torch.float32 else "tf32"


def prepare(plan: plans.Plan, space: dict[str, Tensor], q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, first: int,
            lanes: int) -> None:
    """Fill k, v, means, covariances and query samples of the lanes from `first` on."""
    wide = plan.dim * plan.dtype.itemsize > 256
    mask, stride_mb = (k, 0) if key_mask is None else (key_mask, key_mask.stride(0) if key_mask.shape[0] > 1 else 0)
    gather_kernel[(plan.blocks, lanes, 2 + plan.group)](
        q, *q.stride(), k, *k.stride(), v, *v.stride(), mask, stride_mb, space["k"], space["v"], space["bias"], space["mean_k"],
        space["mean_v"], space["precise_k"], space["precise_v"], space["log_mass"], space["trace"], space["centre"], space["sample"],
        space["sample_share"], space["histogram"], first, plan.heads_kv, plan.group, plan.blocks, plan.image_blocks, plan.far_stride,
        *_geometry(plan), plan.head_dim, plan.dim, plans.ROUTING_SAMPLES, plans.BINS, key_mask is not None, plan.biased,
        num_warps=4 if wide else 2)
    columns = plan.column_tile
    covariance_kernel[(2 * plan.dim // columns, plan.splits, lanes)](
        space["k"], space["v"], space["bias"], space["precise_k"], space["precise_v"], space["log_mass"], space["trace"],
        space["partial_covariance"], space["partial_mass"], -(-plan.image_blocks // plan.splits), plan.blocks, plan.image_blocks,
        plan.far_stride, plan.dim, columns, key_mask is not None, _precision(plan), num_warps=8 if wide else 4,
        num_stages=1 if wide else 3 if plan.tiles.tma else 2)
    pool_kernel[(plan.dim // 16, 2, lanes)](space["partial_covariance"], space["partial_mass"], space["covariance"], space["column_scale"],
                                            plan.splits, plan.dim, 16)


def select(plan: plans.Plan, space: dict[str, Tensor], lanes: int, scale: float, density: float) -> None:
    """Near blocks of every query block of a round, from the samples and block means."""
    heads = lanes * plan.group
    # Two stages need more shared memory than GPUs without a tensor memory accelerator have.
    stages = 2 if plan.tiles.tma else 1
    factor = scale * 1.4426950408889634
    total_kernel[(triton.cdiv(plan.image_blocks, 16), heads)](
        space["sample"], space["sample_share"], space["mean_k"], space["log_mass"], space["log_total"], factor, plan.image_blocks,
        plan.far_stride, plan.group, plan.dim, 16, 64, plans.ROUTING_SAMPLES, "tf32", num_warps=4, num_stages=stages)
    score_kernel[(triton.cdiv(plan.image_blocks, 64), triton.cdiv(plan.image_blocks, 64 * plan.score_steps), heads)](
        space["sample"], space["log_total"], space["mean_k"], space["log_mass"], space["far"], space["histogram"], factor,
        plan.image_blocks, plan.far_stride, plan.group, plan.dim, 64, 64, plan.score_steps, plans.BINS, "tf32", num_warps=4,
        num_stages=stages)
    select_kernel[(triton.cdiv(plan.blocks, 8), heads)](
        space["far"], space["histogram"], space["log_mass"], space["list"], space["count"], density,
        plan.blocks, plan.image_blocks, plan.far_stride, plan.group, 8, 128, plans.BINS)


def attend_round(plan: plans.Plan, space: dict[str, Tensor], q: Tensor, out: Tensor, first: int, lanes: int, scale: float,
                 tail: str) -> None:
    """Attention of the lanes from `first` on, from a filled workspace into `out`."""
    tiles = plan.tiles
    k, v, mean_k, mean_v, covariance = (space[name].view(-1, plan.dim) for name in ("k", "v", "mean_k", "mean_v", "covariance"))
    tma = tiles.tma and TensorDescriptor is not None
    if tma:
        k, v = (TensorDescriptor.from_tensor(x, [64, plan.dim]) for x in (k, v))
        mean_k, mean_v = (TensorDescriptor.from_tensor(x, [tiles.far, plan.dim]) for x in (mean_k, mean_v))
        covariance = TensorDescriptor.from_tensor(covariance, [plan.dim, plan.dim])
    attend_kernel[(plan.blocks, lanes * plan.group)](
        q, *q.stride(), out, *out.stride(), k, v, space["bias"], mean_k, mean_v, space["trace"], space["centre"], covariance,
        space["column_scale"], space["far"], space["list"], space["count"], scale, first * plan.group, plan.heads, plan.group, plan.blocks,
        plan.image_blocks, plan.far_stride, *_geometry(plan), plan.head_dim, plan.dim, tiles.far, plan.biased, TAILS[tail], tma,
        _precision(plan), num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.registers or None)
