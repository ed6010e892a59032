"""`kitchen_sol`: Sol-Attn, routed key blocks exactly and one mean for each other block, on blocks of neighbours in the image.

In ComfyUI's row-major order 64 consecutive tokens are a strip of the image; here they are a tile of it, which a mean stands for better.
Tokens outside the grid (the text) are exact as keys and as queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

import taylor_patch
from taylor_patch.backends.tiles import BLOCK
from taylor_patch_kitchen import SolOptions, library
from taylor_patch_kitchen.order import block_order


class Sol(taylor_patch.Backend):
    """comfy_kitchen.sol_attn in tile order."""

    name = "kitchen_sol"
    summary = "comfy-kitchen Sol-Attn: routed key blocks exactly, block means for the rest"
    devices = frozenset({"cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16})
    head_dims = range(128, 129)
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
        """q, k, v and the result in tile order, their 8-bit forms, and block sums in float32."""
        batch, heads, tokens, head_dim = call.q.shape
        blocks = self._blocks(call)
        rows = batch * heads * blocks * BLOCK
        return rows * head_dim * (4 * call.q.element_size() + 4) + batch * heads * blocks * (4 * blocks + 16 * head_dim) + 16 * tokens

    @staticmethod
    def _blocks(call: taylor_patch.AttentionCall) -> int:
        """Blocks of 64 places, edge tiles counted whole. The grid is there: reasons_against saw to it."""
        if call.grid is None:
            return -(-call.q.shape[2] // BLOCK)
        grid, tokens = call.grid, call.q.shape[2]
        return len(block_order(grid, tokens, torch.device("cpu")).length)

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
