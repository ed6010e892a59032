"""near_far in plain PyTorch, any device: the oracle of the kernels, and the way where there is no Triton.

Keys lie in blocks of 64 neighbours. A query block sees its important blocks exactly; every other block b is expanded
around its mean. With n_b keys, mean k_b and v_b, and q already times scale:

    weight = n_b exp(q.k_b + 1/2 t_b q' S_w q),    value = v_b + C_w' q

S_w = mean within-block covariance of k, C_w = that of (k, v), t_b = tr(S_b) / mean tr(S_b); where q' S_w q is large both terms grow
more slowly (blocks.tilt). Tokens outside the image
(text, conditioning) are always exact, as keys and as queries. No N x N tensor is formed. In cross-attention queries and keys have blocks
of their own (tiles.grids).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from taylor_patch.backends.near_far.aim import Settled, how_between, settle_head
from taylor_patch.backends.near_far.blocks import (
    ROUTING_SAMPLES,
    Blocks,
    gather_blocks,
    largest,
    masses,
    near_blocks,
    sees_neighbours,
    tail_logits,
    tilt,
)
from taylor_patch.backends.tiles import BLOCK, adjacent, grids, is_line, tile_index
from taylor_patch.call import AttentionCall, TokenGrid

QUERY_BLOCKS_AT_ONCE = 8


def workspace_nbytes(call: AttentionCall, density: float) -> int:
    """Upper estimate for one head: blocks of q, k, v, the routing table, and the logits of a group of query blocks."""
    _, _, n_q, head_dim = call.q.shape
    n_kv = call.k.shape[2]
    query_blocks, blocks = -(-n_q // BLOCK), -(-n_kv // BLOCK)
    outside = n_kv - grids(call)[1].tokens
    rows = QUERY_BLOCKS_AT_ONCE * BLOCK
    keys = blocks * BLOCK * min(1.0, 4 * density) + blocks + outside
    gathered = QUERY_BLOCKS_AT_ONCE * keys * head_dim * 2
    return int(4 * (2 * (n_q + n_kv) * head_dim + (2 + ROUTING_SAMPLES) * query_blocks * blocks + 3 * rows * keys + gathered + 4 * head_dim**2))


def attend(call: AttentionCall, density: float, tail: str = "cumulant") -> Tensor:
    """near_far attention of a whole call with one density, head by head -> [B, H, N, D] in q's dtype."""
    return _each_head(call, lambda number, head: head.attend(route(head, density), tail))


def attend_aimed(call: AttentionCall, settled: Settled | None) -> tuple[Tensor, Settled | None]:
    """The same with the density and factors that meet call.target_error; found by a probe of every head where `settled` is None."""
    found: list[Settled] = []

    def run(number: int, head: Head) -> Tensor:
        if settled is None:
            own = settle_head(head.q_blocks, head.blocks, head.filled, head.text, head.own, head.neighbours, head.between, call.target_error)
        else:
            own = Settled(settled.setting[number], settled.always[number])
        found.append(own)
        density, factor, linear, _ = own.setting.tolist()
        return head.attend(route(head, density) | own.always.bool() & head.blocks.log_mass.isfinite(), "cumulant", factor, linear)

    out = _each_head(call, run)
    return out, settled or Settled(torch.stack([x.setting for x in found]).float(), torch.stack([x.always for x in found]))


def _each_head(call: AttentionCall, run: Callable[[int, Head], Tensor]) -> Tensor:
    """[B, H, N, D] in q's dtype from run(number of the head in the batch, head)."""
    grid, key_grid = grids(call)
    out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
    batch, heads = call.q.shape[:2]
    for b in range(batch):
        bias = None if call.key_mask is None else call.key_mask[b % call.key_mask.shape[0]]
        for h in range(heads):
            kv = h * call.k.shape[1] // heads
            head = Head(call.q[b, h] * call.scale, call.k[b, kv], call.v[b, kv], grid, bias, None if call.self_attention else key_grid)
            out[b, h] = run(b * heads + h, head).to(out.dtype)
    return out


