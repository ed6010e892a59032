"""Tile order in Triton: which token lies at a place of a block. The same order as tiles.tile_index, without a table."""

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("n_blocks", "n_image_blocks", "n_query_blocks", "n_query_image_blocks", "n_keys", "n_queries", "n_splits", "n_heads",
         "first_lane", "first_head", "blocks_each", "across", "GRID_T", "GRID_H", "GRID_W", "START", "OUTSIDE",
         "QUERY_T", "QUERY_H", "QUERY_W", "QUERY_START", "QUERY_OUTSIDE")
"""Arguments on whose values kernels are not specialised, so that a new size of picture compiles nothing."""


@triton.jit
def block_tokens(block, place, n_image_blocks, GRID_T, GRID_H, GRID_W, START, OUTSIDE,
                 TILE_T: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """(token, filled) at `place` (0 to 63) of `block`: image tiles first, then 64 tokens outside the image at a time.

    The token of a place that is not filled lies outside the sequence and must be masked.
    """
    across = tl.cdiv(GRID_W, TILE_W)
    down = tl.cdiv(GRID_H, TILE_H)
    strip = block // across
    x = block % across * TILE_W + place % TILE_W
    y = strip % down * TILE_H + place // TILE_W % TILE_H
    t = strip // down * TILE_T + place // (TILE_W * TILE_H)
    image_token = START + (t * GRID_H + y) * GRID_W + x
    rank = (block - n_image_blocks) * 64 + place
    outside_token = tl.where(rank < START, rank, rank + GRID_T * GRID_H * GRID_W)
    in_image = block < n_image_blocks
    token = tl.where(in_image, image_token, outside_token)
    filled = tl.where(in_image, (x < GRID_W) & (y < GRID_H) & (t < GRID_T), rank < OUTSIDE)
    return token, filled
