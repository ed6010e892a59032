"""`kitchen_int8`: attention to all keys with q, k, v and the probabilities in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

import taylor_patch
from taylor_patch_kitchen import library


class Int8(taylor_patch.Backend):
    """comfy_kitchen.int8_attention."""

    name = "kitchen_int8"
    summary = "comfy-kitchen: all keys, in 8 bits"
    devices = frozenset({"cuda"})

    def unavailable(self) -> tuple[str, ...]:
        """See Backend.unavailable."""
        return library.missing("int8_attention")

    def workspace_nbytes(self, call: taylor_patch.AttentionCall) -> int:
        """8-bit q, k and v with their scales, padded and copied inputs, and a padded output; heads padded to 64, 128 or 256."""
        head_dim, size = call.q.shape[-1], call.q.element_size()
        padded = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
        queries, keys = call.q.numel() // head_dim, call.k.numel() // head_dim
        return queries * (padded * (1 + 3 * size) + 16) + keys * 2 * (padded * (1 + 2 * size) + 16)

    @torch.compiler.disable
    def run(self, call: taylor_patch.AttentionCall) -> Tensor:
        """See Backend.run."""
        mask = None if call.key_mask is None else call.key_mask[:, None, None]
        q, k, v = (library.loadable(x) for x in (call.q, call.k, call.v))
        with torch.cuda.device_of(q):
            return library.library().int8_attention(q, k, v, scale=call.scale, attn_mask=mask)  # type: ignore[union-attr]
