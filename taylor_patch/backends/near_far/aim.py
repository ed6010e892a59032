"""Error-aimed density: how many exact blocks a head needs for a wanted error, from 64 of its rows.

64 query rows, each from another block, are computed exactly and with each density of DENSITIES. That gives the error of every density
on these rows, and the best factors of the second-order and the linear term for it. The density is then interpolated to where the
error meets MARGIN times the target, as how_between says.
Key blocks that take more than SINK_SHARE of the softmax, and SINK_TIMES what they would in a flat
one, in more than SINK_ROWS of the rows (attention sinks) are exact for every query.

This is the plain version, for one head; probing.py has the same in Triton. A setting is four float32: density (1: exact throughout),
factor of the second-order term, factor of the linear term, error expected (relative L2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taylor_patch.backends.near_far.blocks import FEW_BLOCKS, Blocks, masses, near_blocks, tail_logits, tilt
from taylor_patch.backends.targets import MARGIN
from taylor_patch.backends.tiles import BLOCK

DENSITIES = (0.04, 0.1, 0.22, 0.5)
FACTORS = (0.7, 0.85, 1.0, 1.2)
"""Factors of the second-order term that are tried."""
LINEAR = (0.75, 1.25)
"""Bounds of the factor of the linear term."""
ROWS = 64
SINK_SHARE, SINK_TIMES, SINK_ROWS = 0.02, 8.0, 0.5
PLACE_STEP, PLACE_FIRST = 27, 5
"""Row i of the probe is place (27 i + 5) mod 64 of block (2 i + 1) blocks / 128: another place of the tile in each block."""


@dataclass
class Settled:
    """What a probe found. setting [heads, 4] float32; always [heads, key blocks] int8: 1 for key blocks that every query sees exactly."""

    setting: Tensor
    always: Tensor


NOT, CHORD, POWER = 0, 1, 2
"""How a density between two of those that were tried is found: none is, the higher one is taken; on the straight line between their
errors; on the power of the density that goes through them."""


def how_between(line: bool, image_blocks: int) -> int:
    """NOT, CHORD or POWER. line: the keys are in a line, where the error may fall late and steeply between two densities.

    Over hundreds of blocks the error falls as a power. With a few it falls later: on the demo's model of 64 blocks a power promised .0225
    where .0425 came out; the straight line, which lies above any curve that bends that way, does not. image_blocks: of the keys.
    """
    return NOT if line else CHORD if image_blocks < FEW_BLOCKS else POWER


def probe_rows(image_blocks: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(block, place in the block) of the 64 rows, int64."""
    i = torch.arange(ROWS, device=device)
    return (2 * i + 1) * image_blocks // (2 * ROWS), (PLACE_STEP * i + PLACE_FIRST) % 64


def sink_share(image_blocks: int) -> float:
    """Share of the softmax from which a key block counts as a sink of a row."""
    return max(SINK_SHARE, SINK_TIMES / image_blocks)


def settle_head(q: Tensor, blocks: Blocks, filled: Tensor, text: tuple[Tensor, Tensor, Tensor], own: bool,
                neighbours: Tensor | None, between: int, target: float) -> Settled:
    """What is settled for one head: setting [4], always [key blocks]. q [query blocks, 64, D] times scale; text: k, v, bias outside the
    image; own, neighbours: as near_blocks has them; between: as choose has it."""
    block, place = probe_rows(q.shape[0], q.device)
    rows, real = q[block, place], filled[block, place]
    mass = masses(q, filled, blocks)
    logits = torch.cat([(rows @ blocks.k.flatten(0, 1).T) + blocks.log_weight.flatten(), rows @ text[0].T + text[2]], 1)
    values = torch.cat([blocks.v.flatten(0, 1), text[1]])
    share = torch.softmax(logits, 1)
    of_block = share[:, : blocks.k.shape[0] * BLOCK].view(ROWS, -1, BLOCK).sum(2)
    always = ((of_block > sink_share(blocks.k.shape[0])) & real[:, None]).sum(0) > SINK_ROWS * real.sum()
    near = [near_blocks(mass, density, blocks, own, neighbours)[block] | always for density in DENSITIES]
    sums = torch.stack([torch.stack([_sums(rows, share @ values, seen, factor, logits, values, blocks)[real].sum(0) for factor in FACTORS])
                        for seen in near])
    return Settled(choose(sums, target, between), always.to(torch.int8))


def _sums(rows: Tensor, exact: Tensor, near: Tensor, factor: float, logits: Tensor, values: Tensor, blocks: Blocks) -> Tensor:
    """[ROWS, 4]: r.r, r.b, b.b and exact.exact; b is the linear term of each row, r what is missing without it."""
    far = tail_logits(rows, blocks, factor).masked_fill(near, -torch.inf)
    hidden = ~near.repeat_interleave(BLOCK, 1)
    near_logits = torch.cat([logits[:, : hidden.shape[1]].masked_fill(hidden, -torch.inf), logits[:, hidden.shape[1] :]], 1)
    near_share, far_share = torch.softmax(torch.cat([near_logits, far], 1), 1).split([logits.shape[1], far.shape[1]], 1)
    linear = tilt(rows, blocks)[1] * far_share.sum(1, keepdim=True) * (rows @ blocks.cov_kv)
    missing = exact - near_share @ values - far_share @ blocks.mean_v
    return torch.stack([missing.square().sum(1), (missing * linear).sum(1), linear.square().sum(1), exact.square().sum(1)], 1)


def choose(sums: Tensor, target: float, between: int) -> Tensor:
    """setting [..., 4] from the sums [..., DENSITIES, FACTORS, 4] of a probe: the least density whose error meets the target, the
    factors that suit it, and the error expected. between: as how_between has it. Sums that are not finite, or
    no density that does, give exact attention."""
    tiny, goal = torch.finfo(sums.dtype).tiny, MARGIN * target
    missing, both, linear, exact = sums.unbind(-1)
    scale = (both / linear.clamp_min(tiny)).clamp(*LINEAR)
    errors = ((missing - 2 * scale * both + scale**2 * linear).clamp_min(0) / exact.clamp_min(tiny)).sqrt()
    error, best = errors.min(-1)
    scale = scale.gather(-1, best[..., None])[..., 0]
    factor = torch.tensor(FACTORS, dtype=sums.dtype, device=sums.device)[best]
    meets = error <= goal
    first = meets.to(torch.int8).argmax(-1, keepdim=True)
    before = (first - 1).clamp_min(0)
    density = torch.tensor(DENSITIES, dtype=sums.dtype, device=sums.device)
    here, previous = error.gather(-1, first), error.gather(-1, before)
    inner = (first > 0) & (between != NOT)  # the least density is not gone below
    low, high = density[before], density[first]
    if between == POWER:
        part = (previous / goal).log() / (previous / here.clamp_min(1e-3 * goal)).log()
        middle = low * (high / low) ** part
    else:
        middle = low + (previous - goal) / (previous - here).clamp_min(tiny) * (high - low)
    found = torch.cat([torch.where(inner & previous.isfinite(), middle, high), factor.gather(-1, first), scale.gather(-1, first),
                       torch.where(inner, torch.full_like(here, goal), here)], -1)
    return torch.where(meets.any(-1, keepdim=True), found, torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=sums.dtype, device=sums.device))
