"""`kitchen_int8`: attention to all keys with q, k, v and the probabilities in 8 bits."""

from __future__ import annotations

import torch
from torch import Tensor

import taylor_patch
from taylor_patch.backends.base import aligned
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
        """8-bit q, k and v with their scales, padded and copied inputs (a key mask copies k and v), and a padded output; heads padded to
        64, 128 or 256."""
        head_dim, size = call.q.shape[-1], call.q.element_size()
        padded = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
        queries, keys = call.q.numel() // head_dim, call.k.numel() // head_dim
        return queries * (padded * (1 + 3 * size) + 16) + keys * 2 * (padded * (1 + 2 * size) + 16)

    @torch.compiler.disable
    def run(self, call: taylor_patch.AttentionCall) -> Tensor:
        """See Backend.run."""
        mask, k, v = None, call.k, call.v
        if call.key_mask is not None:
            mask = call.key_mask[:, None, None]
            hidden = torch.isneginf(call.key_mask)[:, None, :, None]
            k, v = k.masked_fill(hidden, 0), v.masked_fill(hidden, 0)  # the library takes its 8-bit scales from every key
        q, k, v = (loadable(x) for x in (call.q, k, v))
        with torch.cuda.device_of(q):
            return library.library().int8_attention(q, k, v, scale=call.scale, attn_mask=mask)  # type: ignore[union-attr]


def loadable(x: Tensor) -> Tensor:
    """x, or a copy where the library would refuse its strides: it takes none of 0 (an expanded batch)."""
    expanded = any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.contiguous() if expanded else aligned(x)
