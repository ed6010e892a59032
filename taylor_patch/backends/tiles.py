"""Tile order: tokens of a t x h x w grid gathered into blocks of at most 64 neighbours.

Neighbouring tokens have similar keys, which is what makes a block's mean stand well for its members.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from taylor_patch.call import TokenGrid

BLOCK = 64


def tile_shape(grid: TokenGrid) -> tuple[int, int, int]:
    """8 x 8 for images, 4 x 4 x 4 for video, 2 x 4 x 8 for two or three frames."""
    if grid.t == 1:
        return (1, 8, 8)
    return (4, 4, 4) if grid.t >= 4 else (2, 4, 8)


@lru_cache(maxsize=32)
def tile_index(grid: TokenGrid) -> tuple[Tensor, Tensor]:
    """(index [n_blocks, 64] int64, filled [n_blocks, 64] bool) of the grid's tokens; edge tiles hold fewer.

    index counts tokens from the grid's first; unfilled places point at token 0.
    """
    tt, th, tw = tile_shape(grid)
    blocks = (-(-grid.t // tt), -(-grid.h // th), -(-grid.w // tw))
    padded = torch.full((blocks[0] * tt, blocks[1] * th, blocks[2] * tw), -1)
    padded[: grid.t, : grid.h, : grid.w] = torch.arange(grid.tokens).view(grid.t, grid.h, grid.w)
    index = padded.view(blocks[0], tt, blocks[1], th, blocks[2], tw).permute(0, 2, 4, 1, 3, 5).reshape(-1, BLOCK)
    return index.clamp_min(0), index >= 0
