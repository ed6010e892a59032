"""near_far in plain PyTorch, any device: the oracle of the kernels, and the way where there is no Triton.

Keys lie in blocks of 64 neighbours. A query block sees its important blocks exactly; every other block b is expanded
around its mean. With n_b keys, mean k_b and v_b, and q already times scale:

    weight = n_b exp(q.k_b + 1/2 t_b q' S_w q),    value = v_b + C_w' q

S_w = mean within-block covariance of k, C_w = that of (k, v), t_b = tr(S_b) / mean tr(S_b). Tokens outside the image
(text, conditioning) are always exact, as keys and as queries. No N x N tensor is formed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_patch.backends.tiles import BLOCK, tile_index
from taylor_patch.call import AttentionCall, TokenGrid

ROUTING_SAMPLES = 4
"""Sub-means of a query block that vote on its near blocks."""
QUERY_BLOCKS_AT_ONCE = 8


@dataclass(frozen=True)
class Blocks:
    """Key blocks of one head: members and what the far field needs of them."""

    k: Tensor  # [n_blocks, 64, D]
    v: Tensor  # [n_blocks, 64, D]
    log_weight: Tensor  # [n_blocks, 64]: log weight of each key, -inf where there is none
    mean_k: Tensor  # [n_blocks, D]
    mean_v: Tensor  # [n_blocks, D]
    log_mass: Tensor  # [n_blocks]: log of the summed weights, -inf for an empty block
    spread: Tensor  # [n_blocks]: t_b
    cov_kk: Tensor  # [D, D]: S_w
    cov_kv: Tensor  # [D, D]: C_w


def workspace_nbytes(call: AttentionCall, density: float) -> int:
    """Upper estimate for one head: blocks of q, k, v, the routing table, and the logits of a group of query blocks."""
    _, _, n, head_dim = call.q.shape
    blocks = -(-n // BLOCK)
    outside = n - (call.grid.tokens if call.grid else 0)
    rows = QUERY_BLOCKS_AT_ONCE * BLOCK
    keys = blocks * BLOCK * min(1.0, 4 * density) + blocks + outside
    gathered = QUERY_BLOCKS_AT_ONCE * keys * head_dim * 2
    return int(4 * (4 * n * head_dim + (2 + ROUTING_SAMPLES) * blocks**2 + 3 * rows * keys + gathered + 4 * head_dim**2))


def attend(call: AttentionCall, density: float, tail: str = "cumulant") -> Tensor:
    """near_far attention of a whole call, head by head -> [B, H, N, D] in q's dtype."""
    assert call.grid is not None  # NearFar.reasons_against refuses a call without one
    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    for b in range(call.q.shape[0]):
        bias = None if call.key_mask is None else call.key_mask[b % call.key_mask.shape[0]]
        for h in range(call.q.shape[1]):
            kv_head = h * call.k.shape[1] // call.q.shape[1]
            out[b, h] = attend_head(call.q[b, h] * call.scale, call.k[b, kv_head], call.v[b, kv_head], call.grid, density, tail,
                                    bias).to(out.dtype)
    return out