def route(head: Head, density: float) -> Tensor:
    """Near blocks [query blocks, key blocks] bool of the head."""
    return near_blocks(masses(head.q_blocks, head.filled, head.blocks), density, head.blocks, head.own, head.neighbours)


class Head:
    """One head in blocks. q (times scale) [N_q, D], k, v [N_kv, D], bias [N_kv] additive; computed in float32 or wider.

    grid: where the queries lie; key_grid: where the keys do, None where they lie as the queries.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, grid: TokenGrid, bias: Tensor | None = None, key_grid: TokenGrid | None = None) -> None:
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q, self.k, self.v = q.to(dtype), k.to(dtype), v.to(dtype)
        self.bias = torch.zeros_like(self.k[:, 0]) if bias is None else bias.to(dtype) - largest(bias)
        self.own = key_grid is None
        self.index, self.filled, self.outside = _places(self.q, grid)
        index, filled, outside = (self.index, self.filled, self.outside) if key_grid is None else _places(self.k, key_grid)
        self.blocks = gather_blocks(self.k, self.v, self.bias, index, filled)
        self.between = how_between(is_line(key_grid or grid), self.blocks.k.shape[0])
        around = sees_neighbours(self.own, grid, self.blocks.k.shape[0])
        self.neighbours = adjacent(grid).to(self.q.device) if around else None
        self.q_blocks = self.q[self.index]
        self.text = (self.k[outside], self.v[outside], self.bias[outside])

    def attend(self, near: Tensor, tail: str = "cumulant", factor: float = 1.0, linear: float = 1.0) -> Tensor:
        """[N_q, D] with the near blocks [query blocks, key blocks]; factors of the second-order and the linear term."""
        out = torch.empty_like(self.q)
        out[self.outside] = torch.softmax(self.q[self.outside] @ self.k.T + self.bias, -1) @ self.v
        # Query blocks with about as many near blocks go together, so that little of the gathered keys is padding.
        for group in near.sum(1).argsort().split(QUERY_BLOCKS_AT_ONCE):
            rows = attend_group(self.q_blocks[group], near[group], self.blocks, self.text, tail, factor, linear)
            out[self.index[group][self.filled[group]]] = rows[self.filled[group]]
        return out


def _places(x: Tensor, grid: TokenGrid) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of the blocks of x [N, D] (index and filled [n_blocks, 64]) and which tokens [N] lie outside the grid."""
    index, filled = (table.to(x.device) for table in tile_index(grid))
    outside = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    outside[grid.start : grid.start + grid.tokens] = False
    return index + grid.start, filled, outside


def attend_group(q: Tensor, near: Tensor, blocks: Blocks, text: tuple[Tensor, Tensor, Tensor], tail: str,
                 factor: float, linear: float) -> Tensor:
    """Query blocks q [G, 64, D] with their near blocks [G, n_blocks] -> [G, 64, D]."""
    count = int(near.sum(1).max())
    chosen = near.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]
    present = near.gather(1, chosen)
    keys, values = blocks.k[chosen].flatten(1, 2), blocks.v[chosen].flatten(1, 2)
    hidden = blocks.log_weight[chosen].masked_fill(~present[..., None], -torch.inf).flatten(1)
    text_k, text_v, text_bias = text
    logits = [q @ keys.transpose(1, 2) + hidden[:, None], q @ text_k.T + text_bias]
    if tail != "none":
        far = tail_logits(q, blocks, factor if tail == "cumulant" else 0.0)
        logits.append(far.masked_fill(near[:, None], -torch.inf))
    weight = torch.softmax(torch.cat(logits, -1), -1)
    parts = weight.split([part.shape[-1] for part in logits], -1)
    out = parts[0] @ values + parts[1] @ text_v
    if tail != "none":
        out = out + parts[2] @ blocks.mean_v
    if tail == "cumulant":
        out = out + linear * tilt(q, blocks)[1] * parts[2].sum(-1, keepdim=True) * (q @ blocks.cov_kv)
    return out
