"""`sdpa`: exact attention. Inside ComfyUI the router answers with the original function; this is the stand-alone form."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_patch.backends.base import Backend, aligned, expand_kv
from taylor_patch.call import AttentionCall


class Sdpa(Backend):
    """Exact attention, with any mask, by torch.nn.functional.scaled_dot_product_attention."""

    name = "sdpa"
    summary = "exact attention; in ComfyUI the function that ComfyUI itself chose"
    devices = frozenset({"cpu", "cuda", "mps", "xpu"})
    head_dims = range(1, 1 << 16)

    def workspace_nbytes(self, call: AttentionCall) -> int:
        """Zero: what the original needs is in ComfyUI's own estimate already."""
        return 0

    def run(self, call: AttentionCall) -> Tensor:
        """See Backend.run."""
        heads = call.q.shape[1]
        mask = call.row_mask if call.key_mask is None else call.key_mask[:, None, None, :]
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(call.q.dtype)
        q, k, v = call.q, call.k, call.v
        if not torch.compiler.is_compiling():
            q, k, v = aligned(q), aligned(k), aligned(v)
        return F.scaled_dot_product_attention(q, expand_kv(k, heads), expand_kv(v, heads), attn_mask=mask, scale=call.scale)