def attend_head(q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, density: float, tail: str = "cumulant",
                bias: Tensor | None = None, near: Tensor | None = None) -> Tensor:
    """near_far attention of one head: q (times scale), k, v [N, D], bias [N] additive -> [N, D] in float32 or wider.

    near [n_blocks, n_blocks] bool takes the place of the routing where it is given.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    bias = torch.zeros_like(k[:, 0]) if bias is None else bias.to(dtype)
    index, filled = (x.to(q.device) for x in tile_index(grid))
    index = index + grid.start
    outside = torch.ones(q.shape[0], dtype=torch.bool, device=q.device)
    outside[grid.start : grid.start + grid.tokens] = False
    blocks = gather_blocks(k, v, bias, index, filled)
    q_blocks = q[index]
    near = route(q_blocks, filled, blocks, density) if near is None else near
    out = torch.empty_like(q)
    out[outside] = torch.softmax(q[outside] @ k.T + bias, -1) @ v
    text = (k[outside], v[outside], bias[outside])
    # Query blocks with about as many near blocks go together, so that little of the gathered keys is padding.
    for group in near.sum(1).argsort().split(QUERY_BLOCKS_AT_ONCE):
        rows = attend_group(q_blocks[group], near[group], blocks, text, tail)
        out[index[group][filled[group]]] = rows[filled[group]]
    return out


def gather_blocks(k: Tensor, v: Tensor, bias: Tensor, index: Tensor, filled: Tensor) -> Blocks:
    """Key blocks of one head and their statistics. k, v [N, D], bias [N], index and filled [n_blocks, 64]."""
    log_weight = bias[index].masked_fill(~filled, -torch.inf)
    weight = log_weight.exp()
    mass = weight.sum(1)
    share = weight / mass.clamp_min(torch.finfo(k.dtype).tiny)[:, None]
    kb, vb = k[index], v[index]
    mean_k, mean_v = ((share[..., None] * x).sum(1) for x in (kb, vb))
    total = mass.sum().clamp_min(torch.finfo(k.dtype).tiny)
    dk, dv = kb - mean_k[:, None], vb - mean_v[:, None]
    weighted = (dk * (weight / total)[..., None]).flatten(0, 1)
    trace = (share * dk.square().sum(-1)).sum(1)
    mean_trace = (trace * mass).sum() / total
    return Blocks(kb, vb, log_weight, mean_k, mean_v, mass.log(), trace / mean_trace.clamp_min(torch.finfo(k.dtype).tiny),
                  weighted.T @ dk.flatten(0, 1), weighted.T @ dv.flatten(0, 1))


def route(q_blocks: Tensor, filled: Tensor, blocks: Blocks, density: float) -> Tensor:
    """Near blocks [n_blocks, n_blocks] bool of every query block: the share `density` with most softmax mass in the head,
    its own block and its best block. q_blocks: [n_blocks, 64, D]; filled: [n_blocks, 64]."""
    n_blocks, _, dim = q_blocks.shape
    member = filled.view(n_blocks, ROUTING_SAMPLES, -1, 1).to(q_blocks.dtype)
    count = member.sum(2)
    sample = (q_blocks.view(n_blocks, ROUTING_SAMPLES, -1, dim) * member).sum(2) / count.clamp_min(1)
    score = torch.softmax(sample @ blocks.mean_k.T + blocks.log_mass, -1).nan_to_num(0.0)
    mass = (score * (count / count.sum(1, keepdim=True).clamp_min(1))).sum(1)
    wanted = max(1, min(mass.numel(), round(density * mass.numel())))
    threshold = mass.flatten().kthvalue(mass.numel() - wanted + 1).values
    near = mass >= threshold if density >= 1 else (mass > threshold)
    near.scatter_(1, mass.argmax(1, keepdim=True), True)
    near.fill_diagonal_(True)
    return near & blocks.log_mass.isfinite()


def attend_group(q: Tensor, near: Tensor, blocks: Blocks, text: tuple[Tensor, Tensor, Tensor], tail: str) -> Tensor:
    """Query blocks q [G, 64, D] with their near blocks [G, n_blocks] -> [G, 64, D]."""
    count = int(near.sum(1).max())
    chosen = near.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    present = near.gather(1, chosen)
    keys, values = blocks.k[chosen].flatten(1, 2), blocks.v[chosen].flatten(1, 2)
    hidden = blocks.log_weight[chosen].masked_fill(~present[..., None], -torch.inf).flatten(1)
    text_k, text_v, text_bias = text
    logits = [q @ keys.transpose(1, 2) + hidden[:, None], q @ text_k.T + text_bias]
    if tail != "none":
        far = q @ blocks.mean_k.T + blocks.log_mass
        if tail == "cumulant":
            far = far + 0.5 * ((q @ blocks.cov_kk) * q).sum(-1, keepdim=True) * blocks.spread
        logits.append(far.masked_fill(near[:, None], -torch.inf))
    weight = torch.softmax(torch.cat(logits, -1), -1)
    parts = weight.split([part.shape[-1] for part in logits], -1)
    out = parts[0] @ values + parts[1] @ text_v
    if tail != "none":
        out = out + parts[2] @ blocks.mean_v
    if tail == "cumulant":
        out = out + parts[2].sum(-1, keepdim=True) * (q @ blocks.cov_kv)
    return out
