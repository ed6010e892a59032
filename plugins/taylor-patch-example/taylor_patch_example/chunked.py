"""The backend: exact attention, a few query rows at a time. Copy it and put your kernel into `run`."""

import torch
import torch.nn.functional as F

import taylor_patch
from taylor_patch.backends.base import aligned

ROWS = 1024


# A backend is a class. What stands at its top is its declaration: taylor_patch refuses, with the reason, whatever it excludes.
class Chunked(taylor_patch.Backend):
    """Exact attention in chunks of 1024 query rows."""

    name = "chunked"  # what users write: backend = "chunked"
    summary = "exact attention, 1024 query rows at a time"
    gqa = False  # fewer key heads than query heads: not ours

    # Temporary memory in bytes, from shapes only: the chunks and their mask.
    def workspace_nbytes(self, call: taylor_patch.AttentionCall) -> int:
        batch, heads, n_q, head_dim = call.q.shape
        rows, n_kv = min(ROWS, n_q), call.k.shape[2]
        return call.q.element_size() * batch * heads * (2 * rows * (n_kv + head_dim) + n_q * head_dim + n_kv)

    # q is [B, H, N_q, D], k and v are [B, H, N_kv, D], in any strides. Return [B, H, N_q, D], and leave the inputs as they are.
    def run(self, call: taylor_patch.AttentionCall) -> torch.Tensor:
        mask = call.key_mask  # [B or 1, N_kv], added to the logits: -inf hides a key
        if mask is not None:
            mask = mask[:, None, None].to(call.q.dtype)
        q, k, v = call.q, call.k, call.v
        if not torch.compiler.is_compiling():
            q, k, v = aligned(q), aligned(k), aligned(v)  # PyTorch's kernels load 16 bytes at a time
        chunks = [F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=call.scale) for rows in q.split(ROWS, 2)]
        return torch.cat(chunks, 2)
