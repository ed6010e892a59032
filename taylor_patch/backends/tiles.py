"""Tile order: tokens of a t x h x w grid gathered into blocks of at most 64 neighbours.

Neighbouring tokens have similar keys, which is what makes a block's mean stand well for its members.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from taylor_patch.call import AttentionCall, TokenGrid

BLOCK = 64


def grids(call: AttentionCall) -> tuple[TokenGrid, TokenGrid]:
    """(grid of the queries, grid of the keys): one and the same in self-attention, where call.grid must be known. In cross-attention a side
    whose arrangement is not known is a line of tokens (docs/adr/0011)."""
    if call.self_attention:
        assert call.grid is not None  # needs_grid: a call without one is refused
        return call.grid, call.grid
    return call.grid or TokenGrid(1, 1, call.q.shape[2]), call.key_grid or TokenGrid(1, 1, call.k.shape[2])


def is_line(grid: TokenGrid) -> bool:
    """Whether the tokens are in a single row, as those of unknown arrangement are taken to be."""
    return grid.t == grid.h == 1


def tile_shape(grid: TokenGrid) -> tuple[int, int, int]:
    """8 x 8 for images, 4 x 4 x 4 for video, 2 x 4 x 8 for two or three frames, 64 in a row for a line of tokens."""
    if grid.t == 1:
        return (1, 1, 64) if is_line(grid) else (1, 8, 8)
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


@lru_cache(maxsize=8)
def adjacent(grid: TokenGrid) -> Tensor:
    """[n_blocks, n_blocks] bool: whether two blocks of a picture share an edge or a corner; no block does with itself."""
    _, height, width = tile_shape(grid)
    across = -(-grid.w // width)
    block = torch.arange(-(-grid.h // height) * across)
    down, right = ((x[:, None] - x).abs() for x in (block // across, block % across))
    return torch.maximum(down, right) == 1
