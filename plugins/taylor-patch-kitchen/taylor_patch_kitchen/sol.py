"""`kitchen_sol`: Sol-Attn, routed key blocks exactly and one mean for each other block, on blocks of neighbours in the image.

In ComfyUI's row-major order 64 consecutive tokens are a strip of the image; here they are a tile of it, which a mean stands for better.
Tokens outside the grid (the text) are exact as keys and as queries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import taylor_patch
from taylor_patch.backends.tiles import BLOCK, tile_shape
from taylor_patch_kitchen import SolOptions, library
from taylor_patch_kitchen.order import block_order

HEAD_DIM = 128
SLICE_BLOCKS = 128
"""Blocks of which the library makes means at once."""
SCORES_NBYTES = 64 << 20
"""Scores of block means that the library makes at once, of one head at least."""
PARTS = 40
"""Parts of the library's workspace, each rounded up to 16 bytes."""


def library_nbytes(lanes: int, blocks: int, token_aug: int) -> int:
    """Bytes of the library's own workspace (its sol_attn_plan, 0.2.40) for whole blocks of 64 tokens; lanes: batch times heads.

    8-bit q, k and v with scales; block sums, means and their 8-bit forms, in groups of 64 blocks; lists of exact blocks. With
    token_aug: v once more, and for each pair of query blocks a histogram, lists and partial results.
    """
    rows, padded = lanes * blocks * BLOCK, lanes * -(-blocks // 64) * 64
    nbytes = rows * (3 * HEAD_DIM + 12) + padded * (11 * HEAD_DIM + 4) + lanes * 16 * HEAD_DIM + lanes * blocks * (2 * blocks + 404)
    if token_aug:
        pairs, words = -(-blocks // 2), -(-blocks // 32)
        nbytes += rows * HEAD_DIM + lanes * blocks * (4 + 4 * words) + lanes * -(-pairs // 64) * (2 * blocks + 4)
        nbytes += lanes * pairs * (HEAD_DIM + 524 + 4 * words + 4 * token_aug + 8 * (2 * HEAD_DIM + 8))
    return nbytes + PARTS * 16


class Sol(taylor_patch.Backend):
    """comfy_kitchen.sol_attn in tile order."""

    name = "kitchen_sol"
    summary = "comfy-kitchen Sol-Attn: routed key blocks exactly, block means for the rest"
    devices = frozenset({"cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16})
    head_dims = range(HEAD_DIM, HEAD_DIM + 1)
    key_masks = False  # the library's means do not see a mask
    gqa = False
    cross_attention = False
    needs_grid = True
    options_type = SolOptions
    options: SolOptions

    def unavailable(self) -> tuple[str, ...]:
        """See Backend.unavailable."""
        return library.missing("sol_attn")

    def reasons_against(self, call: taylor_patch.AttentionCall) -> tuple[str, ...]:
        """See Backend.reasons_against."""
        reasons = super().reasons_against(call)
        if call.q.shape[2] < self.options.min_tokens:
            reasons = (*reasons, f"fewer tokens than min_tokens = {self.options.min_tokens}")
        return reasons

    def workspace_nbytes(self, call: taylor_patch.AttentionCall) -> int:
        """q, k, v and the result in tile order, the library's workspace, and what finding topk_ratio's threshold takes.

        The result in the caller's order is made when the workspace is free again.
        """
        batch, heads, _, head_dim = call.q.shape
        blocks, size = self._blocks(call), call.q.element_size()
        lanes = batch * heads
        tiled = 4 * lanes * blocks * BLOCK * head_dim * size - call.q.numel() * size
        return tiled + library_nbytes(lanes, blocks, self.options.token_aug) + self._threshold_nbytes(lanes, blocks, size)

    def _threshold_nbytes(self, lanes: int, blocks: int, size: int) -> int:
        """A slice of q or k without the empty places, block means in float32, and the scores of some heads with the largest of them."""
        if not self.options.topk_ratio:
            return 0
        at_once = min(lanes, max(1, SCORES_NBYTES // (4 * blocks**2)))
        largest = 12 * math.ceil(self.options.topk_ratio * blocks)
        return lanes * HEAD_DIM * (min(blocks, SLICE_BLOCKS) * BLOCK * size + 6 * 4 * blocks) + at_once * blocks * (4 * blocks + largest)

    @staticmethod
    def _blocks(call: taylor_patch.AttentionCall) -> int:
        """Blocks of 64 places, edge tiles counted whole. The grid is there: reasons_against saw to it."""
        if call.grid is None:
            return -(-call.q.shape[2] // BLOCK)
        grid, tile = call.grid, tile_shape(call.grid)
        tiles = math.prod(-(-size // side) for size, side in zip((grid.t, grid.h, grid.w), tile, strict=True))
        return tiles + -(-(call.q.shape[2] - grid.tokens) // BLOCK)

    @torch.compiler.disable
    def run(self, call: taylor_patch.AttentionCall) -> Tensor:
        """See Backend.run."""
        if call.grid is None:
            raise ValueError(call.grid_reason)
        o = self.options
        order = block_order(call.grid, call.q.shape[2], call.q.device)
        # [B, H, N, 128] -> [B, n_blocks * 64, H, 128]
        q, k, v = (x.transpose(1, 2)[:, order.index] for x in (call.q, call.k, call.v))
        outside = [0, order.outside]
        with torch.cuda.device_of(q):
            out = library.library().sol_attn(q, k, v, tau=o.tau, scale=call.scale, sink_blocks=outside,  # type: ignore[union-attr]
                                             sink_q=outside, topk_ratio=o.topk_ratio, block_len=order.length, token_aug=o.token_aug)
        return out[:, order.places].transpose(1, 2)
