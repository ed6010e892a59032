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
from taylor_patch.backends.base import aligned

HEAD_DIMS_1 = (64, 96, 128)
INT32_VALUES = 2**31
"""The kernels count values with 32 bits."""
BLOCK_KEYS = 64
PADDING_SHARE = 1 / 256
"""Largest share of a row's weight that padding may take; bfloat16 rounds by as much."""


@dataclass(frozen=True)
class Library:
    """The SageAttention that is installed."""

    sageattn: Callable[..., Tensor]
    major: int


def padding_share(keys: int) -> float:
    """The largest share of a row's weight that goes to keys that are not there, in the library's Triton kernels.

    They load the last block of 64 keys with zeros in the missing places and do not mask the logits (0), so that the output is too
    small by those places' share. k has mean 0 here: a logit of 0 is a row's mean logit, and no row gives such a key more than an
    even share.
    """
    padding = -keys % BLOCK_KEYS
    return padding / (keys + padding)


def by_triton(found: Library, device: torch.device) -> bool:
    """Whether the library answers with its Triton kernels: 1.x always, 2.x on compute capability 8.6."""
    return found.major == 1 or (device.type == "cuda" and torch.cuda.get_device_capability(device) == (8, 6))


@cache
def library() -> Library | str:
    """SageAttention, or why it cannot be used."""
    try:
        import sageattention
    except Exception as error:
        return (f"SageAttention cannot be imported ({type(error).__name__}: {error}). "
                "Install it with ComfyUI's Python: pip install sageattention")
    return Library(sageattention.sageattn, 2 if hasattr(sageattention, "sageattn_qk_int8_pv_fp16_triton") else 1)


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
        reasons, found, head_dim, keys = list(super().reasons_against(call)), library(), call.q.shape[-1], call.k.shape[2]
        if isinstance(found, Library):
            if found.major == 1 and head_dim not in HEAD_DIMS_1:
                reasons.append(f"head_dim {head_dim}: SageAttention 1.x has {', '.join(map(str, HEAD_DIMS_1))}")
            if keys and padding_share(keys) > PADDING_SHARE and by_triton(found, call.q.device):
                reasons.append(f"{keys} keys: its Triton kernels count the {-keys % BLOCK_KEYS} that are missing to a multiple of {BLOCK_KEYS}")
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
        q, k, v = aligned(call.q), aligned(call.k), aligned(call.v)
        settings: dict[str, Any] = {"tensor_layout": "HND", "is_causal": False, "sm_scale": call.scale}
        if found.major == 1:  # its smooth_k = True subtracts the mean from the caller's k itself
            k, settings["smooth_k"] = k - k.mean(2, keepdim=True), False
        with torch.cuda.device_of(q):
            return found.sageattn(q, k, v, **settings)
