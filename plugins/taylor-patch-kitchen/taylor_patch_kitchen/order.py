"""The order in which Sol-Attn gets the tokens: blocks of 64 neighbours of the grid, after blocks of the tokens outside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from taylor_patch import TokenGrid
from taylor_patch.backends.tiles import BLOCK, tile_index


@dataclass(frozen=True)
class Order:
    """index [n_blocks * 64] int64: the token at each place, any token where there is none; length [n_blocks] int32: tokens at the front of
    each block; places [tokens] int64: where each token went; outside: how many of the blocks, at the front, are not of the grid."""

    index: Tensor
    length: Tensor
    places: Tensor
    outside: int


@lru_cache(maxsize=16)
def block_order(grid: TokenGrid, tokens: int, device: torch.device) -> Order:
    """The order of `tokens` tokens, those of `grid` among them."""
    tiles, filled = tile_index(grid)
    first = filled.int().argsort(dim=1, descending=True, stable=True)  # an edge tile's tokens to its front
    tiles, filled = tiles.gather(1, first) + grid.start, filled.gather(1, first)
    rest = torch.cat((torch.arange(grid.start), torch.arange(grid.start + grid.tokens, tokens)))
    outside = -(-len(rest) // BLOCK)
    padded = torch.zeros(outside * BLOCK, dtype=torch.int64)
    padded[: len(rest)] = rest
    index = torch.cat((padded, tiles.flatten()))
    live = torch.cat((torch.arange(outside * BLOCK) < len(rest), filled.flatten()))
    places = torch.empty(tokens, dtype=torch.int64)
    places[index[live]] = torch.nonzero(live)[:, 0]
    length = live.view(-1, BLOCK).sum(1).int()
    return Order(index.to(device), length.to(device), places.to(device), outside)
