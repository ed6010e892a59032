"""`sage`: attention to all keys with q and k quantised to 8 bits, by the SageAttention that is installed.

1.x (PyPI, Triton): head_dim 64, 96 or 128. 2.x (built from source, CUDA): head_dim up to 128, padded by the library.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

import taylor_patch

HEAD_DIMS_1 = (64, 96, 128)
INT32_VALUES = 2**31
"""The kernels count values with 32 bits."""


@dataclass(frozen=True)
class Library:
    """The SageAttention that is installed."""

    sageattn: Callable[..., Tensor]
    major: int


@cache
def library() -> Library | str:
    """SageAttention, or why it cannot be used."""
    try:
        import sageattention
    except Exception as error:
        return (f"SageAttention cannot be imported ({type(error).__name__}: {error}). "
                "Install it with ComfyUI's Python: pip install sageattention")
    return Library(sageattention.sageattn, 2 if hasattr(sageattention, "sageattn_qk_int8_pv_fp16_triton") else 1)


def loadable(x: Tensor) -> Tensor:
    """x, or a copy where its last dimension has gaps or its rows do not begin at 16 bytes: the kernels load 16 bytes at a time."""
    values = 16 // x.element_size()
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(stride % values == 0 for stride in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


class Sage(taylor_patch.Backend):
    """SageAttention: all keys, q and k in 8 bits. The mean key is subtracted first (smooth k), which changes no softmax."""

    name = "sage"
    summary = "SageAttention: all keys, q and k in 8 bits"
    devices = frozenset({"cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16})
    head_dims = range(1, 129)
    key_masks = False

    def unavailable(self) -> tuple[str, ...]:
        """See Backend.unavailable."""
        found = library()
        reasons = [found] if isinstance(found, str) else []
        if not torch.cuda.is_available():
            reasons.append("no CUDA GPU")
        return tuple(reasons)

    def reasons_against(self, call: taylor_patch.AttentionCall) -> tuple[str, ...]:
        """See Backend.reasons_against."""
        reasons, found, head_dim = list(super().reasons_against(call)), library(), call.q.shape[-1]
        if isinstance(found, Library) and found.major == 1 and head_dim not in HEAD_DIMS_1:
            reasons.append(f"head_dim {head_dim}: SageAttention 1.x has {', '.join(map(str, HEAD_DIMS_1))}")
        if max(call.q.numel(), call.k.numel()) >= INT32_VALUES:
            reasons.append(f"{max(call.q.numel(), call.k.numel())} values in a tensor, the kernels count to {INT32_VALUES - 1}")
        return tuple(reasons)

    def workspace_nbytes(self, call: taylor_patch.AttentionCall) -> int:
        """8-bit q and k, the smoothed k and v in 16 bits, copies of q, k and v, and a padded output; heads padded to 64 or 128."""
        head_dim = call.q.shape[-1]
        padded = 64 if head_dim <= 64 else 128
        queries, keys = call.q.numel() // head_dim * padded, call.k.numel() // head_dim * padded
        return queries * (1 + 2 + 2) + keys * (1 + 2 + 2 + 2 + 2)

    @torch.compiler.disable
    def run(self, call: taylor_patch.AttentionCall) -> Tensor:
        """See Backend.run."""
        found = library()
        if isinstance(found, str):
            raise RuntimeError(found)
        q, k, v = loadable(call.q), loadable(call.k), loadable(call.v)
        settings: dict[str, Any] = {"tensor_layout": "HND", "is_causal": False, "sm_scale": call.scale}
        if found.major == 1:  # its smooth_k = True subtracts the mean from the caller's k itself
            k, settings["smooth_k"] = k - k.mean(2, keepdim=True), False
        with torch.cuda.device_of(q):
            return found.sageattn(q, k, v, **settings)
